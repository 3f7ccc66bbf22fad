"""Accuracy on the test split and on held-back training images."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.data.image_loader import ImageLoader
from tspipe.data.preprocess import Preprocess
from tspipe.models import chance
from tspipe.training.learner import Learner
from tspipe.training.partition import Partition
from tspipe.training.run_data import RunData
from tspipe.utils.device import batches_to_device
from tspipe.utils.timing import Stopwatch


@torch.no_grad()
def count_correct(
    networks: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[Tensor],
    labels: Iterable[Tensor],
    preprocess: Preprocess,
    stopwatches: Sequence[Stopwatch] = (),
) -> list[int]:
    """Return how many images each network classifies correctly.

    Args:
        networks: each maps normalised images to logits, in its current mode.
        batches: (n, C, H, W) uint8.
        labels: (n,) int64 for each batch, on the networks' device.
        stopwatches: one per network, to time it with.
    """
    correct: list[Tensor | int] = [0] * len(networks)
    images_of_batches = map(preprocess.normalise, batches)  # which keeps no batch, as zip and a local name would
    for expected in labels:
        images = next(images_of_batches)
        for i, network in enumerate(networks):
            with stopwatches[i].on() if stopwatches else contextlib.nullcontext():
                correct[i] += (network(images).argmax(1) == expected).sum()
        del images  # so that the next batch can use its memory
    return [int(count) for count in correct]


@torch.no_grad()
def predict(
    network: Callable[[Tensor], Tensor], batches: Iterable[Tensor], preprocess: Preprocess
) -> NDArray[np.int64]:
    """Return the class that a network predicts for each image (n,), in its current mode; see `count_correct`."""
    return torch.cat([network(preprocess.normalise(images)).argmax(1).cpu() for images in batches]).numpy()


class Evaluator:
    """Tests learners on the images of a run, each process on its part of them."""

    def __init__(self, data: RunData, partition: Partition, batch_size: int):
        self.data, self.partition, self.batch_size = data, partition, batch_size

    def test(self, learners: list[Learner], rows: Tensor | None = None) -> list[int]:
        """Return how many test images, or those in `rows` (n,) int64, each learner classifies correctly."""
        rows = torch.arange(len(self.data.test)) if rows is None else rows
        return self._correct(learners, self.data.test, self.data.test_labels, rows)

    def rows(self, learners: list[Learner], epoch: int, teacher_seconds: float) -> list[dict[str, Any]]:
        """Test the learners, keep the weights of those at their best, and return their rows of metrics.csv."""
        data, rows = self.data, [learner.row(epoch) for learner in learners]
        for row, correct in zip(rows, self.test(learners), strict=True):
            row["test_accuracy"] = correct / len(data.test_labels)
        if data.validation_count and learners:
            held_back = data.validation_split(learners[0].spec.seed)[1]
            counts = self._correct(learners, data.train, data.train_labels, held_back)
            for row, correct in zip(rows, counts, strict=True):
                row["val_accuracy"] = correct / data.validation_count
        for row, learner in zip(rows, learners, strict=True):
            row["seconds_testing"] = round(learner.times.testing.seconds(), 4)
            row["seconds_teacher"] = round(teacher_seconds, 4)
            learner.best.update(learner.network, row["epoch"], row.get("val_accuracy", row["test_accuracy"]))
        return rows

    def chance_remarks(self, learners: list[Learner], rows: list[dict[str, Any]]) -> Iterator[str]:
        """Yield a sentence on each learner that is no better than guessing, with its likely reasons.

        Args:
            rows: what `rows` returned for these learners.
        """
        labels, images = self.data.test_labels.cpu().numpy(), self.data.test
        for learner, row in zip(learners, rows, strict=True):
            if chance.is_suspicious(row["test_accuracy"], labels):
                order = torch.arange(len(images)).split(self.batch_size)
                predicted = predict(learner.logits, images.batches(order), self.data.preprocess)
                if problem := chance.remark(predicted, labels):
                    yield (
                        f"{learner.name} {problem}. Likely reasons: too few epochs ({row['epoch']}) or training images "
                        f"({self.data.train_count:,}) for its initial weights, or a learning rate "
                        f"({learner.optimization.lr:g}) that is too high or too low."
                    )

    def _correct(self, learners: list[Learner], images: ImageLoader, labels: Tensor, rows: Tensor) -> list[int]:
        for learner in learners:
            learner.network.eval()
        order = self.partition.local_batches(list(rows.split(self.batch_size)))
        expected = (labels.index_select(0, batch) for batch in batches_to_device(order, images.device))
        stopwatches = [learner.times.testing for learner in learners]
        networks = [learner.logits for learner in learners]
        counts = count_correct(networks, images.batches(order), expected, self.data.preprocess, stopwatches)
        return self.partition.sum_counts(counts)
