"""Stage two: students learn from a cache, while random images pass live through its teacher or come from its pool.

The learners of one seed are a cohort: they share every batch and one teacher pass over its random images, and a
student's arms start from the same weights, so that arms can be compared pair by pair.
"""

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tspipe.data import random_images
from tspipe.data.datasets import Dataset
from tspipe.data.image_loader import Pixels, of_cache
from tspipe.data.local import check_preprocess, open_local
from tspipe.data.preprocess import Preprocess
from tspipe.data.views import EpochViews
from tspipe.errors import DatasetError, RecipeError, TrainingError
from tspipe.losses import Target
from tspipe.models import networks, weights
from tspipe.models.output import Output
from tspipe.models.teacher import check_teacher, count_teacher_parameters, load_teacher
from tspipe.training import batches, checkpoint, evaluation
from tspipe.training.arms import OWN, RANDOM, losses_of, taught
from tspipe.training.batches import Batch
from tspipe.training.checkpoint import Position
from tspipe.training.config import StudentConfig, identity
from tspipe.training.learner import Learner
from tspipe.training.live_teacher import LiveTeacher
from tspipe.training.partition import Sharing
from tspipe.training.random_pool import RandomPool
from tspipe.training.run_folder import Row, RunFolder, environment, find_run
from tspipe.training.summary import loss_ratios, shares
from tspipe.training.targets import Targets, row_labels, weighted
from tspipe.training.tensorboard import Board, board
from tspipe.utils import timing
from tspipe.utils.device import exact, moved, pick_device
from tspipe.utils.distributed import ALONE, Group
from tspipe.utils.files import lock
from tspipe.utils.memory import keep_freed, memory_bound
from tspipe.utils.progress import Advance, console, progress
from tspipe.utils.rng import seed_torch_with, stream, torch_seeds

_LABELLED, _LABELLED_PIXELS = 1000, 2**24  # the most random images whose labels are counted for a run
_COLUMNS = ["seed", "epoch", "student", "arm", "loss", "train_accuracy", "test_accuracy"]
_SECONDS = ["seconds_training", "seconds_testing", "seconds_teacher"]


def train_students(config: StudentConfig, group: Group = ALONE) -> RunFolder:
    """Train every student in every arm over every seed; gives the run folder.

    The same config goes on with the run it began, and finds a finished one finished. The processes of a group each
    train some of a cohort's learners or, where it has fewer learners than there are processes, a part of every batch;
    rank 0 alone writes, into a folder that all of them see.
    Raises CacheMismatch when the cache is not of the local data, TrainingError when a loss is no longer a number.
    """
    recipe, cache = config.recipe, config.cache
    device = pick_device(recipe.device)
    keep_freed()
    stem = cache.path.name.removesuffix(".h5")
    with group.first():
        folder = find_run(identity(config), environment(device.type, torch.get_num_threads()), stem, config.out)
    if group.broadcast(folder.finished):
        return folder
    if (begun := folder.environment["device"]) != device.type:  # not its number: with torchrun each process has its own
        raise RecipeError(
            f"{folder.path} was begun on {begun} and this is {device.type}: its numbers would be of both. "
            "Choose another --out."
        )
    torch.set_num_threads(folder.environment["threads"])
    exact()
    with group.first():
        run = Run(config, folder, device, group)
        if not group.rank:
            folder.create()
    with nullcontext() if group.rank else lock(folder.path / "run", RecipeError):
        if not group.broadcast(folder.finished):  # by another job, while this one was reading the data
            with group.noticing():
                run.train()
        group.barrier()
    return folder


