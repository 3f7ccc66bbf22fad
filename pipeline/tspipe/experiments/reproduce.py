"""The tables of arXiv 2005.00393 as jobs: teacher, cache, cohort, report.

Each step resumes after a kill and skips what is finished, and so does the whole job.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tspipe import losses
from tspipe.cache import Cache, open_cache
from tspipe.data import datasets
from tspipe.data.preprocess import Preprocess
from tspipe.errors import RecipeError
from tspipe.extraction.extract import ExtractConfig, cache_path, extract
from tspipe.models import networks
from tspipe.recipes import load
from tspipe.recipes.load import recipe_for_cache
from tspipe.recipes.schema import Overrides, Paper, Recipe
from tspipe.training import arms
from tspipe.training import teacher_weights as teachers
from tspipe.training.config import StudentConfig, check_names
from tspipe.training.run_folder import RunFolder
from tspipe.training.train_teacher import TeacherConfig, find_checkpoint
from tspipe.training.trainer import train_students
from tspipe.utils.console import echo, pluralize
from tspipe.utils.distributed import ALONE, Group
from tspipe.utils.plugins import is_file, unknown

TABLES = {"table1": ("table1",), "table2": ("table2_cifar10", "table2_cifar100"), "table3": ("table3",)}
ARMS = {"alone": arms.ALONE, "own": arms.OWN, "taught": arms.TAUGHT, "random": arms.RANDOM}
POOL = 50_000  # random images, where a recipe takes them from a pool: 280 batches of 178


@dataclass(frozen=True)
class TableConfig:
    """The configuration of `tspipe reproduce`.

    Attributes:
        table: one of `TABLES`.
        students, arms: some of the table's; all if empty. Arms are named as in `ARMS`.
        epochs: in place of the paper's; the learning-rate schedule is shortened in proportion.
        dataset: a dataset in place of the paper's; `cifar10=folder:photos` names which one, and runs that part only.
        recipe: a recipe on top of the table's, such as `strong`.
        cache: a finished cache; None to make one.
    """

    table: str
    students: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    epochs: int | None = None
    seeds: int | None = None
    dataset: str | None = None
    data: Path | None = None
    weights: Path | None = None
    cache: Path | None = None
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    download: bool = False


@dataclass(frozen=True)
class Part:
    """A part of a table on one dataset: the name of its recipe, and the dataset to use."""

    name: str
    dataset: str


def reproduce(config: TableConfig, group: Group = ALONE) -> list[RunFolder]:
    """Make what a table needs and does not exist yet, train its cohorts, and return their run folders.

    Raises RecipeError for an unknown table, part, arm or student, and what the stages raise.
    """
    with group.rank_zero_first():
        selected = parts(config)
        for part in selected:  # errors that can be detected now must not wait for hours of stage one
            chosen = load.load(_recipe(config, part), config.settings, {"student": list(config.students) or None})
            arms_of(config, chosen)
            check_names(chosen)
            for student in chosen.student:
                networks.check_exists(student)
            for loss in chosen.loss:
                losses.build(loss, 8, 8, chosen.stated_loss_options(loss))
    caches = [config.cache or _cache(config, part, group) for part in selected]
    runs: list[RunFolder] = []
    with group.rank_zero_first():
        jobs = [_job(config, part, open_cache(path)) for part, path in zip(selected, caches, strict=True)]
    sizes = [_images(job) for job in jobs]
    for i, job in enumerate(jobs):
        if not group.rank:
            _announce(job, selected[i])
        offset = (sum(sizes[:i]), sum(sizes[i + 1 :]))
        run = train_students(replace(job, progress_offset=offset), group)
        if not group.rank and job.recipe.paper:
            _set_beside(run, job.recipe.paper)
        runs.append(run)
    return runs


def parts(config: TableConfig) -> list[Part]:
    """Return the parts of the table to run."""
    if config.table not in TABLES:
        raise RecipeError(unknown("table", config.table, TABLES))
    names = {load.load(name).dataset: name for name in TABLES[config.table]}
    first, equals, stand_in = (config.dataset or "").partition("=")
    if config.dataset is None or first in names:
        chosen = [first] if first else list(names)
        selected = [Part(names[dataset], stand_in or dataset) for dataset in chosen]
    elif equals:
        raise RecipeError(f"{config.table} does not use {first}. It uses: {', '.join(names)}.")
    else:
        selected = [Part(name, config.dataset) for name in names.values()]
    if len(selected) > 1 and (one := _of_one(config)):
        raise RecipeError(
            f"{config.table} has a part for each of {' and '.join(names)}, and {one} applies to one. Name it: "
            f"--dataset {next(iter(names))}{'=' + config.dataset if config.dataset else ''}"
        )
    return selected


def _of_one(config: TableConfig) -> str | None:
    """Return a given flag that applies to one part of a table, or None."""
    given = {"--dataset": config.dataset, "--data": config.data, "--weights": config.weights, "--cache": config.cache}
    return next((flag for flag, value in given.items() if value), None)


def _recipe(config: TableConfig, part: Part) -> str:
    return ",".join(name for name in (part.name, config.recipe) if name)


def arms_of(config: TableConfig, chosen: Recipe) -> tuple[str, ...]:
    """Return the arms to train, by their full names, in the paper's order."""
    available = arms.select_arms(True, chosen)
    for name in config.arms:
        if ARMS.get(name) not in available:
            short = [name for name, arm in ARMS.items() if arm in available]
            raise RecipeError(f"{config.table} has no arm {name!r}. There are: {', '.join(short)}.")
    return tuple(arm for arm in available if not config.arms or arm in {ARMS[name] for name in config.arms})


