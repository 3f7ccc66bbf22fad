"""What a cache saves on this machine: every time beside its floor, the plainest code that does the same work.

A floor and what is compared with it take short turns, so that a machine that slows down slows both; ratios are of
turns, and their median is given with the quartiles.
"""

import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from tspipe.cache.layout import as_plan
from tspipe.data import decode
from tspipe.data.datasets import Dataset, Images
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheMismatch, DatasetError
from tspipe.experiments.baselines import (
    Way,
    bare_steps,
    bare_tests,
    endless,
    joined,
    labelled,
    taken,
)
from tspipe.experiments.bench_result import Line, Result
from tspipe.extraction import extract
from tspipe.models import feature_net, networks
from tspipe.models.feature_net import FeatureNet
from tspipe.models.output import Output
from tspipe.models.teacher import build_teacher
from tspipe.models.weights import Weights
from tspipe.recipes.schema import Compute, Features
from tspipe.training import batches
from tspipe.training.arms import RANDOM, TAUGHT
from tspipe.training.checkpoint import Position
from tspipe.training.config import StudentConfig
from tspipe.training.learner import Learner
from tspipe.training.random_pool import RandomPool
from tspipe.training.run_folder import RunFolder, environment
from tspipe.training.targets import Targets, row_labels
from tspipe.training.trainer import Run
from tspipe.utils.device import exact, pick_device
from tspipe.utils.memory import keep_freed
from tspipe.utils.progress import Advance, console, progress

_LEAST, _MOST = 11, 101  # turns
_PREPARED = 2**30  # bytes of images that a floor has in memory: an epoch of CIFAR-10, which no processor's cache holds
_COHORT, _BLOCKS = 8, 4  # batches with random images, and blocks of stage one, that are gone through again and again
_BRIEF = 0.2  # of the time of a way, for what takes microseconds