class Run:
    """What all cohorts of a run share: the data, the targets, the teacher, the folder."""

    def __init__(self, config: StudentConfig, folder: RunFolder, device: torch.device, group: Group = ALONE):
        self.config, self.folder, self.device, self.first = config, folder, device, group.rank == 0
        recipe, cache = config.recipe, config.cache
        self.preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
        check_preprocess(cache, recipe.preprocess)
        self.views = EpochViews.of_run(cache, recipe.views, taught(config.arms), device)
        dataset, steps = self.images = of_cache(cache, self.local)
        self.held_back = round(recipe.val_fraction * len(dataset.train))
        self.trained_on = len(dataset.train) - self.held_back
        if self.trained_on < recipe.batch_size:
            raise DatasetError(
                f"{dataset.name} has {self.trained_on:,} training images, too few for a batch of "
                f"{recipe.batch_size}. Give a smaller one: --set batch_size={max(2, self.trained_on // 4)}"
            )
        if recipe.val_fraction and not self.held_back:
            raise RecipeError(
                f"val_fraction={recipe.val_fraction:g} of {len(dataset.train):,} training images is none. Give a "
                "larger one: --set val_fraction=0.1"
            )
        memory = recipe.memory or memory_bound(device)
        self.train_pixels = Pixels(dataset.train, steps, "train", memory // 3, device, views=self.views is not None)
        self.test_pixels = Pixels(dataset.test, steps, "test", memory // 3, device)
        self.train_labels, self.test_labels = (
            torch.from_numpy(split.labels).to(device) for split in (cache.train, cache.test)
        )
        self.board: Board | None = None
        self.clock = timing.Clock(recipe.checkpoint_seconds)
        self.recipe = weighted(recipe, cache)
        first = self.cohort(0)
        self.sharing = Sharing(group, len(first))
        random = recipe.random_images and any(learner.arm == RANDOM for learner in self.sharing.mine(first))
        self.live = self._live_teacher() if random and recipe.random_source == "live" else None
        self.pool = self._pool() if random and recipe.random_source == "pool" else None
        self.names = [(learner.student, learner.arm, learner.loss_name) for learner in first]
        self.parameters = {learner.student: learner.parameters for learner in first}
        self.terms = {term for learner in first for term in learner.terms}
        needs = frozenset().union(*(learner.needs for learner in first))
        columns = {"features": cache.train.features, "logits": cache.train.logits}
        self.targets = Targets(columns, row_labels(cache), needs, memory // 3, device)

    def local(self) -> Dataset:
        """The local dataset, compared with the cache."""
        config = self.config
        return open_local(
            config.cache, config.recipe.dataset, config.data, download=config.download, trust=config.trust_data
        )

    def _live_teacher(self) -> LiveTeacher:
        """The cache's teacher, after comparing what it says here with what the file holds."""
        recipe, cache, shape = self.config.recipe, self.config.cache, self.train_pixels.shape
        teacher = load_teacher(cache, recipe, shape, self.device)
        (pixels,) = self.train_pixels.batches([torch.arange(min(8, len(self.train_pixels)))])
        check_teacher(teacher, cache, self.preprocess.normalise(pixels))
        teacher.precision = getattr(torch, recipe.live_precision)
        count, generator = recipe.random_images, recipe.random_generator
        part, number = self.sharing.part, len(batches.order(0, 0, self.trained_on, recipe.batch_size))
        if self.first and (said := random_images.spent(generator, count * number * recipe.epochs, "A seed", shape)):
            console.print(said)
        return LiveTeacher(teacher, self.preprocess, count, shape, self.device, part, generator, number)

    def _pool(self) -> RandomPool:
        count, shape = self.config.recipe.random_images, self.train_pixels.shape
        return RandomPool(self.config.cache, self.preprocess, count, shape, self.device, self.sharing.part)

    def cohort(self, seed: int) -> list[Learner]:
        """The learners of a seed: every student in every arm."""
        recipe, cache = self.recipe, self.config.cache
        width, classes, shape = cache.dimensions.width, len(cache.classes), self.train_pixels.shape
        return [
            Learner(student, arm, seed, recipe, width, classes, shape, self.device, loss)
            for student in recipe.student
            for arm in self.config.arms
            for loss in losses_of(arm, recipe.loss)
        ]

    def train(self) -> None:
        """Train what is still to be trained, seed by seed, and finish the folder."""
        with board(self.folder.path / "tensorboard", self.config.recipe.tensorboard and self.first) as self.board:
            self._train()

    def _train(self) -> None:
        recipe = self.config.recipe
        position, tensors = self._resume()
        rows = self.trained_on
        total, done = recipe.seeds * recipe.epochs * rows, (position.seed * recipe.epochs + position.epoch) * rows
        done, (before, after) = done + position.batch * recipe.batch_size, self.config.around
        with progress("students", before + total + after, "images", before + done, self.first) as advance:
            for seed in range(position.seed, recipe.seeds):
                learners = self.cohort(seed)
                mine = self.sharing.mine(learners)
                for learner in mine:
                    if tensors:
                        learner.unpack(checkpoint.below(learner.name, tensors))
                    if self.sharing.splits:
                        learner.distribute(self.sharing.group)
                for epoch in range(position.epoch, recipe.epochs):
                    self._train_epoch(mine, Position(seed, epoch, position.batch), advance)
                    position.batch = 0
                self._save_students(learners, mine)
                tensors, position = {}, Position(seed + 1)
                if self.first:
                    checkpoint.save_checkpoint(self.folder.checkpoint, {}, vars(position))
        if self.first:
            self.folder.write_json("summary.json", self._summary())
            self.folder.checkpoint.unlink(missing_ok=True)

    def _resume(self) -> tuple["Position", dict[str, Tensor]]:
        """Where an earlier run stopped, and its learners' state; metrics of what will run again are dropped."""
        found = checkpoint.load_checkpoint(self.folder.checkpoint)
        position, tensors = (Position(**found[1]), found[0]) if found else (Position(), {})
        now = (position.seed, position.epoch + 1)
        if self.first:
            self.folder.keep([row for row in self.folder.rows() if (row["seed"], row["epoch"]) < now])
        return position, tensors

    def _train_epoch(self, learners: list[Learner], position: "Position", advance: Advance) -> None:
        """Train the cohort on what is left of an epoch, test it, and write its rows; checkpoints in between."""
        epoch = position.epoch
        if self.live:
            self.live.watch.reset()
        for learner in learners:
            learner.start_epoch(epoch, counted=position.batch > 0)
        self.sharing.count_on(learners)
        what = f"seed {position.seed}, epoch {epoch + 1}/{self.config.recipe.epochs}"
        for images in self.steps(learners, position):
            advance(images, what)
        self.sharing.count_together(learners)
        self._check_losses(learners, epoch)
        rows = self.sharing.rows(self._rows(learners, epoch))
        if self.first:
            rows = sorted(rows, key=self._place)
            self.folder.append(rows, self._columns())
            if self.board:
                self.board.write(rows)
            told = rows if (position.seed, epoch) == (0, 0) else []
            for sentence in loss_ratios(told, hint=self.config.recipe.mse_weight != "auto"):
                console.print(sentence, markup=False)
            # Here and not at the start: an epoch does not need it, and on a CPU it takes a second or three.
            if (self.live or self.pool) and not (self.folder.path / "random_labels.json").exists():
                advance(0, "labels of random images")
                self.folder.write_json("random_labels.json", counts := self._label_histogram())
                console.print(shares(counts), markup=False)

    def _place(self, row: Row) -> int:
        """Where a row of an epoch belongs: in the order of the cohort."""
        return self.names.index((row["student"], row["arm"], row["loss"]))

    def steps(self, learners: list[Learner], position: "Position") -> Iterator[int]:
        """Train on an epoch's batches from the position on, checkpoints in between; the images of each, when done."""
        seed, epoch = position.seed, position.epoch
        rank = self.sharing.group.rank if self.sharing.splits else 0  # which has other images, so other draws
        dropout = torch_seeds(seed, f"dropout, rank {rank}" if rank else "dropout", epoch, position.batch)
        for number, batch in self.batches(seed, epoch, slice(position.batch, None)):
            drawn, images = next(dropout), batch.whole[0] if batch.whole else len(batch.images)
            for learner in learners:
                seed_torch_with(drawn)
                learner.step(batch, number)
            del batch  # so that the next one takes its memory, which the processor still has at hand
            if self.sharing.due(self.clock, number):
                self.sharing.count_together(learners)
                self._check_losses(learners, epoch)
                self.save(learners, Position(seed, epoch, number + 1))
                self.sharing.count_on(learners)
            yield images

    def _check_losses(self, learners: list[Learner], epoch: int) -> None:
        """Raise TrainingError if a loss was no number, once of each; comes before anything is written."""
        recipe = self.config.recipe
        for learner in learners if self.first or not self.sharing.splits else []:
            if (step := int(learner.tally.bad_step)) >= 0:
                own = learner.arm == OWN and recipe.alone.lr is not None
                raise TrainingError(
                    f"The loss of {learner.name} is no longer a number: epoch {epoch + 1}, step {step + 1}. The last "
                    "checkpoint is kept. A smaller learning rate may help: "
                    f"--set {'alone' if own else f'students.{learner.student}'}.lr={learner.how.lr / 10:g}"
                )

    def batches(self, seed: int, epoch: int, part: slice) -> Iterator[tuple[int, Batch]]:
        """An epoch's batches, or those of a part of it, with their numbers."""
        kept = self.validation(seed)[0]
        order = [kept[rows] for rows in batches.order(seed, epoch, len(kept), self.config.recipe.batch_size)]
        said = self._random(seed, epoch, range(len(order))[part], len(order))
        numbers, order = range(len(order))[part], order[part]
        mine, source = [self.sharing.part(rows) for rows in order], self.live or self.pool
        targets, views = self.views.batches(seed, epoch, mine) if self.views else (mine, None)
        images, labelled = self.train_pixels.normalised(mine, views), map(self._labelled, said)
        for number, rows, target in zip(numbers, order, self.targets.batches(targets), strict=True):
            whole = (len(rows), source.count if source else 0) if self.sharing.splits else None
            yield number, Batch(next(images), target, next(labelled), whole)  # no name that holds them until the next

    def validation(self, seed: int) -> tuple[Tensor, Tensor]:
        """The training images that a seed trains on, and those it holds back to choose an epoch: (n,) int64 each."""
        if not self.held_back:
            return torch.arange(self.trained_on), torch.empty(0, dtype=torch.int64)
        drawn = torch.from_numpy(stream(seed, "validation").permutation(self.trained_on + self.held_back))
        return drawn[self.held_back :], drawn[: self.held_back]

    def _random(
        self, seed: int, epoch: int, numbers: range, of: int
    ) -> Iterator[tuple[Tensor, Output]] | Iterator[None]:
        """Random images and what the teacher says of them, for these of an epoch's batches; None: none are wanted."""
        if self.live:
            return self.live.batches(seed, epoch, numbers)
        if self.pool:
            return self.pool.batches(seed, [epoch * of + number for number in numbers])
        return iter([None] * len(numbers))

    def _labelled(self, random: tuple[Tensor, Output] | None) -> tuple[Tensor, Target] | None:
        """Random images with what the teacher says of them as their targets; its argmax is their label."""
        if random is None:
            return None
        images, said = random
        return images, self.targets.only(said.logits.argmax(1), *said)

    def _label_histogram(self) -> dict[str, int]:
        """How many of the run's (or the pool's) first random images the teacher gives to each class, the most first."""
        labels = self.pool.labels(_LABELLED) if self.pool else self._live_labels()
        counts = labels.bincount(minlength=len(self.config.cache.classes)).tolist()
        ranked = sorted(zip(self.config.cache.classes, counts, strict=True), key=lambda item: -item[1])
        return {name: count for name, count in ranked if count}

    def _live_labels(self) -> Tensor:
        """What the teacher calls the run's first random images, (n,) int64."""
        assert self.live is not None
        count = min(_LABELLED, _LABELLED_PIXELS // math.prod(self.train_pixels.shape[1:]) + 1)
        labels: list[Tensor] = []
        while sum(map(len, labels)) < count:
            labels.append(self.live.batch(0, 0, len(labels))[1].logits.argmax(1))
        return torch.cat(labels)[:count]

    def test(self, learners: list[Learner], rows: Tensor) -> list[int]:
        """How many of these images (n,) int64 of the test split each learner classifies rightly."""
        return self._correct(learners, self.test_pixels, self.test_labels, rows)

    def _correct(self, learners: list[Learner], pixels: Pixels, labels: Tensor, rows: Tensor) -> list[int]:
        networks_, watches = [learner.logits for learner in learners], [learner.testing for learner in learners]
        for learner in learners:
            learner.network.eval()
        group = self.sharing.group
        mine = slice(group.rank, None, group.size) if self.sharing.splits else slice(None)
        order = list(rows.split(self.config.recipe.test_batch_size))[mine]
        right = (labels.index_select(0, there) for there in moved(order, self.device))
        found = evaluation.count_correct(networks_, pixels.batches(order), right, self.preprocess, watches)
        return self.sharing.total(found)

    def _rows(self, learners: list[Learner], epoch: int) -> list[Row]:
        """The epoch's rows of metrics.csv, after testing every learner."""
        found: list[Row] = [learner.row(epoch) for learner in learners]
        for row, right in zip(found, self.test(learners, torch.arange(len(self.test_pixels))), strict=True):
            row["test_accuracy"] = right / len(self.test_labels)
        if self.held_back:
            among = self.train_pixels, self.train_labels, self.validation(found[0]["seed"])[1]
            for row, right in zip(found, self._correct(learners, *among), strict=True):
                row["val_accuracy"] = right / self.held_back
        for row, learner in zip(found, learners, strict=True):
            row["seconds_testing"] = round(learner.testing.seconds(), 4)
            row["seconds_teacher"] = round(self.live.watch.seconds(), 4) if self.live else 0.0
        return found

    def _columns(self) -> list[str]:
        return [*_COLUMNS, *(["val_accuracy"] if self.held_back else []), *sorted(self.terms), *_SECONDS]

    def save(self, mine: list[Learner], position: "Position") -> None:
        """Write a checkpoint."""
        tensors = self.sharing.states(mine)
        if self.first:
            checkpoint.save_checkpoint(self.folder.checkpoint, tensors, vars(position))

    def _save_students(self, learners: list[Learner], mine: list[Learner]) -> None:
        """Write all trained students of a cohort, those of other processes too."""
        tensors = self.sharing.states(mine)
        for learner in learners if self.first else []:
            if learner not in mine:
                learner.unpack(checkpoint.below(learner.name, tensors))
            self._save_student(learner)

    def _save_student(self, learner: Learner) -> None:
        cache = self.config.cache
        metadata = {
            "arm": learner.arm,
            "cache": cache.id,
            "classes": json.dumps(cache.classes),
            "input_shape": json.dumps(self.train_pixels.shape),
            "network": networks.recorded_name(learner.student),
            "options": json.dumps(self.config.recipe.student_options(learner.student), sort_keys=True),
            "preprocess": json.dumps(self.preprocess.as_dict(), sort_keys=True),
            "width": str(cache.dimensions.width),
        }
        weights.save(self.folder.path / f"student-{learner.name}.safetensors", learner.network, metadata)

    def _summary(self) -> dict[str, Any]:
        """What the report needs beside the metrics."""
        manifest = self.config.cache.manifest
        correct, rows = manifest["teacher"]["correct"]["test"], manifest["dataset"]["rows"]["test"]
        return {
            "dataset": manifest["dataset"]["name"],
            "teacher": {
                "network": manifest["teacher"]["network"],
                "test_accuracy": correct / rows,
                "parameters": count_teacher_parameters(self.config.cache, self.config.recipe, self.train_pixels.shape),
            },
            "parameters": self.parameters,
            **({"mse_weight": self.recipe.mse_weight} if self.config.recipe.mse_weight == "auto" else {}),
        }
