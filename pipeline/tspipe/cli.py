"""The command line: flags to one frozen config to one stage.

Stages are imported inside the commands, so that `tspipe --help` answers at once.
"""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tspipe import commands
from tspipe.commands import RecipeName, Settings, local, recipe_of, say
from tspipe.errors import NetworkError, OtherProcessFailed, TspipeError

if TYPE_CHECKING:
    from tspipe.extract import ExtractConfig
    from tspipe.train_teacher import TeacherConfig
    from tspipe.weights import Weights

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
    from tspipe import networks
    from tspipe import recipe as recipes
    from tspipe import weights as weight_files
    from tspipe.train_teacher import TeacherConfig

    start = weight_files.read(weights) if weights else None
    flags = {"dataset": dataset, "teacher.network": teacher, "teacher.epochs": epochs}
    name = recipe or recipes.of_dataset(dataset)
    chosen = recipes.load(name, settings or (), flags)
    if start and start.metadata.get("network") == networks.stated_name(chosen.teacher.network):
        chosen = recipes.load(name, settings or (), flags, _stated(start))
    _train_teacher(TeacherConfig(chosen, data, start, out, force, download))


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
    from tspipe import datasets, distributed, extract
    from tspipe import recipe as recipes
    from tspipe import train_teacher as stage
    from tspipe import weights as weight_files

    name = recipe or recipes.of_dataset(dataset)
    flags = {"dataset": dataset, "teacher.network": teacher, "views.count": views}
    with distributed.group() as group:
        with group.first():
            chosen = recipes.load(name, settings or (), flags)
            stated = datasets.parse(dataset, data)[1]
            path = weights or stage.find_checkpoint(stated, chosen.teacher.network)
            if path is None:
                config = stage.TeacherConfig(chosen, data, download=download)
                again = {"--dataset": dataset, "--teacher": teacher, "--data": data, "--recipe": recipe}
                path = _no_weights(config, stated, train_teacher and not group.rank, again, settings)
            found = weight_files.read(path)
            _check_network(found, chosen.teacher.network)
            chosen = recipes.load(name, settings or (), flags, _stated(found))
            usual = recipes.load(name).teacher.network
            out = out or extract.cache_path(stated, chosen.teacher.network, usual)
        if not group.rank:
            sha256 = found.sha256[:12]
            say(f"Teacher {chosen.teacher.network} with the weights {path} (SHA-256 {sha256}…) over {stated}")
        wanted = extract.ExtractConfig(chosen, found, out, data, force, download, images, random_pool or 0)
        made = extract.extract(wanted, group)
    if made is not None:
        commands.info(str(made.path))
        say("Next: " + " ".join(["tspipe student --cache", str(out), *_needed_again(wanted, dataset, name)]))


def _no_weights(
    config: "TeacherConfig", dataset: str, train: bool, flags: dict[str, Any], settings: list[str] | None
) -> Path:
    """Train a teacher that has no weights where that may be done, and give their path; else say how to get them."""
    from tspipe import networks
    from tspipe import train_teacher as stage

    network = config.recipe.teacher.network
    path = stage.checkpoint_path(dataset, network)
    if networks.published(network, dataset) or not train:
        words = ["tspipe", "teacher"]
        words += [word for flag, value in flags.items() if value for word in (flag, str(value))]
        words += [word for setting in settings or () for word in ("--set", setting)]
        raise NetworkError(
            f"There are no weights for {network} on {dataset}: {path} does not exist. "
            + stage.how_to_get(config, shlex.join(words))
        )
    say(f"{network} has no weights for {dataset} yet, so it is trained first.")
    _train_teacher(replace(config, out=path))
    return path


@app.command()
def student(
    cache: Annotated[str, typer.Option(help="The file stage one wrote, or its URL.", metavar="FILE|URL")],
    student: Annotated[
        list[str] | None, typer.Option(help="A network; repeatable. Else the recipe's.", show_default=False)
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
    from tspipe import distributed, learner, report, train_students
    from tspipe.cache import open_cache

    flags = {"student": student or None, "random_images": random_images, "seeds": seeds, "epochs": epochs}
    with distributed.group() as group:
        with group.first():
            opened = open_cache(local(cache))
            chosen, usual = recipe_of(cache, opened.manifest, recipe, settings, flags)
            arms = learner.arms(compare, chosen)
        config = train_students.StudentConfig(chosen, opened, arms, data or usual, out, download, trust_data)
        run = train_students.train_students(config, group)
    if not group.rank:
        report.show(run)


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

    from tspipe import bench as stage
    from tspipe.cache import open_cache
    from tspipe.show import show_bench
    from tspipe.train_students import StudentConfig

    opened = open_cache(local(cache))
    chosen, usual = recipe_of(cache, opened.manifest, recipe, settings, {"student": student or None})
    result = stage.as_json(stage.bench(StudentConfig(chosen, opened, data=data or usual), seconds))
    if json_:
        print(json.dumps(result, indent=2))
    else:
        show_bench(result)


for command in (commands.info, commands.verify, commands.diff, commands.push, commands.pull):
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

        from tspipe.progress import console
        from tspipe.show import plain

        console.print(Panel(Text(plain(text)), title="Error", title_align="left", border_style="red"))
        sys.exit(1)


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


def _check_network(found: "Weights", network: str) -> None:
    """Weights that tspipe wrote say of which network they are."""
    from tspipe import networks

    stated = found.metadata.get("network")
    if "identity" in found.metadata and stated != networks.stated_name(network):
        raise NetworkError(f"{found.source} holds the weights of {stated}, not of {network}: use --teacher {stated}")


def _needed_again(wanted: "ExtractConfig", dataset: str, recipe: str) -> list[str]:
    """The flags stage two needs because the cache names neither folders nor files of code, and to use its pool."""
    from tspipe import datasets, plugins

    where, network = wanted.data or datasets.parse(dataset, wanted.data)[2], wanted.recipe.teacher.network
    flags = ["--data", shlex.quote(str(where))] if where and not wanted.images else []
    if plugins.is_file(dataset):
        flags += ["--recipe", recipe, f"--set dataset={shlex.quote(dataset)}"]
    if plugins.is_file(network):
        flags += [f"--set teacher.network={shlex.quote(network)}"]
    if wanted.random_pool:
        flags += ["--set random_source=pool"]
    return flags


def _stated(found: "Weights | None") -> dict[str, dict[str, Any]]:
    """What a checkpoint of tspipe's says of itself, by section of the recipe; nothing of any other file."""
    import json

    if found is None or "preprocess" not in found.metadata:
        return {}
    try:
        stated = {"preprocess": dict(json.loads(found.metadata["preprocess"]))}
        if "options" in found.metadata:
            stated["teacher"] = {"options": dict(json.loads(found.metadata["options"]))}
    except (TypeError, ValueError):
        raise NetworkError(f"{found.source}: its metadata is damaged. Train it again with `tspipe teacher`.") from None
    return stated


def _train_teacher(config: "TeacherConfig") -> None:
    from tspipe.train_teacher import train_teacher

    trained = train_teacher(config)
    say(f"Test accuracy {100 * trained.accuracy:.2f} %. The weights are in {trained.path}")


if __name__ == "__main__":
    main()
