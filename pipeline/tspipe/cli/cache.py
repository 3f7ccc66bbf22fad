"""The commands on one cache: make it, show it, check it, compare it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tspipe.cli.options import (
    Data,
    Dataset,
    Download,
    File,
    FileOrUrl,
    RandomPool,
    RecipeName,
    Settings,
    StoreImages,
    Teacher,
    TrainTeacher,
    Views,
)
from tspipe.cli.share import damage_error, find_damage, local_path, say

if TYPE_CHECKING:
    from tspipe.extraction.extract import ExtractConfig


def cache(
    dataset: Dataset,
    teacher: Teacher = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="The teacher's weights (default: its file in checkpoints/).", show_default=False),
    ] = None,
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(help="Output file (default: cache/<dataset>.h5).", show_default=False)
    ] = None,
    recipe: RecipeName = None,
    settings: Settings = None,
    images: StoreImages = False,
    random_pool: RandomPool = None,
    views: Views = None,
    train_teacher: TrainTeacher = False,
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
        with group.rank_zero_first():
            chosen = recipes.load(name, settings or (), flags)
            dataset_name = datasets.parse(dataset, data).name
            config = TeacherConfig(chosen, data, download=download)
            repeated = {"--teacher": teacher, "--data": data, "--recipe": recipe}
            command = teachers.teacher_command(dataset, repeated, settings or ())
            untrained = teachers.needs_training(config, dataset_name, weights, train_teacher, command)
        if group.broadcast(untrained):
            teachers.train_on_rank_zero(config, dataset_name, group)
        with group.rank_zero_first():
            teacher_weights = teachers.read_weights(config, dataset_name, weights)
            chosen = recipes.load(name, settings or (), flags, teachers.recorded_settings(teacher_weights))
            default_network = recipes.load(name, flags={"dataset": dataset}).teacher.network
            out = out or extract.cache_path(dataset_name, chosen.teacher.network, default_network)
        if not group.rank:
            teachers.print_teacher(teacher_weights, chosen.teacher.network, dataset_name)
        extraction = extract.ExtractConfig(
            chosen, teacher_weights, out, data, force, download, images, random_pool or 0
        )
        finished = extract.extract(extraction, group)
    if finished is not None:
        info(str(finished.path))
        say("Next: " + " ".join(["tspipe student --cache", str(out), *_student_flags(extraction, dataset, name)]))


def info(file: FileOrUrl) -> None:
    """Show what a cache holds; of a URL, only the head of the file is read."""
    from tspipe.cache import open_cache
    from tspipe.cache.remote import is_url
    from tspipe.cli.render import show_cache

    if is_url(file):
        from tspipe.cache.transfer import peek

        show_cache(peek(file))
    else:
        show_cache(open_cache(file))


def verify(
    file: File,
    folder: Annotated[
        Path | None, typer.Argument(help="The dataset's folder (default: data/<name>).", show_default=False)
    ] = None,
    data: Annotated[bool, typer.Option("--data", help="Compare every image of the dataset with the cache.")] = False,
    teacher: Annotated[int, typer.Option(metavar="N", min=0, help="Run the teacher again on N random images.")] = 0,
    repair: Annotated[bool, typer.Option("--repair", help="Compute damaged rows again and restore them.")] = False,
    weights: Annotated[
        Path | None,
        typer.Option(help="The teacher's weights, if the cache's are missing or damaged.", show_default=False),
    ] = None,
    recipe: RecipeName = None,
    settings: Settings = None,
) -> None:
    """Check every byte of a cache, and repair it."""
    from tspipe.cache import open_cache
    from tspipe.cache.inspect import inspect
    from tspipe.recipes.load import recipe_for_cache
    from tspipe.utils.console import format_bytes

    damage = find_damage(file)
    if damage and not repair:
        raise damage_error(file, damage)
    if data or teacher or damage:
        from tspipe.extraction import verify as stage
        from tspipe.models import weights as weight_files

        manifest = inspect(file, identified=False).manifest
        chosen, default_folder = recipe_for_cache(str(file), manifest, recipe, settings, {})
        config = stage.VerifyConfig(chosen, folder or default_folder, weight_files.read(weights) if weights else None)
    while damage:
        stage.repair(file, damage, config)
        say("Repaired: " + "; ".join(part.where for part in damage))
        before, damage = damage, find_damage(file)  # one damage may have hidden another
        if damage == before:
            raise damage_error(file, damage)
    opened = open_cache(file)
    images = sum(opened.manifest["dataset"]["rows"].values())
    say(f"{file} is intact: {images:,} images, {format_bytes(file.stat().st_size)}, id {opened.id[:12]}")
    if data:
        say(f"All {stage.match_data(opened, config):,} images are those of the local dataset.")
    if teacher:
        stage.show(stage.compare_teacher(opened, config, teacher))


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A feature cache, or its URL.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help="A feature cache to compare it with.", show_default=False)],
) -> None:
    """Show how two caches differ; the exit code is 0 if they do not, else 1."""
    from tspipe.cache import open_cache
    from tspipe.cache.diff import compare
    from tspipe.cli.render import show_diff

    difference = compare(open_cache(local_path(first)), open_cache(local_path(second)))
    show_diff(difference)
    if not difference.same:
        raise typer.Exit(1)


def _student_flags(extraction: "ExtractConfig", dataset: str, recipe: str) -> list[str]:
    """Return the flags stage two needs, because the cache names no folders and no code, and to use its pool."""
    from tspipe.data import datasets
    from tspipe.utils import plugins

    folder = extraction.data or datasets.parse(dataset, extraction.data).folder
    network = extraction.recipe.teacher.network
    flags = ["--data", shlex.quote(str(folder))] if folder and not extraction.images else []
    if plugins.is_file(dataset):
        flags += ["--recipe", recipe, f"--set dataset={shlex.quote(dataset)}"]
    if plugins.is_file(network):
        flags += [f"--set teacher.network={shlex.quote(network)}"]
    if extraction.random_pool:
        flags += ["--set random_source=pool"]
    return flags
