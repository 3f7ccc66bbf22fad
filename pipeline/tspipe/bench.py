"""What a cache saves on this machine: every time beside its floor, the plainest code that does the same work.

A floor and what is compared with it take turns, so that a machine that slows down slows both; ratios are of turns,
and their median is given with the smallest and the largest.
"""

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from tspipe import extract, feature_net, networks, pixels, training
from tspipe.cache.layout import as_plan
from tspipe.distributed import pick_device
from tspipe.feature_net import FeatureNet
from tspipe.learner import RANDOM, TAUGHT, Batch, Learner
from tspipe.losses import Output, Target
from tspipe.memory import keep_freed
from tspipe.progress import Advance, progress
from tspipe.random_pool import RandomPool
from tspipe.recipe import Compute, Features
from tspipe.rows import exact
from tspipe.run_folder import RunFolder, environment
from tspipe.student_config import StudentConfig
from tspipe.teaching import Targets, build_teacher, row_labels
from tspipe.train_students import Position, Run
from tspipe.weights import Weights

_TURNS = 11
_PREPARED = 2**30  # bytes of images that a floor has in memory: an epoch of CIFAR-10, which no processor's cache holds
_ROWS = 64  # batches of rows in a turn that only reads

Way = Callable[[], object]
Prepared = list[tuple[Tensor, Target]]  # normalised images and their targets, batch by batch


@dataclass(frozen=True)
class Line:
    """`what`, and what it is compared with after the stroke: seconds, medians of n turns; ours / floor in each turn."""

    what: str
    floor: float
    ours: float
    ratio: float
    smallest: float
    largest: float
    n: int


@dataclass(frozen=True)
class Result:
    """What was measured; `asdict` of it is the JSON."""

    cache: str
    environment: dict[str, Any]
    lines: list[Line]
    facts: dict[str, float]
    sentence: str