class Bench:
    """Measures one cache; about `seconds` long, more where a single step takes seconds."""

    def __init__(self, config: StudentConfig, seconds: float, folder: Path):
        self.device = pick_device(config.recipe.device)
        exact()
        keep_freed()
        self.environment = environment(self.device.type, torch.get_num_threads())
        arms = (TAUGHT, RANDOM) if config.cache.has_teacher and config.recipe.random_images else (TAUGHT,)
        live = config.recipe.model_copy(update={"random_source": "live"})  # a pool's images cost next to nothing
        self.config = replace(config, arms=arms, recipe=live)
        self.run = Run(self.config, RunFolder(folder, {}, self.environment), self.device)
        self.live = self.run.live
        students = len(config.recipe.student)
        self.lines: list[Line] = []
        self.facts: dict[str, float] = {}
        self._pooled = self.live is not None and config.cache.random is not None
        ways = 4 * _BRIEF + (5 * students + 9 + 2 * self._pooled if self.live else 4 * students)
        self.seconds = seconds / ways
        self._total = students + 2 + 5 * bool(self.live) + self._pooled
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
        order = batches.order(0, 0, len(column), self.config.recipe.batch_size)
        labels = row_labels(self.config.cache)

        def ours(memory: int) -> Way:
            targets = Targets({"features": column}, labels, frozenset({"features"}), memory, self.device)
            return taken(endless(lambda: targets.batches(order)))

        held, there = torch.from_numpy(column.load()).float().to(self.device), labels.to(self.device)
        rows = [batch.to(self.device) for batch in order]

        def selected() -> Iterator[object]:
            for batch in rows:
                yield held.index_select(0, batch), there.index_select(0, batch)

        self._compare("rows held / index_select", taken(endless(selected)), ours(2**62), _BRIEF)
        with h5py.File(self.config.cache.path, "r", locking=False) as file:
            dataset = file["train_features"]

            def indexed() -> Iterator[object]:
                for batch in order:
                    there, back = batch.unique(return_inverse=True)  # h5py wants them in order
                    yield torch.from_numpy(dataset[there.numpy()]).float()[back]

            self._compare("rows read / h5py", taken(endless(indexed)), ours(0), _BRIEF)

    def _student(self, name: str) -> None:
        """An epoch of a taught student, beside bare steps and bare tests on tensors in memory; and the loop without."""
        run, what = self.run, networks.recorded_name(name)
        size, test_size = self.config.recipe.batch_size, self.config.recipe.test_batch_size
        run.live = None
        learner = self._learner(name, TAUGHT)  # for all ways: two alike may differ by 4 %, by where their weights lie
        prepared = [(batch.images, batch.target) for _, batch in run.batches(0, 0, slice(self._batches_of(size)))]
        in_turn = batches.in_turn(len(run.test_pixels), test_size)
        pixels = run.test_pixels.batches(in_turn[: self._batches_of(test_size)])
        images = [run.preprocess.normalise(batch) for batch in pixels]
        learner.network.eval()
        tests = self._turns(
            {
                "floor": taken(bare_tests(learner, itertools.cycle(images))),
                "ours": taken(run.test([learner], rows) for rows in itertools.cycle(in_turn)),
            },
            0.5,
        )
        test = {way: statistics.median(turns) * len(in_turn) for way, turns in tests.items()}
        saving = self._seconds(lambda _: run.save([learner], Position()), 1) / self.config.recipe.checkpoint_seconds
        learner.network.train()
        learnt = taken(self._learn([learner], f"{what}, epoch"))

        def compare(other: str, floor: Iterator[object], share: float) -> float:
            step = self._turns({"floor": taken(floor), "ours": learnt}, share)
            whole = {way: [one * len(self._order()) + test[way] for one in step[way]] for way in step}
            self._line(f"{what} epoch / {other}", whole["floor"], [seconds * (1 + saving) for seconds in whole["ours"]])
            return statistics.median(step["ours"])

        taught = compare("bare", bare_steps(learner, itertools.cycle(prepared)), 1.5)
        if self.live:
            looped = labelled(self._plain_teacher(), itertools.cycle(prepared))
            compare("live", bare_steps(learner, looped), 0.5)
            self.facts[f"{what}: cached epoch, times faster than live"] = 1 / self.lines[-1].ratio
            self.facts[f"{what}: seconds of a taught step"] = taught
        self._advance(1, f"{what}, epoch")
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
        ours = taken(live.batch(0, 0, number) for number in itertools.count())
        self._compare("random images / eager", taken(eager() for _ in itertools.count()), ours)
        self.facts["teacher: seconds of a pass over random images"] = self.lines[-1].ours
        if self._pooled:
            cache, shape = self.config.cache, self.run.train_pixels.shape
            pool = RandomPool(cache, self.run.preprocess, live.count, shape, self.device)
            drawn = taken(pool.batches(0, range(2**20)))
            self._compare("random images, pool / live", ours, drawn)

    def _cohort(self) -> None:
        """An epoch's batches of all students, taught and with random images, beside bare steps and one pass a batch."""
        assert self.live is not None
        live, students = self.live, self.config.recipe.student
        learners = [self._learner(student, arm) for student in students for arm in (TAUGHT, RANDOM)]
        batches = [batch for _, batch in self.run.batches(0, 0, slice(_COHORT))]
        prepared = {TAUGHT: [(batch.images, batch.target) for batch in batches], RANDOM: list(map(joined, batches))}

        def floor() -> Iterator[object]:
            bare = [bare_steps(learner, itertools.cycle(prepared[learner.arm])) for learner in learners]
            for number in itertools.count():
                live.batch(0, 0, number)
                yield [next(steps) for steps in bare]

        what = f"cohort of {len(learners)} / bare"
        self._compare(what, taken(floor()), taken(self._learn(learners, what)))

    def _stage_one(self) -> None:
        """Blocks taught, checked and written, beside the bare teacher on arrays and eager code; from files, too."""
        assert self.live is not None
        self.live.teacher.precision = torch.float32  # as stage one has it, whatever random images are labelled in
        plain, (dataset, preprocess), files = self._plain_teacher(), self.run.images, self._files()
        sizes = self.config.cache.dimensions
        blocks = [sizes.block("train", number) for number in range(sizes.blocks("train"))]

        def read(rows: range, images: Images, preprocess: Preprocess) -> Tensor:
            return torch.from_numpy(np.stack([decode.read(images, preprocess, row)[1] for row in rows]))

        decoded = [read(block, dataset.train, preprocess) for block in blocks[:_BLOCKS]]
        array, stop = torch.cat(decoded).numpy(), blocks[len(decoded) - 1].stop
        held = Images(
            dataset.train.labels[:stop], dataset.train.keys[:stop], dataset.train.classes, array.__getitem__, array
        )
        arrays = self._job(replace(dataset, train=held), replace(preprocess, resize=None, crop=None))
        size = arrays.config.recipe.compute.batch_size

        @torch.inference_mode()
        def bare(part: Tensor) -> None:
            for batch in part.split(size):
                arrays.teacher(preprocess.normalise(batch.to(self.device).permute(0, 3, 1, 2)))

        @torch.no_grad()
        def eager(part: Tensor) -> None:
            for batch in part.split(size):
                plain(preprocess.normalise(batch.to(self.device).permute(0, 3, 1, 2).contiguous()))

        with arrays.writer() as writer:

            def written(job: extract.Job, blocks: int) -> Way:
                numbers = itertools.cycle(range(blocks))
                return lambda count: extract.write_rows(
                    writer, job, {"train": list(itertools.islice(numbers, count)), "test": []}, _unseen
                )

            ways = {
                "ours": written(arrays, len(decoded)),
                "bare": taken(bare(part) for part in itertools.cycle(decoded)),
                "eager": taken(eager(part) for part in itertools.cycle(decoded)),
            }
            if files:  # all of them, one after the other: a few would stay in the processor's cache
                steps = self.run.preprocess
                one_by_one = (read(block, files, steps) for block in itertools.cycle(blocks))
                ways |= {
                    "ours, files": written(self._job(replace(dataset, train=files), steps), len(blocks)),
                    "eager, files": taken(map(eager, one_by_one)),
                }
            found = self._turns(ways)
        an_image = {way: [seconds / len(blocks[0]) for seconds in turns] for way, turns in found.items()}
        for line, floor, ours in (
            ("stage one / bare", "bare", "ours"),
            ("stage one / eager", "eager", "ours"),
            ("stage one, files / eager", "eager, files", "ours, files"),
        ):
            if ours in an_image:
                self._line(line, an_image[floor], an_image[ours])
            self._advance(1, "stage one")

    def _files(self) -> Images | None:
        """The training images as files that are decoded; None of a dataset that is an array, or is not here."""
        try:
            images = (self.run.local() if self.config.cache.has_images else self.run.images[0]).train
        except (DatasetError, CacheMismatch) as problem:
            console.print(f"Stage one is not timed from files. {problem}", markup=False)
            return None
        return images if images.array is None else None

    def _job(self, dataset: Dataset, preprocess: Preprocess) -> extract.Job:
        """Stage one for the cache's training images, as it was made but without views, into the folder."""
        cache = self.config.cache
        compute = cache.manifest["compute"], cache.manifest["block_rows"]
        assert self.live is not None
        recipe = self.config.recipe.model_copy(
            update={
                "preprocess": preprocess,
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
        return batches.order(0, 0, len(self.run.train_pixels), self.config.recipe.batch_size)

    def _learn(self, learners: list[Learner], what: str) -> Iterator[object]:
        """Training without end as `tspipe student` does it, step by step; progress and checkpoints are in it."""
        for epoch in itertools.count():
            for learner in learners:
                learner.start_epoch(epoch)
            for images in self.run.steps(learners, Position(epoch=epoch)):
                self._advance(0, what)
                yield images

    def _plain_teacher(self) -> FeatureNet:
        shape = self.run.train_pixels.shape
        module, name = build_teacher(self.config.cache, self.config.recipe, shape)
        return feature_net.split(module.eval().requires_grad_(False), name, feature_net.probe_images(shape)).to(
            self.device
        )

    def _compare(self, what: str, floor: Way, ours: Way, share: float = 1) -> None:
        """A line of the table."""
        seconds = self._turns({"floor": floor, "ours": ours}, share)
        self._line(what, seconds["floor"], seconds["ours"])
        self._advance(1, what)

    def _line(self, what: str, floor: list[float], ours: list[float]) -> None:
        ratios = [a / b for a, b in zip(ours, floor, strict=True)]
        lower, _, upper = statistics.quantiles(ratios, n=4)
        middle = [statistics.median(values) for values in (floor, ours, ratios)]
        self.lines.append(Line(what, middle[0], middle[1], middle[2], lower, upper, len(ratios)))

    def _turns(self, ways: dict[str, Way], share: float = 1) -> dict[str, list[float]]:
        """Seconds that each way takes for one, turn by turn: short turns, as many as there is time for.

        All take the same time in a turn, and come in any order: who comes after whom may matter to both.
        """
        for way in ways.values():
            way(1)
        once = {name: self._seconds(way, 1) for name, way in ways.items()}
        seconds = share * self.seconds  # for each way
        turns = min(_MOST, max(_LEAST, int(seconds / max(once.values()))))
        counts = {name: max(1, round(seconds / turns / each)) for name, each in once.items()}
        found: dict[str, list[float]] = {name: [] for name in ways}
        shuffled = random.Random(0)
        for _ in range(turns):
            for name in shuffled.sample(list(ways), len(ways)):
                found[name].append(self._seconds(ways[name], counts[name]) / counts[name])
        return found

    def _batches_of(self, size: int) -> int:
        """How many batches of this many images a floor has in memory."""
        return max(1, _PREPARED // (4 * math.prod(self.run.train_pixels.shape) * size))

    def _seconds(self, way: Way, count: int) -> float:
        self._wait()
        start = time.perf_counter()
        way(count)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _sentence(self) -> str:
        """What to do about it."""
        if not self.live:
            return "The file carries no teacher, or no random images are asked for, so only cached targets were timed."
        name = networks.recorded_name(self.config.recipe.student[0])
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
