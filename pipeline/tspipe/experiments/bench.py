"""Measures what a cache saves on this machine, each time against a floor: the plainest code for the same work.

Both sides of a comparison run in short alternating turns, so that a machine that slows down slows both. Each turn gives
a ratio; the result is their median with the quartiles.
"""

import itertools
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tspipe.errors import RecipeError
from tspipe.experiments.baselines import as_way, bare_steps, joined, labelled
from tspipe.experiments.turns import Timer
from tspipe.experiments.wall_clock import epoch_seconds
from tspipe.models import feature_net, networks
from tspipe.models.feature_net import FeatureNet
from tspipe.models.probe import probe_images
from tspipe.models.teacher import build_teacher
from tspipe.training.arms import RANDOM, TAUGHT, LearnerSpec
from tspipe.training.batches import BatchSource, sequential_batches, shuffled_batches
from tspipe.training.checkpoint import Position
from tspipe.training.config import StudentConfig
from tspipe.training.evaluation import Evaluator
from tspipe.training.learner import Learner
from tspipe.training.live_teacher import LiveTeacher
from tspipe.training.random_pool import RandomPool
from tspipe.training.run_folder import RunFolder, environment
from tspipe.training.trainer import Trainer, build_learner, open_trainer
from tspipe.utils.device import pick_device, use_full_precision
from tspipe.utils.files import lock
from tspipe.utils.memory import keep_freed_memory
from tspipe.utils.progress import progress

_PREPARED_BYTES = 2**30  # images that a floor has in memory: an epoch of CIFAR-10, more than a processor's cache holds
_COHORT_BATCHES = 8  # batches with random images that the cohort's floor goes through again and again


@dataclass(frozen=True)
class Line:
    """One comparison: medians over n turns in seconds, and the median and quartiles of ours / floor."""

    what: str
    floor: float
    ours: float
    ratio: float
    lower: float
    upper: float
    n: int


@dataclass(frozen=True)
class Result:
    """All comparisons on one machine; times are in seconds."""

    cache: str
    environment: dict[str, Any]
    lines: list[Line]
    facts: dict[str, float]
    sentence: str


@dataclass(frozen=True)
class Floor:
    """A training loop that does not use tspipe, and the flags of `tspipe student` for the same work.

    Attributes:
        path: a Python file, run as `epoch_seconds` says.
    """

    path: Path
    options: Sequence[str] = ()


def bench(config: StudentConfig, seconds: float = 120, floor: Floor | None = None) -> Result:
    """Measure what `config` would train, for about `seconds`; keep nothing of it. Raises as `train_students`.

    With `floor`, whole commands are timed too, for as long again for each student.
    """
    device = pick_device(config.recipe.device)
    use_full_precision()
    keep_freed_memory()
    arms = (TAUGHT, RANDOM) if config.cache.has_teacher and config.recipe.random_images else (TAUGHT,)
    live = config.recipe.model_copy(update={"random_source": "live"})  # drawing from a pool costs next to nothing
    config = replace(config, arms=arms, recipe=live)
    machine = environment(device.type, torch.get_num_threads())
    lines = list(_wall_clock_lines(config, floor, seconds)) if floor else []
    with tempfile.TemporaryDirectory() as folder, lock(Path(folder, "run"), RecipeError):
        trainer = open_trainer(config, RunFolder(Path(folder), {}, machine), device)
        measured, facts = _measure(trainer, seconds)
    lines += measured
    return Result(config.cache.id, machine, lines, facts, _advice(config, facts))


def _wall_clock_lines(config: StudentConfig, floor: Floor, seconds: float) -> Iterator[Line]:
    for student in config.recipe.student:
        work = floor.path, config.cache.path, student, config.recipe.batch_size, floor.options
        yield _line(f"{networks.recorded_name(student)} epoch / {floor.path.stem}", *epoch_seconds(*work, seconds))


