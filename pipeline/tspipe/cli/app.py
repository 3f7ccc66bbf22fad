"""The command line: flags to one frozen config to one stage.

Stages are imported inside the commands, so that `tspipe --help` answers at once.
"""

import gc
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tspipe.cli import share as commands
from tspipe.cli.share import RecipeName, Settings, local, say
from tspipe.errors import OtherProcessFailed, TspipeError

if TYPE_CHECKING:
    from tspipe.extraction.extract import ExtractConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    help="Run a teacher once, cache its features, train many students against the file.",
)

Dataset = Annotated[str, typer.Option(help="A name (see `tspipe list datasets`), folder:PATH, or a file ./mine.py.")]
Data = Annotated[Path | None, typer.Option(help="Where the dataset lies; else data/<name>.", show_default=False)]
Teacher = Annotated[str | None, typer.Option(help="The network; else the recipe's.", show_default=False)]
Download = Annotated[bool, typer.Option("--download", help="Fetch dataset and first weights, if they are not there.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Flags that go before any command; `main` reads --debug itself."""


@app.command()
def teacher(
    dataset: Dataset,
    teacher: Teacher = None,
    weights: Annotated[Path | None, typer.Option(help="Start from these (fine-tune).", show_default=False)] = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Else checkpoints/<dataset>-<network>.safetensors.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Else the recipe's.", show_default=False)] = None,
    recipe: RecipeName = None,
    settings: Settings = None,
    force: Annotated[bool, typer.Option("--force", help="Replace weights of other settings.")] = False,
    download: Download = False,
) -> None:
    """Train a teacher, or fine-tune one."""
    from tspipe.models import networks
    from tspipe.models import weights as weight_files
    from tspipe.recipes import load as recipes
    from tspipe.training import teacher_weights as teachers
    from tspipe.training.train_teacher import TeacherConfig

    start = weight_files.read(weights) if weights else None
    flags = {"dataset": dataset, "teacher.network": teacher, "teacher.epochs": epochs}
    name = recipe or recipes.default_recipe(dataset)
    chosen = recipes.load(name, settings or (), flags)
    if start and start.metadata.get("network") == networks.recorded_name(chosen.teacher.network):
        chosen = recipes.load(name, settings or (), flags, teachers.recorded_settings(start))
    teachers.train_and_report(TeacherConfig(chosen, data, start, out, force, download))


@app.command()
def cache(
    dataset: Dataset,
    teacher: Teacher = None,
    weights: Annotated[
        Path | None, typer.Option(help="The teacher's; else its checkpoint in checkpoints/.", show_default=False)
    ] = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Else cache/<dataset>.h5.", show_default=False)] = None,
    recipe: RecipeName = None,
    settings: Settings = None,
    images: Annotated[
        bool, typer.Option("--images", help="Keep the pixels, too: stage two then needs no dataset.")
    ] = False,
    random_pool: Annotated[
        int | None,
        typer.Option(metavar="P", min=1, help="Label P random images, too, for students without the teacher."),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(metavar="V", help="Store V views of each training image, moved and mirrored, for students."),
    ] = None,
    train_teacher: Annotated[
        bool,
        typer.Option("--train-teacher", help="Train the teacher first, if it has no weights and none are published."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another cache of the same name.")] = False,
    download: Download = False,
) -> None:
    """Stage one: run the teacher once over a dataset."""
    from tspipe.data import datasets
    from tspipe.extraction import extract
    from tspipe.recipes import load as recipes
    from tspipe.training import teacher_weights as teachers
    from tspipe.training.train_teacher import TeacherConfig
    from tspipe.utils import distributed

    name = recipe or recipes.default_recipe(dataset)
    flags = {"dataset": dataset, "teacher.network": teacher, "views.count": views}
    with distributed.group() as group:
        with group.first():
            chosen = recipes.load(name, settings or (), flags)
            stated = datasets.parse(dataset, data)[1]
            config = TeacherConfig(chosen, data, download=download)
            again = {"--teacher": teacher, "--data": data, "--recipe": recipe}
            command = teachers.teacher_command(dataset, again, settings or ())
            found = teachers.obtain_weights(config, stated, weights, train_teacher and not group.rank, command)
            chosen = recipes.load(name, settings or (), flags, teachers.recorded_settings(found))
            usual = recipes.load(name, flags={"dataset": dataset}).teacher.network
            out = out or extract.cache_path(stated, chosen.teacher.network, usual)
        if not group.rank:
            teachers.print_teacher(found, chosen.teacher.network, stated)
        wanted = extract.ExtractConfig(chosen, found, out, data, force, download, images, random_pool or 0)
        made = extract.extract(wanted, group)
    if made is not None:
        commands.info(str(made.path))
        say("Next: " + " ".join(["tspipe student --cache", str(out), *_needed_again(wanted, dataset, name)]))


@app.command()
def student(
    cache: Annotated[str, typer.Option(help="The file stage one wrote, or its URL.", metavar="FILE|URL")],
    student: Annotated[
        list[str] | None, typer.Option(help="A network; repeatable. Else the recipe's.", show_default=False)
    ] = None,
    loss: Annotated[
        list[str] | None, typer.Option(help="ts, kd, vid or a file ./mine.py; repeatable.", show_default=False)
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train all arms: alone, taught, taught + random images.")
    ] = False,
    random_images: Annotated[int | None, typer.Option(help="Added to every batch.", show_default=False)] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds.", show_default=False)] = None,
    epochs: Annotated[int | None, typer.Option(help="Else the recipe's.", show_default=False)] = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; else one in runs/.", show_default=False)] = None,
    recipe: RecipeName = None,
    settings: Settings = None,
    download: Download = False,
    trust_data: Annotated[
        bool, typer.Option("--trust-data", help="Do not compare the images with the cache's; the run says so.")
    ] = False,
) -> None:
    """Stage two: train students against a cache."""
    from tspipe.cache import open_cache
    from tspipe.experiments import report
    from tspipe.recipes.load import recipe_for_cache
    from tspipe.training import trainer as train_students
    from tspipe.training.arms import select_arms
    from tspipe.training.config import StudentConfig
    from tspipe.utils import distributed

    flags = {"student": student or None, "loss": loss or None, "epochs": epochs, "seeds": seeds}
    flags["random_images"] = random_images
    with distributed.group() as group:
        with group.first():
            opened = open_cache(local(cache))
            chosen, usual = recipe_for_cache(cache, opened.manifest, recipe, settings, flags)
            arms = select_arms(compare, chosen)
        config = StudentConfig(chosen, opened, arms, data or usual, out, download, trust_data)
        run = train_students.train_students(config, group)
    if not group.rank:
        report.show(run)


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help="table1, table2 or table3.", show_default=False)],
    students: Annotated[
        str | None, typer.Option(metavar="A,B", help="Some of the table's students.", show_default=False)
    ] = None,
    arms: Annotated[
        str | None, typer.Option(metavar="A,B", help="Some of alone, own, taught, random.", show_default=False)
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Else the paper's 200.", show_default=False)] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds; else one.", show_default=False)] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="[NAME=]DATASET", help="What stands for the paper's.", show_default=False),
    ] = None,
    data: Data = None,
    weights: Annotated[Path | None, typer.Option(help="The teacher's.", show_default=False)] = None,
    cache: Annotated[Path | None, typer.Option(help="A finished cache; else it is made.", show_default=False)] = None,
    recipe: Annotated[str | None, typer.Option(help="Laid upon the table's: strong.", show_default=False)] = None,
    settings: Settings = None,
    download: Download = False,
) -> None:
    """Run an experiment of the paper, and set its numbers beside the paper's."""
    from tspipe.experiments import figures, report
    from tspipe.experiments import reproduce as job
    from tspipe.utils import distributed

    figures.check()
    some, of_arms = (tuple(text.split(",")) if text else () for text in (students, arms))
    where = dataset, data, weights, cache, recipe
    config = job.TableConfig(table, some, of_arms, epochs, seeds, *where, tuple(settings or ()), download)
    with distributed.group() as group:
        runs = job.reproduce(config, group)
    if not group.rank:
        report.make(runs)


@app.command()
def bench(
    cache: Annotated[str, typer.Option(help="The file stage one wrote, or its URL.", metavar="FILE|URL")],
    student: Annotated[
        list[str] | None, typer.Option(help="A network; repeatable. Else the recipe's.", show_default=False)
    ] = None,
    data: Data = None,
    recipe: RecipeName = None,
    settings: Settings = None,
    seconds: Annotated[float, typer.Option(min=1, help="About how long; more where one step takes seconds.")] = 120,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """What the cache saves on this machine, each time beside its floor."""
    import json

    from tspipe.cache import open_cache
    from tspipe.cli.render import show_bench
    from tspipe.experiments import bench as stage
    from tspipe.recipes.load import recipe_for_cache
    from tspipe.training.config import StudentConfig

    opened = open_cache(local(cache))
    chosen, usual = recipe_for_cache(cache, opened.manifest, recipe, settings, {"student": student or None})
    result = stage.bench(StudentConfig(chosen, opened, data=data or usual), seconds).as_json()
    if json_:
        print(json.dumps(result, indent=2))
    else:
        show_bench(result)


for command in (commands.info, commands.verify, commands.diff, commands.push, commands.pull, commands.report):
    app.command()(command)
app.command("list")(commands.list_)


def main() -> None:
    """The console command: an error of tspipe's is one red panel and exit code 1."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C
            print("Stopped. Run the same command again: what it keeps on the way is kept.", file=sys.stderr)
        raise
    except Exception as problem:
        text = _sentence(problem)
        if text is None or "--debug" in sys.argv:
            raise
        if isinstance(problem, OtherProcessFailed):  # the other has the panel
            print(problem, file=sys.stderr)
            sys.exit(1)
        from rich.panel import Panel
        from rich.text import Text

        from tspipe.utils.console import plain
        from tspipe.utils.progress import console

        console.print(Panel(Text(plain(text)), title="Error", title_align="left", border_style="red"))
        sys.exit(1)
    finally:
        gc.freeze()  # at its end Python would look through all that was imported: 40 ms, 0.6 s with torch


def _sentence(problem: Exception) -> str | None:
    """What to tell a person of an error that is not a bug; None of one that is."""
    if isinstance(problem, TspipeError | OSError):
        return str(problem)
    # PyTorch's own is a RuntimeError on the CPU, and of a class that is not imported here on a GPU.
    if isinstance(problem, MemoryError) or "out of memory" in str(problem) or "can't allocate" in str(problem):
        return (
            "Out of memory. Stage one takes less with --set compute.batch_size=N, training with --set batch_size=N "
            "(teacher.batch_size), and images stay on the disk with --set memory=SIZE."
        )
    return None


def _needed_again(wanted: "ExtractConfig", dataset: str, recipe: str) -> list[str]:
    """The flags stage two needs because the cache names neither folders nor files of code, and to use its pool."""
    from tspipe.data import datasets
    from tspipe.utils import plugins

    where, network = wanted.data or datasets.parse(dataset, wanted.data)[2], wanted.recipe.teacher.network
    flags = ["--data", shlex.quote(str(where))] if where and not wanted.images else []
    if plugins.is_file(dataset):
        flags += ["--recipe", recipe, f"--set dataset={shlex.quote(dataset)}"]
    if plugins.is_file(network):
        flags += [f"--set teacher.network={shlex.quote(network)}"]
    if wanted.random_pool:
        flags += ["--set random_source=pool"]
    return flags


if __name__ == "__main__":
    main()