def _cache(config: TableConfig, part: Part, group: Group) -> Path:
    """Make a part's cache unless it is finished, after training the teacher if it has no weights."""
    name, flags = _recipe(config, part), {"dataset": part.dataset}
    with group.rank_zero_first():
        chosen = load.load(name, config.settings, flags)
        dataset_name, pool = datasets.parse(part.dataset, config.data).name, _pool(config, chosen)
        network = chosen.teacher.network
        path = cache_path(dataset_name, network, _usual_teacher(part))
        path = path.with_stem("-".join([path.stem, *_kinds(chosen, pool)]))
        if path.exists() and not (config.weights or find_checkpoint(dataset_name, network)):
            raise RecipeError(
                f"{path} exists, but the weights of its {network} do not. Use it as it is (--cache {path}), or give "
                "the weights: --weights FILE"
            )
        command = teachers.teacher_command(part.dataset, {"--data": config.data, "--recipe": name}, config.settings)
        training = TeacherConfig(chosen, config.data, download=config.download)
        untrained = teachers.needs_training(training, dataset_name, config.weights, True, command)
    if group.broadcast(untrained):
        teachers.train_on_rank_zero(training, dataset_name, group)
    with group.rank_zero_first():
        selected = teachers.read_weights(training, dataset_name, config.weights)
        chosen = load.load(name, config.settings, flags, teachers.recorded_settings(selected))
        if not group.rank:
            teachers.print_teacher(selected, network, dataset_name)
    extraction = ExtractConfig(chosen, selected, path, config.data, download=config.download, random_pool=pool)
    extract(extraction, group)
    return path


def _usual_teacher(part: Part) -> str:
    """Return the network whose cache is named after the dataset alone."""
    names = part.name if is_file(part.dataset) else load.default_recipe(part.dataset)
    return load.load(names, flags={"dataset": part.dataset}).teacher.network


def _pool(config: TableConfig, chosen: Recipe) -> int:
    random = arms.RANDOM in arms_of(config, chosen)
    return POOL if random and chosen.random_source == "pool" else 0


def _kinds(chosen: Recipe, pool: int) -> list[str]:
    """Return suffixes for a cache that differs from the plain one."""
    return ([f"views{chosen.views.count}"] if chosen.views.count else []) + ([f"pool{pool}"] if pool else [])