def _measure(trainer: Trainer, seconds: float) -> tuple[list[Line], dict[str, float]]:
    students = trainer.config.recipe.student
    random = trainer.batches.random
    live = random if isinstance(random, LiveTeacher) else None
    timer = Timer(trainer.batches.data.train.device, seconds / (5 * len(students) + 4 if live else 4 * len(students)))
    lines: list[Line] = []
    facts: dict[str, float] = {}
    with progress("bench", len(students) + (2 if live else 0), "parts") as advance:
        for student in students:
            lines += _student_lines(trainer, student, timer, facts)
            advance(1, f"bench, {networks.recorded_name(student)}")
        if live:
            lines += _random_image_lines(trainer, live, timer, facts)
            advance(1, "bench, random images")
            lines.append(_cohort_line(trainer, live, timer))
            advance(1, "bench, cohort")
    return lines, facts


def _student_lines(trainer: Trainer, student: str, timer: Timer, facts: dict[str, float]) -> Iterator[Line]:
    """Compare an epoch of a taught student with bare steps and tests, and with a loop that has the teacher in it."""
    name, recipe, data = networks.recorded_name(student), trainer.config.recipe, trainer.batches.data
    # One learner for both sides: equal learners differ by 4 %, depending on their addresses in memory.
    learner = _learner(trainer, student, TAUGHT)
    batches = replace(trainer.batches, random=None)
    part = slice(_prepared_batches(trainer, recipe.batch_size))
    prepared = [(batch.images, batch.target) for _, batch in batches.epoch(0, 0, part)]
    test_seconds = _test_seconds(trainer, learner, timer)
    save_seconds = timer.seconds(lambda _: trainer.save_checkpoint([learner], Position()), 1)
    save_share = 1 + save_seconds / recipe.checkpoint_seconds if recipe.checkpoint_seconds else 1
    learner.network.train()
    steps_per_epoch = len(shuffled_batches(0, 0, data.train_count, recipe.batch_size))
    ours = as_way(_endless_steps(trainer, [learner], batches))

    def compare(floor: Iterator[object], share: float) -> tuple[list[float], list[float]]:
        times = timer.turns({"floor": as_way(floor), "ours": ours}, share)
        epochs = {way: [t * steps_per_epoch + test_seconds[way] for t in times[way]] for way in times}
        facts[f"{name}: seconds of a taught step"] = statistics.median(times["ours"])
        return epochs["floor"], [t * save_share for t in epochs["ours"]]

    yield _line(f"{name} step ratio", *compare(bare_steps(learner, itertools.cycle(prepared)), 1.5))
    if trainer.batches.random:
        live_loop = bare_steps(learner, labelled(_plain_teacher(trainer), itertools.cycle(prepared)))
        line = _line(f"{name} epoch / live", *compare(live_loop, 0.5))
        facts[f"{name}: cached epoch, times faster than live"] = 1 / line.ratio
        yield line


def _test_seconds(trainer: Trainer, learner: Learner, timer: Timer) -> dict[str, float]:
    """Return the seconds of a whole test: the evaluator's, and that of bare forward passes on images in memory."""
    data, size = trainer.batches.data, trainer.config.recipe.test_batch_size
    order = sequential_batches(len(data.test), size)
    prepared = data.test.batches(order[: _prepared_batches(trainer, size)])
    images = [data.preprocess.normalise(batch) for batch in prepared]
    evaluator = Evaluator(data, trainer.partition, size)
    learner.network.eval()
    ways = {
        "floor": as_way(map(torch.no_grad()(learner.network), itertools.cycle(images))),
        "ours": as_way(evaluator.test([learner], rows) for rows in itertools.cycle(order)),
    }
    return {way: statistics.median(times) * len(order) for way, times in timer.turns(ways, 0.5).items()}


