"""The tables of arXiv 2005.00393 as jobs over the two stages: teacher, cache, cohort, report, one after the other.

Each part goes on where it was killed and finds what is finished, so that the whole does, too.
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
from tspipe.utils.console import counted, say
from tspipe.utils.distributed import ALONE, Group
from tspipe.utils.plugins import is_file, unknown

TABLES = {"table1": ("table1",), "table2": ("table2_cifar10", "table2_cifar100"), "table3": ("table3",)}
ARMS = {"alone": arms.ALONE, "own": arms.OWN, "taught": arms.TAUGHT, "random": arms.RANDOM}
POOL = 50_000  # random images, where a recipe takes them from a pool: 280 batches of 178


@dataclass(frozen=True)
class TableConfig:
    """What `tspipe reproduce` was asked for.

    Attributes:
        table: one of `TABLES`.
        students, arms: which of the table's; none for all. Arms are called as in `ARMS`.
        epochs: in place of the paper's; the learning rate's schedule is shortened in proportion.
        dataset: what stands for the paper's dataset; `cifar10=folder:photos` says for which, and runs that part only.
        recipe: what is laid upon the table's own, as `strong`.
        cache: a finished one, in place of making it.
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
    """A part of a table, on one dataset: its recipe's name, and that of what stands for its dataset."""

    name: str
    dataset: str


def reproduce(config: TableConfig, group: Group = ALONE) -> list[RunFolder]:
    """Make what a table needs and is not there yet, train its cohorts, and give their run folders.

    Raises RecipeError for a table, a part, an arm or a student that there is not, and what the stages raise.
    """
    with group.first():
        found = parts(config)
        for part in found:  # what can be known to be wrong is said now, not after hours of stage one
            chosen = load.load(_recipe(config, part), config.settings, {"student": list(config.students) or None})
            arms_of(config, chosen)
            check_names(chosen)
            for student in chosen.student:
                networks.check_exists(student)
            for loss in chosen.loss:
                losses.build(loss, 8, 8, chosen.stated_loss_options(loss))
    caches = [config.cache or _cache(config, part, group) for part in found]
    runs: list[RunFolder] = []
    with group.first():
        jobs = [_job(config, part, open_cache(path)) for part, path in zip(found, caches, strict=True)]
    sizes = [_images(job) for job in jobs]
    for i, job in enumerate(jobs):
        if not group.rank:
            _announce(job, found[i])
        offset = (sum(sizes[:i]), sum(sizes[i + 1 :]))
        run = train_students(replace(job, progress_offset=offset), group)
        if not group.rank and job.recipe.paper:
            _set_beside(run, job.recipe.paper)
        runs.append(run)
    return runs


def parts(config: TableConfig) -> list[Part]:
    """The parts of a table that are asked for."""
    if config.table not in TABLES:
        raise RecipeError(unknown("table", config.table, TABLES))
    own = {load.load(name).dataset: name for name in TABLES[config.table]}
    first, equals, stand_in = (config.dataset or "").partition("=")
    if config.dataset is None or first in own:
        chosen = [first] if first else list(own)
        found = [Part(own[dataset], stand_in or dataset) for dataset in chosen]
    elif equals:
        raise RecipeError(f"{config.table} is not on {first}. It is on: {', '.join(own)}.")
    else:
        found = [Part(name, config.dataset) for name in own.values()]
    if len(found) > 1 and (one := _of_one(config)):
        raise RecipeError(
            f"{config.table} has a part on each of {' and '.join(own)}, and {one} is of one. Say which: "
            f"--dataset {next(iter(own))}{'=' + config.dataset if config.dataset else ''}"
        )
    return found


def _of_one(config: TableConfig) -> str | None:
    """The flag given that belongs to one part of a table, if any."""
    given = {"--dataset": config.dataset, "--data": config.data, "--weights": config.weights, "--cache": config.cache}
    return next((flag for flag, value in given.items() if value), None)


def _recipe(config: TableConfig, part: Part) -> str:
    return ",".join(name for name in (part.name, config.recipe) if name)


def arms_of(config: TableConfig, chosen: Recipe) -> tuple[str, ...]:
    """The arms to train, by their whole names, in the paper's order."""
    there = arms.select_arms(True, chosen)
    for name in config.arms:
        if ARMS.get(name) not in there:
            short = [name for name, arm in ARMS.items() if arm in there]
            raise RecipeError(f"{config.table} has no arm {name!r}. There are: {', '.join(short)}.")
    return tuple(arm for arm in there if not config.arms or arm in {ARMS[name] for name in config.arms})


