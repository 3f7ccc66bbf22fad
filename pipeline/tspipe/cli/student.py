"""The commands on students: train them, report them, reproduce the paper, measure what a cache saves."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tspipe.cli import options
from tspipe.cli.share import local_path


def student(
    cache: options.CacheToTrainOn,
    student: options.Students = None,
    loss: options.Losses = None,
    match: options.Match = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train all arms: alone, taught, taught + random images.")
    ] = False,
    arms: options.Arms = None,
    random_images: Annotated[int | None, typer.Option(help="Random images added to every batch.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds (default: the recipe's).")] = None,
    epochs: options.Epochs = None,
    teacher: options.TeacherFile = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="imagenet|FILE|URL",
            help="Weights to start from: published ones, or a file's (default: the recipe's).",
        ),
    ] = None,
    data: options.Data = None,
    unlabelled: options.Unlabelled = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: one in runs/).")] = None,
    recipe: options.Recipe = None,
    settings: options.Settings = None,
    download: options.Download = False,
    trust_data: Annotated[
        bool, typer.Option("--trust-data", help="Do not compare the images with the cache's; the run records it.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Stage two: train students against a cache."""
    from tspipe.cache import open_cache
    from tspipe.experiments import report
    from tspipe.recipes.load import recipe_for_cache
    from tspipe.training import trainer
    from tspipe.training.arms import named_arms, select_arms
    from tspipe.training.config import LocalInputs, StudentConfig, starts_from_weights
    from tspipe.training.source_selection import without_live_teacher
    from tspipe.utils import distributed
    from tspipe.utils.progress import warn

    flags: dict[str, Any] = {"student": student or None, "loss": loss or None, "epochs": epochs, "seeds": seeds}
    flags |= {"random_images": random_images, "teacher.network": teacher, "init": init, "match": match}
    with distributed.group() as group:
        with group.rank_zero_first():
            opened = open_cache(local_path(cache))
            pretrained = partial(starts_from_weights, cache=opened, download=download)
            chosen, default_folder = recipe_for_cache(
                cache, opened.manifest, recipe, settings, flags, pretrained=pretrained
            )
            if random_images is None and not any(setting.startswith("random_") for setting in settings or ()):
                chosen, remark = without_live_teacher(chosen, opened)
                if remark and not group.rank:
                    warn(remark)
            selected = named_arms(arms, chosen) if arms else select_arms(compare, chosen)
        inputs = LocalInputs(data or default_folder, unlabelled, download, trust_data)
        run = trainer.train_students(StudentConfig(chosen, opened, selected, inputs, out), group)
    if not group.rank:
        report.show(run)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished runs.")],
    out: Annotated[Path | None, typer.Option(help="Output folder (default: the run's, or one in reports/).")] = None,
) -> None:
    """Write tables, figures and an HTML page of finished runs."""
    from tspipe.experiments import report as reports
    from tspipe.experiments.results import open_run

    reports.make([open_run(path) for path in {path.resolve(): path for path in runs}.values()], out)


def reproduce(
    table: Annotated[str, typer.Argument(help="table1, table2 or table3.")],
    students: Annotated[str | None, typer.Option(metavar="A,B", help="Some of the table's students.")] = None,
    arms: options.Arms = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs (default: the paper's 200).")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds (default: 1).")] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="[NAME=]DATASET", help="A dataset in place of the paper's.")
    ] = None,
    data: options.Data = None,
    weights: Annotated[Path | None, typer.Option(help="The teacher's weights.")] = None,
    cache: Annotated[Path | None, typer.Option(help="A finished cache (default: make one).")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe on top of the table's, such as strong.")] = None,
    settings: options.Settings = None,
    download: options.Download = False,
) -> None:
    """Run an experiment of the paper, and compare the results with the paper's."""
    from tspipe.experiments import figures
    from tspipe.experiments import report as reports
    from tspipe.experiments import reproduce as job
    from tspipe.utils import distributed

    figures.check()
    chosen_students = tuple(students.split(",")) if students else ()
    sources = dataset, data, weights, cache, recipe
    config = job.TableConfig(table, chosen_students, arms, epochs, seeds, *sources, tuple(settings or ()), download)
    with distributed.group() as group:
        runs = job.reproduce(config, group)
    if not group.rank:
        reports.make(runs)


def bench(
    cache: options.CacheToTrainOn,
    student: options.Students = None,
    teacher: options.TeacherFile = None,
    data: options.Data = None,
    recipe: options.Recipe = None,
    settings: options.Settings = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="About how long to measure; longer if one step takes seconds.")
    ] = 120,
    floor: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also time whole commands beside your own training loop, such as bare_loop.py."
        ),
    ] = None,
    json_: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure what a cache saves on this machine."""
    import json
    from dataclasses import asdict

    from tspipe.cache import open_cache
    from tspipe.cli.render import show_bench
    from tspipe.experiments import bench as stage
    from tspipe.recipes.load import recipe_for_cache
    from tspipe.training.config import LocalInputs, StudentConfig

    opened = open_cache(local_path(cache))
    flags = {"student": student or None, "teacher.network": teacher}
    chosen, default_folder = recipe_for_cache(cache, opened.manifest, recipe, settings, flags)
    config = StudentConfig(chosen, opened, inputs=LocalInputs(data or default_folder))
    same: list[str] = [] if recipe is None else ["--recipe", recipe]
    same += [*(["--data", str(data)] if data else []), *(f"--set={setting}" for setting in settings or ())]
    result = asdict(stage.bench(config, seconds, stage.Floor(floor, same) if floor else None))
    if json_:
        print(json.dumps(result, indent=2))
    else:
        show_bench(result)
