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
from tspipe.extraction.extract import Contents, ExtractConfig, cache_path, extract
from tspipe.models import networks
from tspipe.recipes import load
from tspipe.recipes.load import recipe_for_cache
from tspipe.recipes.schema import Overrides, Paper, Recipe
from tspipe.training import arms, teacher_weights
from tspipe.training.config import LocalInputs, StudentConfig, check_names
from tspipe.training.run_folder import RunFolder
from tspipe.training.train_teacher import TeacherConfig, find_checkpoint
from tspipe.training.trainer import train_students
from tspipe.utils.console import echo, pluralize
from tspipe.utils.distributed import ALONE, Group
from tspipe.utils.plugins import is_file, unknown

TABLES = {"table1": ("table1",), "table2": ("table2_cifar10", "table2_cifar100"), "table3": ("table3",)}
POOL = 50_000  # random images, where a recipe takes them from a pool: 280 batches of 178


@dataclass(frozen=True)
class TableConfig:
    """The configuration of `tspipe reproduce`.

    Attributes:
        table: one of `TABLES`.
        students: some of the table's; all if empty.
        arms: some of the table's, as `training.arms.named_arms` takes them; None for all.
        epochs: in place of the paper's; the learning-rate schedule is shortened in proportion.
        dataset: a dataset in place of the paper's; `cifar10=folder:photos` names which one, and runs that part only.
        recipe: a recipe on top of the table's, such as `strong`.
        cache: a finished cache; None to make one.
    """

    table: str
    students: tuple[str, ...] = ()
    arms: str | None = None
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
    """A part of a table on one dataset: its recipe, the recipes to load, and the dataset to use."""

    name: str
    recipes: str
    dataset: str


def reproduce(config: TableConfig, group: Group = ALONE) -> list[RunFolder]:
    """Make what a table needs and does not exist yet, train its cohorts, and return their run folders.

    Raises RecipeError for an unknown table, part, arm or student, and what the stages raise.
    """
    with group.rank_zero_first():
        selected = parts(config)
        for part in selected:  # errors that can be detected now must not wait for hours of stage one
            recipe = load.load(part.recipes, config.settings, {"student": list(config.students) or None})
            arms.named_arms(config.arms, recipe)
            check_names(recipe)
            for student in recipe.student:
                networks.check_exists(student)
            for loss in recipe.loss:
                losses.build(loss, losses.Sizes(8, 8, 8), recipe.stated_loss_options(loss))
            if not group.rank:
                _print_work(config, part, recipe)
    caches = [config.cache or _cache(config, part, group) for part in selected]
    with group.rank_zero_first():
        jobs = [_job(config, part, open_cache(path)) for part, path in zip(selected, caches, strict=True)]
    images = [len(job.cache.train.labels) * job.recipe.epochs * job.recipe.seeds for job in jobs]
    runs: list[RunFolder] = []
    for i, job in enumerate(jobs):
        if not group.rank:
            _announce(job, selected[i])
        offset = (sum(images[:i]), sum(images[i + 1 :]))
        run = train_students(replace(job, progress_offset=offset), group)
        if not group.rank and job.recipe.paper:
            _record_paper(run, job.recipe.paper)
        runs.append(run)
    return runs