def _cache(config: TableConfig, part: Part, group: Group) -> Path:
    """Make a part's cache, or find it finished: teacher first, if it has no weights."""
    name, flags = _recipe(config, part), {"dataset": part.dataset}
    with group.first():
        chosen = load.load(name, config.settings, flags)
        stated, pool = datasets.parse(part.dataset, config.data)[1], _pool(config, chosen)
        network = chosen.teacher.network
        path = cache_path(stated, network, _usual_teacher(part))
        path = path.with_stem("-".join([path.stem, *_kinds(chosen, pool)]))
        if path.exists() and not (config.weights or find_checkpoint(stated, network)):
            raise RecipeError(
                f"{path} is there, and the weights of its {network} are not. Take it as it is, --cache {path}, or name "
                "the weights: --weights FILE"
            )
        command = teachers.teacher_command(part.dataset, {"--data": config.data, "--recipe": name}, config.settings)
        training = TeacherConfig(chosen, config.data, download=config.download)
        found = teachers.obtain_weights(training, stated, config.weights, not group.rank, command)
        chosen = load.load(name, config.settings, flags, teachers.recorded_settings(found))
        if not group.rank:
            teachers.print_teacher(found, network, stated)
    wanted = ExtractConfig(chosen, found, path, config.data, download=config.download, random_pool=pool)
    extract(wanted, group)
    return path


def _usual_teacher(part: Part) -> str:
    """The network whose cache of this dataset bears the dataset's name alone."""
    own = part.name if is_file(part.dataset) else load.default_recipe(part.dataset)
    return load.load(own, flags={"dataset": part.dataset}).teacher.network


def _pool(config: TableConfig, chosen: Recipe) -> int:
    random = arms.RANDOM in arms_of(config, chosen)
    return POOL if random and chosen.random_source == "pool" else 0


def _kinds(chosen: Recipe, pool: int) -> list[str]:
    """What tells a cache from the plain one of the same name."""
    return ([f"views{chosen.views.count}"] if chosen.views.count else []) + ([f"pool{pool}"] if pool else [])


def _job(config: TableConfig, part: Part, cache: Cache) -> StudentConfig:
    """What stage two is asked for."""
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
    folder = datasets.parse(part.dataset, config.data)[2]
    return StudentConfig(
        chosen, cache, arms_of(config, chosen), config.data or folder or usual, download=config.download
    )


def _differences(config: TableConfig, part: Part, chosen: Recipe, paper: Recipe, cache: Cache) -> list[str]:
    """What is not as the paper has it, a sentence each."""
    name, teacher = cache.manifest["dataset"]["name"], cache.manifest["teacher"]["network"]
    found = [f"{name} stands for {paper.dataset}"] if name != paper.dataset else []
    if teacher != paper.teacher.network:
        found.append(f"the teacher is {teacher}, the paper's {paper.teacher.network}")
    if config.epochs and config.epochs != paper.epochs:
        epochs = counted(config.epochs, "epoch")
        found.append(f"{epochs}, not {paper.epochs}, and the learning rate's schedule in proportion")
    if config.recipe:
        found.append(f"the recipe {config.recipe}")
    seen, wanted = Preprocess.from_dict(cache.manifest["preprocess"]), paper.preprocess
    if (seen.resize, seen.crop) != (wanted.resize, wanted.crop):
        found.append("images are resized or cropped in another way")
    if chosen.views.count:
        found.append(f"students see {chosen.views.count} views of each training image, moved and mirrored")
    if chosen.random_source == "pool":
        found.append("random images come from a pool that the teacher labelled once, not fresh in every batch")
    return [*found, *(f"--set {setting}" for setting in config.settings)]


def shortened(chosen: Recipe, epochs: int) -> Recipe:
    """The recipe with another number of epochs, and what its learning rates do after some of them in proportion."""

    def scaled(how: Recipe | Overrides) -> dict[str, int | list[int] | None]:
        every, milestones = how.lr_drop_every, how.lr_milestones
        return {
            "lr_drop_every": every and max(1, round(every * epochs / chosen.epochs)),
            "lr_milestones": milestones and [max(1, round(after * epochs / chosen.epochs)) for after in milestones],
        }

    students = {name: own.model_copy(update=scaled(own)) for name, own in chosen.students.items()}
    alone = chosen.alone.model_copy(update=scaled(chosen.alone))
    return chosen.model_copy(update={**scaled(chosen), "epochs": epochs, "students": students, "alone": alone})


def _images(job: StudentConfig) -> int:
    """How many images a cohort trains on, over all epochs and seeds."""
    return len(job.cache.train.labels) * job.recipe.epochs * job.recipe.seeds


def _set_beside(run: RunFolder, paper: Paper) -> None:
    """Have a finished run say what the paper reports, also one that `tspipe student` trained."""
    summary = run.read_json("summary.json")
    if summary.get("paper") != (wanted := paper.model_dump()):
        run.write_json("summary.json", {**summary, "paper": wanted})


def _announce(job: StudentConfig, part: Part) -> None:
    """Say what is trained now, and what of it is not as the paper has it."""
    chosen = job.recipe
    title, differs = (chosen.paper.title, chosen.paper.differs) if chosen.paper else (part.name, [])
    counts = f"{counted(chosen.epochs, 'epoch')}, {counted(chosen.seeds, 'seed')}"
    say(f"{title}: {', '.join(chosen.student)}; {'; '.join(job.arms)}; {counts}")
    for student in chosen.student:
        if chosen.paper and student not in chosen.paper.accuracy:
            say(f"  {student} is not in the paper's {title}")
    for sentence in differs:
        say(f"  not as in the paper: {sentence}")
