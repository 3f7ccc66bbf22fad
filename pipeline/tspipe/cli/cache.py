"""The commands on one cache: make it, show it, check it, compare it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tspipe.cli import options
from tspipe.cli.share import StudentInputs, find_damage, local_path, student_command
from tspipe.errors import CacheDamaged
from tspipe.utils.console import echo, format_bytes

if TYPE_CHECKING:
    from tspipe.cache import Cache
    from tspipe.extraction.extract import ExtractConfig


def cache(
    dataset: options.Dataset,
    teacher: options.Teacher = None,
    weights: options.TeacherWeights = None,
    data: options.Data = None,
    split: options.Split = None,
    out: options.CacheOut = None,
    recipe: options.Recipe = None,
    settings: options.Settings = None,
    images: options.StoreImages = False,
    random_pool: options.RandomPool = None,
    unlabelled: options.Unlabelled = None,
    views: options.StoredViews = None,
    train_teacher: options.TrainTeacher = False,
    skip_broken: options.SkipBroken = False,
    portable_teacher: options.PortableTeacher = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another cache of the same name.")] = False,
    download: options.Download = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Stage one: run the teacher once over a dataset."""
    from dataclasses import replace
    from functools import partial

    from tspipe.data import datasets
    from tspipe.experiments import report
    from tspipe.extraction import extract
    from tspipe.recipes import load as recipes
    from tspipe.training import teacher_weights as teachers
    from tspipe.training.train_teacher import TeacherConfig
    from tspipe.utils import distributed

    name = recipe or recipes.default_recipe(dataset)
    flags = {"dataset": dataset, "teacher.network": teacher, "views.count": views, "split.fraction": split}
    load = partial(recipes.load, name, settings or (), flags)
    with distributed.group() as group:
        with group.rank_zero_first():
            config = TeacherConfig(load(), data, download=download)
            dataset_name = datasets.parse(dataset, data).name
            repeated = {"--teacher": teacher, "--data": data, "--split": split, "--recipe": recipe}
            command = teachers.teacher_command(dataset, repeated, settings or ())
            untrained = teachers.needs_training(config, dataset_name, weights, train_teacher, command)
            if untrained:
                config = replace(config, recipe=teachers.load_recipe(load, None, config))
        if group.broadcast(untrained) and (trained := teachers.train_on_rank_zero(config, dataset_name, group)):
            report.show_teacher(trained, config.recipe.teacher.network, dataset_name)
        with group.rank_zero_first():
            teacher_weights = teachers.read_weights(config, dataset_name, weights, skip_broken=skip_broken)
            without_views = {"views.count": 0} if images else {}  # pixels are kept cropped, and a view needs the rest
            chosen = teachers.load_recipe(load, teacher_weights, config, without_views)
            default_network = recipes.load(name, flags={"dataset": dataset}).teacher.network
            out = out or extract.cache_path(dataset_name, chosen.teacher.network, default_network)
        if not group.rank:
            teachers.print_teacher(teacher_weights, chosen.teacher.network, dataset_name, weights)
        contents = extract.Contents(images, random_pool or 0, unlabelled, portable_teacher)
        extraction = extract.ExtractConfig(chosen, teacher_weights, out, data, contents, force, download, skip_broken)
        finished = extract.extract(extraction, group)
    if finished is not None:
        _show_finished(finished, student_command(finished, str(out), _student_inputs(extraction, recipe)))


def _show_finished(finished: "Cache", next_command: str) -> None:
    info(str(finished.path))
    if finished.manifest["views"]:
        echo(options.VIEWS_ADVICE)
    if finished.random is not None:
        from tspipe.cli.render import show_scores
        from tspipe.extraction.score_kinds import stored_scores

        show_scores(stored_scores(finished), finished.classes)
    echo(f"Next: {next_command}")