def _print_work(config: TableConfig, part: Part, recipe: Recipe) -> None:
    """Print what a part takes: the passes of the teacher and the steps of the students."""
    if config.cache:
        rows = open_cache(config.cache).manifest["dataset"]["rows"]
        teacher = f"the teacher's outputs are in {config.cache.name}"
    else:
        dataset = datasets.open_dataset(part.dataset, config.data, download=config.download, split=recipe.split)
        rows = {split: len(dataset.split(split)) for split in dataset.splits}
        images = rows["train"] * max(1, recipe.views.count) + rows["test"]
        teacher = f"{networks.recorded_name(recipe.teacher.network)} runs on {images:,} images"
    selected = arms.named_arms(config.arms, recipe)
    learners = len(recipe.student) * sum(len(arms.arm_losses(arm, recipe.loss)) for arm in selected)
    learners *= config.seeds or recipe.seeds
    epochs = config.epochs or recipe.epochs
    steps = learners * epochs * -(-rows["train"] // recipe.batch_size)
    title = recipe.paper.title if recipe.paper else part.name
    echo(
        f"{title}: {teacher}; {pluralize(learners, 'student')} of {pluralize(epochs, 'epoch')} take {steps:,} steps of "
        f"{recipe.batch_size} images{_random_work(recipe, selected)}"
    )


def _random_work(recipe: Recipe, selected: tuple[str, ...]) -> str:
    """Say how many random images the steps have, and whether the teacher labels them during training."""
    if not recipe.random_images or arms.RANDOM not in selected:
        return ""
    live = ", which the teacher labels live" if recipe.random_source == "live" else ""
    return f", some with {recipe.random_images} random images more{live}"


def parts(config: TableConfig) -> list[Part]:
    """Return the parts of the table to run."""
    if config.table not in TABLES:
        raise RecipeError(unknown("table", config.table, TABLES))
    names = {load.load(name).dataset: name for name in TABLES[config.table]}
    first, equals, other = (config.dataset or "").partition("=")
    if config.dataset is None or first in names:
        selected = {names[dataset]: other or dataset for dataset in ([first] if first else names)}
    elif equals:
        raise RecipeError(f"{config.table} does not use {first}. It uses: {', '.join(names)}.")
    else:
        selected = dict.fromkeys(names.values(), config.dataset)
    given = {"--dataset": config.dataset, "--data": config.data, "--weights": config.weights, "--cache": config.cache}
    if len(selected) > 1 and (flag := next((flag for flag, value in given.items() if value), None)):
        raise RecipeError(
            f"{config.table} has a part for each of {' and '.join(names)}, and {flag} applies to one. Name it: "
            f"--dataset {next(iter(names))}{'=' + config.dataset if config.dataset else ''}"
        )
    on_top = f",{config.recipe}" if config.recipe else ""
    return [Part(name, name + on_top, dataset) for name, dataset in selected.items()]


def _cache(config: TableConfig, part: Part, group: Group) -> Path:
    """Make a part's cache unless it is finished, after training the teacher if it has no weights."""
    flags = {"dataset": part.dataset}
    with group.rank_zero_first():
        recipe, dataset = (
            load.load(part.recipes, config.settings, flags),
            datasets.parse(part.dataset, config.data).name,
        )
        network, views = recipe.teacher.network, recipe.views.count
        pool = POOL if recipe.random_source == "pool" and arms.RANDOM in arms.named_arms(config.arms, recipe) else 0
        default = load.load(part.name if is_file(part.dataset) else load.default_recipe(part.dataset), flags=flags)
        path = cache_path(dataset, network, default.teacher.network)
        path = path.with_stem(f"{path.stem}{f'-views{views}' if views else ''}{f'-pool{pool}' if pool else ''}")
        if path.exists() and not (config.weights or find_checkpoint(dataset, network)):
            raise RecipeError(
                f"{path} exists, but the weights of its {network} do not. Use it as it is (--cache {path}), or give "
                "the weights: --weights FILE"
            )
        paths = {"--data": config.data, "--recipe": part.recipes}
        command = teacher_weights.teacher_command(part.dataset, paths, config.settings)
        training = TeacherConfig(recipe, config.data, download=config.download)
        untrained = teacher_weights.needs_training(training, dataset, config.weights, True, command)
    if group.broadcast(untrained):
        teacher_weights.train_on_rank_zero(training, dataset, group)
    with group.rank_zero_first():
        weights = teacher_weights.read_weights(training, dataset, config.weights)
        recipe = load.load(part.recipes, config.settings, flags, teacher_weights.recorded_settings(weights, network))
        if not group.rank:
            teacher_weights.print_teacher(weights, network, dataset, config.weights)
    contents = Contents(random_pool=pool)
    extract(ExtractConfig(recipe, weights, path, config.data, contents, download=config.download), group)
    return path


def _job(config: TableConfig, part: Part, cache: Cache) -> StudentConfig:
    """Return the configuration of stage two."""
    flags: dict[str, Any] = {"student": list(config.students) or None, "seeds": config.seeds}
    flags |= {"dataset": part.dataset} if is_file(part.dataset) else {}
    name = str(cache.path)
    recipe, default_folder = recipe_for_cache(name, cache.manifest, part.recipes, config.settings, flags)
    differs = _differences(config, recipe, load.load(part.name), cache)
    recipe = shortened(recipe, config.epochs or recipe.epochs)
    if recipe.paper:
        recipe = recipe.model_copy(update={"paper": recipe.paper.model_copy(update={"differs": differs})})
    folder = config.data or datasets.parse(part.dataset, config.data).folder or default_folder
    return StudentConfig(
        recipe, cache, arms.named_arms(config.arms, recipe), LocalInputs(folder, download=config.download)
    )


def _differences(config: TableConfig, recipe: Recipe, paper: Recipe, cache: Cache) -> list[str]:
    """Return how the run differs from the paper, a phrase each."""
    dataset, teacher = cache.manifest["dataset"]["name"], cache.manifest["teacher"]["network"]
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    phrases = [f"{dataset} in place of {paper.dataset}"] if dataset != paper.dataset else []
    if teacher != paper.teacher.network:
        phrases.append(f"the teacher {teacher} in place of {paper.teacher.network}")
    if config.epochs and config.epochs != paper.epochs:
        epochs = pluralize(config.epochs, "epoch")
        phrases.append(f"{epochs} in place of {paper.epochs}, with the learning-rate schedule in proportion")
    if config.recipe:
        phrases.append(f"the recipe {config.recipe}")
    if (preprocess.resize, preprocess.crop) != (paper.preprocess.resize, paper.preprocess.crop):
        phrases.append("images are resized or cropped differently")
    if recipe.views.count:
        phrases.append(f"students see {recipe.views.count} views of each training image, shifted and flipped")
    if recipe.random_source == "pool":
        phrases.append("random images from a pool that the teacher labelled once, not fresh in every batch")
    return [*phrases, *(f"--set {setting}" for setting in config.settings)]


def shortened(recipe: Recipe, epochs: int) -> Recipe:
    """Return the recipe with another number of epochs and its learning-rate schedules in proportion."""

    def scaled(schedule: Recipe | Overrides) -> dict[str, int | list[int] | None]:
        every, milestones = schedule.lr_drop_every, schedule.lr_milestones
        return {
            "lr_drop_every": every and max(1, round(every * epochs / recipe.epochs)),
            "lr_milestones": milestones and [max(1, round(after * epochs / recipe.epochs)) for after in milestones],
        }

    students = {name: student.model_copy(update=scaled(student)) for name, student in recipe.students.items()}
    alone = recipe.alone.model_copy(update=scaled(recipe.alone))
    return recipe.model_copy(update={**scaled(recipe), "epochs": epochs, "students": students, "alone": alone})


def _record_paper(run: RunFolder, paper: Paper) -> None:
    """Add the paper's numbers to the summary of a finished run."""
    summary = run.read_json("summary.json")
    if summary.get("paper") != paper.model_dump():
        run.write_json("summary.json", {**summary, "paper": paper.model_dump()})


def _announce(job: StudentConfig, part: Part) -> None:
    """Print what is trained next, and how it differs from the paper."""
    recipe, paper = job.recipe, job.recipe.paper
    title = paper.title if paper else part.name
    counts = f"{pluralize(recipe.epochs, 'epoch')}, {pluralize(recipe.seeds, 'seed')}"
    echo(f"{title}: {', '.join(recipe.student)}; {'; '.join(job.arms)}; {counts}")
    for student in recipe.student:
        if paper and student not in paper.accuracy:
            echo(f"  {student} is not in {title} of the paper")
    for difference in paper.differs if paper else []:
        echo(f"  differs from the paper: {difference}")
