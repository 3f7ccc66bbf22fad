"""Batches: their order in an epoch, and what the learners of a cohort share in each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tspipe.losses import Target
from tspipe.training.arms import ALONE_RANDOM, UNTAUGHT, WITH_RANDOM
from tspipe.training.random_source import RandomBatch, RandomSource
from tspipe.training.run_data import RunData
from tspipe.training.targets import TargetLoader
from tspipe.utils.rng import stream

if TYPE_CHECKING:
    from tspipe.training.live_views import LiveViews
    from tspipe.training.partition import Partition
    from tspipe.training.unlabelled import UnlabelledImages


class GlobalBatch(NamedTuple):
    """A batch that several processes split: its images of each sort over all processes, and their number."""

    images: int
    random: int
    unlabelled: int
    processes: int


class RandomImages(NamedTuple):
    """Random images (r, C, H, W), their targets from the teacher, and labels of their own (see `RandomBatch`)."""

    images: Tensor
    target: Target
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """Normalised images (m, C, H, W) with their targets, and random and unlabelled images with theirs, if any.

    Where several processes split a batch, this is one process's part of it, and `global_batch` describes all of it.
    """

    images: Tensor
    target: Target
    random: RandomImages | None
    unlabelled: tuple[Tensor, Target] | None = None
    global_batch: GlobalBatch | None = None

    def photographs(self, arm: str) -> tuple[Tensor, Target]:
        """Return the images and targets that an arm sees: taught ones also see the images without labels."""
        if arm in UNTAUGHT or self.unlabelled is None:
            return self.images, self.target
        images, target = self.unlabelled
        return torch.cat([self.images, images]), Target(*map(torch.cat, zip(self.target, target, strict=True)))

    def of_arm(self, arm: str) -> tuple[Tensor, Target, tuple[Tensor, Target] | None]:
        """Return the images and targets that an arm sees, and the random images with theirs; None if it sees none.

        The student alone learns from labels, as probabilities (n, c) where random images have mixed ones.
        """
        images, target = self.photographs(arm)
        if arm not in WITH_RANDOM or self.random is None:
            return images, target, None
        random_images, random_target, labels = self.random
        if arm == ALONE_RANDOM:
            one_hot = F.one_hot(target.labels, labels.shape[1]).to(labels.dtype)
            target, random_target = target._replace(labels=one_hot), random_target._replace(labels=labels)
        return images, target, (random_images, random_target)


def shuffled_batches(seed: int, epoch: int, rows: int, batch_size: int) -> list[Tensor]:
    """Return an epoch's batches of indices (n,) int64: every row once, shuffled; the last batch may be smaller.

    A last batch of one row is dropped, because batch norm cannot train on a single image.
    """
    batches = list(torch.from_numpy(stream(seed, "order", epoch).permutation(rows)).split(batch_size))
    return batches[:-1] if len(batches[-1]) == 1 else batches


def sequential_batches(rows: int, batch_size: int) -> list[Tensor]:
    """Return all rows in order, as batches of indices (n,) int64."""
    return list(torch.arange(rows).split(batch_size))


@dataclass(frozen=True)
class BatchSource:
    """The batches of a run, each the same for all learners of a cohort.

    Attributes:
        random: where random images come from; None if this process's learners use none.
        unlabelled: images without labels that taught students see beside those of the batch; None without them.
        live_views: the teacher of views that no cache holds; None if targets are cached.
        random_from: the first epoch with random images, counted from 0.
    """

    data: RunData
    targets: TargetLoader
    random: RandomSource | None
    partition: "Partition"
    batch_size: int
    random_from: int = 0
    unlabelled: "UnlabelledImages | None" = None
    live_views: "LiveViews | None" = None

    def epoch(self, seed: int, epoch: int, part: slice = slice(None)) -> Iterator[tuple[int, Batch]]:
        """Yield the batches of an epoch, or a part of them, each with its number."""
        rows = self.data.validation_split(seed)[0]
        order = [rows[batch] for batch in shuffled_batches(seed, epoch, len(rows), self.batch_size)]
        numbers, order = range(len(order))[part], order[part]
        local = [self.partition.local_rows(batch) for batch in order]
        target_rows, views = self.data.views.batches(seed, epoch, local) if self.data.views else (local, None)
        images, random = self.data.train.normalised(local, views), self._random_batches(seed, epoch, numbers)
        if self.live_views:
            self.live_views.stopwatch.reset()
        unlabelled = self._unlabelled_batches(seed, epoch, numbers)
        random_count = self.random.spec.count if self.random and epoch >= self.random_from else 0
        unlabelled_count = self.unlabelled.count if self.unlabelled else 0
        for number, batch, target in zip(numbers, order, self.targets.batches(target_rows), strict=True):
            global_batch = self.partition.global_batch(len(batch), random_count, unlabelled_count)
            # No local names for the tensors: they would keep a batch's memory until the next batch is complete.
            place = seed, epoch, number
            yield (
                number,
                Batch(*self._labelled(next(images), target, place), next(random), next(unlabelled), global_batch),
            )

    def teacher_seconds(self) -> float:
        """Return how long the teacher has worked on random images and views in the last epoch."""
        return sum((source.stopwatch.seconds() for source in (self.random, self.live_views) if source), 0.0)

    def _labelled(self, images: Tensor, target: Target, place: tuple[int, int, int]) -> tuple[Tensor, Target]:
        return images, self.live_views.target(images, target.labels, *place) if self.live_views else target

    def _random_batches(self, seed: int, epoch: int, numbers: range) -> Iterator[RandomImages | None]:
        if self.random:
            self.random.stopwatch.reset()
        if self.random is None or epoch < self.random_from:
            return iter([None] * len(numbers))
        return map(self._with_target, self.random.batches(seed, epoch, numbers))

    def _unlabelled_batches(self, seed: int, epoch: int, numbers: range) -> Iterator[tuple[Tensor, Target] | None]:
        if self.unlabelled is None:
            return iter([None] * len(numbers))
        return self.unlabelled.batches(seed, epoch, numbers, self.partition.local_rows)

    def _with_target(self, batch: RandomBatch) -> RandomImages:
        """Turn the teacher's output for random images into their target; its argmax is their label."""
        target = self.targets.select(batch.output.logits.argmax(1), *batch.output)
        return RandomImages(batch.images, target, batch.labels)