def info(file: options.FileOrUrl) -> None:
    """Show what a cache holds; of a URL, only the head of the file is read."""
    from tspipe.cache import open_cache
    from tspipe.cache.address import is_url
    from tspipe.cli.render import show_cache

    if is_url(file):
        from tspipe.cache.peek import peek

        show_cache(peek(file))
    else:
        show_cache(open_cache(file))


def verify(
    file: options.File,
    folder: Annotated[Path | None, typer.Argument(help="The dataset's folder (default: data/<name>).")] = None,
    data: Annotated[bool, typer.Option("--data", help="Compare every image of the dataset with the cache.")] = False,
    teacher: Annotated[int, typer.Option(metavar="N", min=0, help="Run the teacher again on N random images.")] = 0,
    repair: Annotated[bool, typer.Option("--repair", help="Compute damaged rows again and restore them.")] = False,
    weights: Annotated[
        Path | None, typer.Option(help="The teacher's weights, if the cache's are missing or damaged.")
    ] = None,
    unlabelled: options.Unlabelled = None,
    recipe: options.Recipe = None,
    settings: options.Settings = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Check every byte of a cache, and repair it."""
    from tspipe.cache import open_cache
    from tspipe.cache.inspect import inspect
    from tspipe.cache.verify import explain
    from tspipe.recipes.load import recipe_for_cache
    from tspipe.utils.files import remove_stale_lock

    damage = find_damage(file)
    if damage and not repair:
        raise CacheDamaged(explain(file, damage))
    if data or teacher or damage:
        from tspipe.extraction import verify as stage
        from tspipe.models import weights as weight_files

        manifest = inspect(file, identified=False).manifest
        chosen, default_folder = recipe_for_cache(str(file), manifest, recipe, settings, {})
        given = weight_files.read(weights, chosen.teacher.weights_key) if weights else None
        config = stage.VerifyConfig(chosen, folder or default_folder, given, unlabelled)
    while damage:
        stage.repair(file, damage, config)
        echo("Repaired: " + "; ".join(part.where for part in damage))
        before, damage = damage, find_damage(file)  # one damage may have hidden another
        if damage == before:
            raise CacheDamaged(explain(file, damage))
    if repair:
        remove_stale_lock(file)
    opened = open_cache(file)
    images = sum(opened.manifest["dataset"]["rows"].values())
    echo(f"{file} is intact: {images:,} images, {format_bytes(file.stat().st_size)}, id {opened.id[:12]}")
    if data:
        echo(f"All {stage.match_data(opened, config):,} images are those of the local dataset.")
    if teacher:
        stage.show(stage.compare_teacher(opened, config, teacher))


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A feature cache, or its URL.")],
    second: Annotated[str, typer.Argument(metavar="B", help="A feature cache to compare it with.")],
) -> None:
    """Show how two caches differ; the exit code is 0 if they do not, else 1."""
    from tspipe.cache import open_cache
    from tspipe.cache.diff import compare
    from tspipe.cli.render import show_diff

    difference = compare(open_cache(local_path(first)), open_cache(local_path(second)))
    show_diff(difference)
    if not difference.same:
        raise typer.Exit(1)


def _student_inputs(extraction: "ExtractConfig", recipe: str | None) -> StudentInputs:
    """Return what stage two needs beside the cache: folders, Python files and the recipe."""
    from tspipe.data import datasets
    from tspipe.utils import plugins

    dataset, network, contents = extraction.recipe.dataset, extraction.recipe.teacher.network, extraction.contents
    more = []
    if contents.unlabelled:
        more += [] if contents.images else ["--unlabelled", str(contents.unlabelled)]
        more += ["--set", f"unlabelled_images={extraction.recipe.batch_size}"]
    folder = extraction.data or datasets.parse(dataset, extraction.data).folder
    return StudentInputs(
        data=str(folder) if folder else None,
        recipe=recipe,
        dataset=dataset if plugins.is_file(dataset) else None,
        teacher=network if plugins.is_file(network) or network.startswith("hub:") else None,
        more=more,
    )