def _random_image_lines(trainer: Trainer, live: LiveTeacher, timer: Timer, facts: dict[str, float]) -> Iterator[Line]:
    """Time the live teacher on a batch's random images and, if there is a pool, compare the pool with it."""
    ways = {"live": as_way(live.batch(0, 0, number) for number in itertools.count())}
    if trainer.config.cache.random is not None:
        rows = torch.arange(len(trainer.batches.data.train))
        photos = trainer.batches.data.photos(rows, len(trainer.config.cache.classes))
        ways["pool"] = as_way(RandomPool(trainer.config.cache, live.spec, photos).batches(0, 0, range(2**20)))
    times = timer.turns(ways)
    facts["teacher: seconds of a pass over random images"] = statistics.median(times["live"])
    if "pool" in times:
        yield _line("random images, pool / live", times["live"], times["pool"])


def _cohort_line(trainer: Trainer, live: LiveTeacher, timer: Timer) -> Line:
    """Compare the steps of a cohort, taught and with random images, with bare steps and one teacher pass per batch."""
    recipe = trainer.config.recipe
    learners = [_learner(trainer, student, arm) for student in recipe.student for arm in (TAUGHT, RANDOM)]
    batches = [batch for _, batch in trainer.batches.epoch(0, 0, slice(_COHORT_BATCHES))]
    prepared = {TAUGHT: [(batch.images, batch.target) for batch in batches], RANDOM: list(map(joined, batches))}
    bare = [bare_steps(learner, itertools.cycle(prepared[learner.spec.arm])) for learner in learners]
    floor = as_way((live.batch(0, 0, number), *map(next, bare)) for number in itertools.count())
    times = timer.turns({"floor": floor, "ours": as_way(_endless_steps(trainer, learners, trainer.batches))})
    return _line(f"cohort of {len(learners)} / bare", times["floor"], times["ours"])


def _endless_steps(trainer: Trainer, learners: list[Learner], batches: BatchSource) -> Iterator[object]:
    """Train without end, as `tspipe student` does, checkpoints included."""
    for epoch in itertools.count():
        for learner in learners:
            learner.start_epoch(epoch)
        yield from trainer.steps(learners, batches, Position(epoch=epoch))


def _learner(trainer: Trainer, student: str, arm: str) -> Learner:
    spec = LearnerSpec(student, arm, trainer.config.recipe.loss[0], 0)
    return build_learner(trainer.config, trainer.batches.data, spec)


def _plain_teacher(trainer: Trainer) -> FeatureNet:
    """Build the cache's teacher as a plain network, without the optimisations for inference."""
    shape = trainer.batches.data.train.shape
    module, name = build_teacher(trainer.config.cache, trainer.config.recipe, shape)
    frozen = module.eval().requires_grad_(False)
    return feature_net.split(frozen, name, probe_images(shape)).to(trainer.batches.data.train.device)


def _prepared_batches(trainer: Trainer, size: int) -> int:
    """Return how many batches of float32 images a floor has in memory."""
    return max(1, _PREPARED_BYTES // (4 * math.prod(trainer.batches.data.train.shape) * size))


def _line(what: str, floor: list[float], ours: list[float]) -> Line:
    ratios = [a / b for a, b in zip(ours, floor, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return Line(what, statistics.median(floor), statistics.median(ours), median, lower, upper, len(ratios))


def _advice(config: StudentConfig, facts: dict[str, float]) -> str:
    """Say what to do about the result."""
    teacher_seconds = facts.get("teacher: seconds of a pass over random images")
    if teacher_seconds is None:
        return "The file has no teacher, or no random images are used, so only cached targets were timed."
    name = networks.recorded_name(config.recipe.student[0])
    speedup = facts[f"{name}: cached epoch, times faster than live"]
    steps = teacher_seconds / facts[f"{name}: seconds of a taught step"]
    advice = "less than the student itself takes"
    if steps > 1:
        advice = "use a random pool (tspipe cache --random-pool), or train more students at once"
    return (
        f"With this teacher and {name}, a cached epoch is {speedup:.3g} × faster than one with the teacher in the "
        f"loop. Live random images cost {steps:.2g} student steps per batch: {advice}."
    )