def _job(config: TableConfig, part: Part, cache: Cache) -> StudentConfig:
    """Return the configuration of stage two."""
    flags: dict[str, Any] = {"student": list(config.students) or None, "seeds": config.seeds}
    flags |= {"dataset": part.dataset} if is_file(part.dataset) else {}
    chosen, usual = recipe_for_cache(
        str(cache.path), cache.manifest, _recipe(config, part), list(config.settings), flags
    )
    paper = load.load(part.name)
    differs = _differences(config, part, chosen, paper, cache)
    chosen = shortened(chosen, config.epochs or chosen.epochs)
    if chosen.paper:
        chosen = chosen.model_copy(update={"paper": chosen.paper.model_copy(update={"differs": differs})})
    folder = datasets.parse(part.dataset, config.data).folder
    return StudentConfig(
        chosen, cache, arms_of(config, chosen), config.data or folder or usual, download=config.download
    )


def _differences(config: TableConfig, part: Part, chosen: Recipe, paper: Recipe, cache: Cache) -> list[str]:
    """Return how the run differs from the paper, a phrase each."""
    name, teacher = cache.manifest["dataset"]["name"], cache.manifest["teacher"]["network"]
    selected = [f"{name} in place of {paper.dataset}"] if name != paper.dataset else []
    if teacher != paper.teacher.network:
        selected.append(f"the teacher {teacher} in place of {paper.teacher.network}")
    if config.epochs and config.epochs != paper.epochs:
        epochs = pluralize(config.epochs, "epoch")
        selected.append(f"{epochs} in place of {paper.epochs}, with the learning-rate schedule in proportion")
    if config.recipe:
        selected.append(f"the recipe {config.recipe}")
    seen, extraction = Preprocess.from_dict(cache.manifest["preprocess"]), paper.preprocess
    if (seen.resize, seen.crop) != (extraction.resize, extraction.crop):
        selected.append("images are resized or cropped differently")
    if chosen.views.count:
        selected.append(f"students see {chosen.views.count} views of each training image, shifted and flipped")
    if chosen.random_source == "pool":
        selected.append("random images from a pool that the teacher labelled once, not fresh in every batch")
    return [*selected, *(f"--set {setting}" for setting in config.settings)]


def shortened(chosen: Recipe, epochs: int) -> Recipe:
    """Return the recipe with another number of epochs and its learning-rate schedules in proportion."""

    def scaled(how: Recipe | Overrides) -> dict[str, int | list[int] | None]:
        every, milestones = how.lr_drop_every, how.lr_milestones
        return {
            "lr_drop_every": every and max(1, round(every * epochs / chosen.epochs)),
            "lr_milestones": milestones and [max(1, round(after * epochs / chosen.epochs)) for after in milestones],
        }

    students = {name: names.model_copy(update=scaled(names)) for name, names in chosen.students.items()}
    alone = chosen.alone.model_copy(update=scaled(chosen.alone))
    return chosen.model_copy(update={**scaled(chosen), "epochs": epochs, "students": students, "alone": alone})


def _images(job: StudentConfig) -> int:
    """Return how many images a cohort trains on, over all epochs and seeds."""
    return len(job.cache.train.labels) * job.recipe.epochs * job.recipe.seeds


def _set_beside(run: RunFolder, paper: Paper) -> None:
    """Add the paper's numbers to the summary of a finished run."""
    summary = run.read_json("summary.json")
    if summary.get("paper") != (extraction := paper.model_dump()):
        run.write_json("summary.json", {**summary, "paper": extraction})


def _announce(job: StudentConfig, part: Part) -> None:
    """Print what is trained next, and how it differs from the paper."""
    chosen = job.recipe
    title, differs = (chosen.paper.title, chosen.paper.differs) if chosen.paper else (part.name, [])
    counts = f"{pluralize(chosen.epochs, 'epoch')}, {pluralize(chosen.seeds, 'seed')}"
    echo(f"{title}: {', '.join(chosen.student)}; {'; '.join(job.arms)}; {counts}")
    for student in chosen.student:
        if chosen.paper and student not in chosen.paper.accuracy:
            echo(f"  {student} is not in {title} of the paper")
    for difference in differs:
        echo(f"  differs from the paper: {difference}")