class Bench:
    """Measures one cache; about `seconds` long, more where a single step takes seconds."""

    def __init__(self, config: StudentConfig, seconds: float, folder: Path):
        self.device = pick_device(config.recipe.device)
        exact()
        keep_freed()
        self.environment = environment(str(self.device), torch.get_num_threads())
        arms = (TAUGHT, RANDOM) if config.cache.has_teacher and config.recipe.random_images else (TAUGHT,)
        live = config.recipe.model_copy(update={"random_source": "live"})  # a pool's images cost next to nothing
        self.config = replace(config, arms=arms, recipe=live)
        self.run = Run(self.config, RunFolder(folder, {}, self.environment), self.device)
        self.live = self.run.live
        students = len(config.recipe.student)
        self.seconds = seconds / (2 * students + 3)  # for each comparison
        self.lines: list[Line] = []
        self.facts: dict[str, float] = {}
        self._pooled = self.live is not None and config.cache.random is not None
        self._total = 2 * students + 2 + 5 * bool(self.live) + self._pooled
        self._advance: Advance = lambda _count, _what: None

    def measure(self) -> Result:
        """All of it, in the order of the table."""
        with progress("bench", self._total, "comparisons") as self._advance:
            self._targets()
            for student in self.config.recipe.student:
                self._student(student)
            if self.live:
                self._teacher()
                self._cohort()
                self._stage_one()
        return Result(self.config.cache.id, self.environment, self.lines, self.facts, self._sentence())

    def _targets(self) -> None:
        """Rows of features in random order: held, beside index_select; read, beside h5py's own indexing."""
        column = self.config.cache.train.features
        order = training.order(0, 0, len(column), self.config.recipe.batch_size)[:_ROWS]
        labels = row_labels(self.config.cache)

        def ours(memory: int) -> Way:
            targets = Targets({"features": column}, labels, frozenset({"features"}), memory, self.device)
            return lambda: [target.features for target in targets.batches(order)]

        held, there = torch.from_numpy(column.load()).float().to(self.device), labels.to(self.device)
        rows = [batch.to(self.device) for batch in order]

        def selected() -> None:
            for batch in rows:
                held.index_select(0, batch)
                there.index_select(0, batch)

        self._compare("targets held / index_select", selected, ours(2**62))
        with h5py.File(self.config.cache.path, "r", locking=False) as file:
            dataset = file["train_features"]

            def indexed() -> None:
                for batch in order:
                    there, back = batch.unique(return_inverse=True)  # h5py wants them in order
                    torch.from_numpy(dataset[there.numpy()]).float()[back]

            self._compare("targets read / h5py", indexed, ours(0))

    def _student(self, name: str) -> None:
        """An epoch of a taught student, beside bare steps and bare tests on tensors in memory; and the loop without."""
        run, what = self.run, networks.stated_name(name)
        size, test_size = self.config.recipe.batch_size, self.config.recipe.test_batch_size
        run.live = None
        learner = self._learner(name, TAUGHT)  # for all ways: two alike may differ by 4 %, by where their weights lie
        prepared = [(batch.images, batch.target) for _, batch in run.batches(0, 0, slice(self._batches_of(size)))]
        once = self._seconds(lambda: _steps(learner, prepared, 1))
        count = self._count(once * (2 if not self.live else 3), len(self._order()))
        ways: dict[str, Way] = {
            "floor": lambda: _steps(learner, prepared, count),
            "ours": lambda: self._learn([learner], count),
        }
        counts = {"floor": count, "ours": count}
        if self.live:
            plain = self._plain_teacher()
            one = self._seconds(lambda: self._live_loop(learner, plain, prepared, 1))
            few = counts["live"] = self._count(3 * one, count)
            ways["live"] = lambda: self._live_loop(learner, plain, prepared, few)
        step = {way: [turn / counts[way] for turn in turns] for way, turns in self._turns(ways).items()}
        self._advance(1, f"{what}, steps")

        in_turn = training.in_turn(len(run.test_pixels), test_size)
        tests, pixels = len(in_turn), run.test_pixels.batches(in_turn[: self._batches_of(test_size)])
        images = [run.preprocess.normalise(batch) for batch in pixels]
        some = self._count(self._seconds(lambda: _tests(learner, images, 1)) * 2, tests)
        test = self._turns({"floor": lambda: _tests(learner, images, some), "ours": lambda: run.test([learner], some)})
        saving = self._seconds(lambda: run.save([learner], Position()))
        steps = len(self._order())

        def epoch(way: str, turn: int) -> float:
            seconds = step[way][turn] * steps + test["ours" if way == "ours" else "floor"][turn] / some * tests
            return seconds * (1 + saving / self.config.recipe.checkpoint_seconds) if way == "ours" else seconds

        epochs = {way: [epoch(way, turn) for turn in range(_TURNS)] for way in ways}
        self._line(f"{what} epoch / bare", epochs["floor"], epochs["ours"])
        if self.live:
            self._line(f"{what} epoch / live", epochs["live"], epochs["ours"])
            self.facts[f"{what}: cached epoch, times faster than live"] = 1 / self.lines[-1].ratio
            self.facts[f"{what}: seconds of a taught step"] = statistics.median(step["ours"])
        self._advance(1, f"{what}, tests")
        run.live = self.live

    def _teacher(self) -> None:
        """One pass of the live teacher over a batch's random images, beside the plain network's."""
        assert self.live is not None
        live, plain = self.live, self._plain_teacher()
        images, said = live.batch(0, 0, 0)
        first = images.contiguous()

        @torch.no_grad()
        def eager() -> Output:
            return plain(first)  # type: ignore[no-any-return]

        apart = (eager().features - said.features).abs().max() / said.features.abs().max()
        self.facts["teacher: max|Δ|/max|f| from the plain network"] = float(apart)
        count = self._count(2 * self._seconds(eager), 1000)
        self._compare(
            "random images / eager",
            lambda: [eager() for _ in range(count)],
            lambda: [live.batch(0, 0, number) for number in range(count)],
            count,
        )
        self.facts["teacher: seconds of a pass over random images"] = self.lines[-1].ours
        if self._pooled:
            cache, shape = self.config.cache, self.run.train_pixels.shape
            pool = RandomPool(cache, self.run.preprocess, live.count, shape, self.device)
            self._compare(
                "random images, pool / live",
                lambda: [live.batch(0, 0, number) for number in range(count)],
                lambda: list(pool.batches(0, range(count))),
                count,
            )

    def _cohort(self) -> None:
        """An epoch's batches of all students, taught and with random images, beside bare steps and one pass a batch."""
        assert self.live is not None
        live, students = self.live, self.config.recipe.student
        ours, bare = ([self._learner(s, arm) for s in students for arm in (TAUGHT, RANDOM)] for _ in range(2))
        batches = [batch for _, batch in self.run.batches(0, 0, slice(self._batches_of(self.config.recipe.batch_size)))]
        prepared = {TAUGHT: [(batch.images, batch.target) for batch in batches], RANDOM: list(map(_joined, batches))}

        def floor(count: int) -> None:
            for number in range(count):
                live.batch(0, 0, number)
                for learner in bare:
                    _steps(learner, prepared[learner.arm], 1)

        count = self._count(2 * self._seconds(lambda: floor(1)), len(self._order()))
        what = f"cohort of {len(ours)} / bare"
        self._compare(what, lambda: floor(count), lambda: self._learn(ours, count), count)

    def _stage_one(self) -> None:
        """Blocks decoded, taught, checked and written, beside the bare teacher on arrays, and beside eager code."""
        job, plain = self._job(), self._plain_teacher()
        size, train, preprocess = job.config.recipe.compute.batch_size, job.dataset.train, job.config.recipe.preprocess
        blocks = [job.dimensions.block("train", number) for number in range(job.dimensions.blocks("train"))]

        def read(rows: Iterable[int]) -> Tensor:
            return torch.from_numpy(np.stack([pixels.read(train, preprocess, row)[1] for row in rows]))

        @torch.inference_mode()
        def bare(parts: Iterable[Tensor]) -> None:
            for batch in itertools.chain.from_iterable(part.split(size) for part in parts):
                job.teacher(preprocess.normalise(batch.to(self.device).permute(0, 3, 1, 2)))

        @torch.no_grad()
        def eager(parts: Iterable[Tensor]) -> None:
            for batch in itertools.chain.from_iterable(part.split(size) for part in parts):
                plain(preprocess.normalise(batch.to(self.device).permute(0, 3, 1, 2).contiguous()))

        decoded = [read(block) for block in blocks[:1]]
        count = self._count(3 * self._seconds(lambda: eager(decoded)), len(blocks))
        blocks, decoded = blocks[:count], decoded + [read(block) for block in blocks[1:count]]
        images = sum(map(len, blocks))
        with job.writer() as writer:
            ways: dict[str, Way] = {
                "ours": lambda: extract.write_rows(writer, job, {"train": range(count), "test": []}, _unseen),
                "bare": lambda: bare(decoded),
                "eager": lambda: eager(decoded),
                "decode, eager": lambda: eager(map(read, blocks)),
            }
            turns = {way: [seconds / images for seconds in turns] for way, turns in self._turns(ways).items()}
        for way in list(ways)[1:]:
            self._line(f"stage one / {way}", turns[way], turns["ours"])
            self._advance(1, "stage one")

    def _job(self) -> extract.Job:
        """Stage one for the training images of the cache, as it was made but without views, into the folder."""
        cache, (dataset, steps) = self.config.cache, self.run.images
        compute = cache.manifest["compute"], cache.manifest["block_rows"]
        assert self.live is not None
        recipe = self.config.recipe.model_copy(
            update={
                "preprocess": steps,
                "compute": Compute(batch_size=compute[0]["batch_size"], block_rows=compute[1]),
                "features": Features(dtype="float32" if cache.manifest["features"]["dtype"] == "<f4" else "float16"),
            }
        )
        config = extract.ExtractConfig(recipe, Weights({}, {}, "", ""), self.run.folder.path / "bench.h5")
        dimensions = replace(cache.dimensions, weights_bytes=0, random_rows=None, views=None)
        plan = {**as_plan(cache.manifest), "random": None, "views": None}
        return extract.Job(config, dataset, self.live.teacher, b"", plan, dimensions)

    def _learner(self, student: str, arm: str) -> Learner:
        return next(learner for learner in self.run.cohort(0) if (learner.student, learner.arm) == (student, arm))

    def _order(self) -> list[Tensor]:
        return training.order(0, 0, len(self.run.train_pixels), self.config.recipe.batch_size)

    def _learn(self, learners: list[Learner], count: int) -> None:
        with progress("bench", count * self.config.recipe.batch_size, "images") as advance:
            self.run.learn(learners, Position(), advance, count)

    def _live_loop(
        self, learner: Learner, teacher: FeatureNet, batches: list[tuple[Tensor, Target]], count: int
    ) -> None:
        """What one would write without a cache: the teacher labels every batch."""
        for images, target in itertools.islice(itertools.cycle(batches), count):
            with torch.no_grad():
                features, logits = teacher(images.contiguous())
            _steps(learner, [(images, Target(features, logits, target.labels))], 1)

    def _plain_teacher(self) -> FeatureNet:
        shape = self.run.train_pixels.shape
        module, name = build_teacher(self.config.cache, self.config.recipe, shape)
        return feature_net.split(module.eval().requires_grad_(False), name, feature_net.noise(shape)).to(self.device)

    def _compare(self, what: str, floor: Way, ours: Way, count: int = 1) -> None:
        """A line of the table, of times for one of `count` that a turn does."""
        seconds = self._turns({"floor": floor, "ours": ours})
        self._line(what, *([turn / count for turn in seconds[way]] for way in ("floor", "ours")))
        self._advance(1, what)

    def _line(self, what: str, floor: list[float], ours: list[float]) -> None:
        ratios = [a / b for a, b in zip(ours, floor, strict=True)]
        middle = [statistics.median(values) for values in (floor, ours, ratios)]
        self.lines.append(Line(what, middle[0], middle[1], middle[2], min(ratios), max(ratios), len(ratios)))

    def _turns(self, ways: dict[str, Way]) -> dict[str, list[float]]:
        """Seconds of each way in each turn, after one to warm up."""
        for way in ways.values():
            self._seconds(way)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_TURNS):
            for name, way in ways.items():
                seconds[name].append(self._seconds(way))
        return seconds

    def _batches_of(self, size: int) -> int:
        """How many batches of this many images a floor has in memory."""
        return max(1, _PREPARED // (4 * math.prod(self.run.train_pixels.shape) * size))

    def _count(self, once: float, most: int) -> int:
        """How often a turn does what takes `once` seconds, to fill the time there is."""
        return max(1, min(most, int(self.seconds / (_TURNS + 1) / once)))

    def _seconds(self, way: Way) -> float:
        self._wait()
        start = time.perf_counter()
        way()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _sentence(self) -> str:
        """What to do about it."""
        if not self.live:
            return "The file carries no teacher, or no random images are asked for, so only cached targets were timed."
        name = networks.stated_name(self.config.recipe.student[0])
        faster = self.facts[f"{name}: cached epoch, times faster than live"]
        steps = (
            self.facts["teacher: seconds of a pass over random images"]
            / self.facts[f"{name}: seconds of a taught step"]
        )
        advice = (
            "use a random pool (tspipe cache --random-pool), or train more students at once"
            if steps > 1
            else "which is less than the student itself takes"
        )
        return (
            f"With this teacher and {name} a cached epoch is {faster:.3g} × faster than one with the teacher in the "
            f"loop; random images live cost {steps:.2g} student steps a batch: {advice}."
        )


def bench(config: StudentConfig, seconds: float = 120) -> Result:
    """Measure what `config` would train; nothing is kept of it. Raises what `train_students` raises of a cache."""
    with tempfile.TemporaryDirectory() as folder:
        return Bench(config, seconds, Path(folder)).measure()


def _unseen(count: int, what: str) -> None:
    """Progress that is not shown."""


def as_json(result: Result) -> dict[str, Any]:
    """A result as JSON has it; times are seconds."""
    return asdict(result)


def _steps(learner: Learner, batches: Prepared, count: int) -> None:
    """Bare training steps."""
    learner.network.train()
    for images, target in itertools.islice(itertools.cycle(batches), count):
        loss = torch.stack(list(learner.loss(learner.network(images), target).values())).sum()
        learner.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        learner.optimizer.step()


@torch.no_grad()
def _tests(learner: Learner, batches: list[Tensor], count: int) -> None:
    """Bare test forwards."""
    learner.network.eval()
    for images in itertools.islice(itertools.cycle(batches), count):
        learner.network(images)


def _joined(batch: Batch) -> tuple[Tensor, Target]:
    """Real and random images as one batch, before a floor is timed."""
    assert batch.random is not None
    random, target = batch.random
    return torch.cat([batch.images, random]), Target(*map(torch.cat, zip(batch.target, target, strict=True)))
