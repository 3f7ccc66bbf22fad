"""Random images with the teacher's output for them; the sources are the live teacher and the random pool."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import Generator, Kind
from tspipe.models.output import Output
from tspipe.utils.timing import Stopwatch


@dataclass(frozen=True)
class RandomSpec:
    """The random images that a run adds to its batches.

    Attributes:
        count: random images per batch, over all processes.
        shape: (C, H, W) of an image.
        batches_per_epoch: batches per epoch, so that one sequence of images can run through all epochs.
        preprocess: how images are normalised.
        device: where batches are used.
        local_rows: selects this process's rows of a batch.
    """

    count: int
    shape: tuple[int, int, int]
    batches_per_epoch: int
    preprocess: Preprocess
    device: torch.device
    local_rows: Callable[[Tensor], Tensor] = lambda rows: rows


@dataclass(frozen=True)
class LiveSpec:
    """How the images of a live source are drawn.

    Attributes:
        kind: returns the kind of a seed's images; kinds that are made from photos use those that the seed trains on.
        classes: the number of classes.
        rounds: with balanced labels, the most candidates for each image; None for images that are not balanced.
    """

    kind: Callable[[int], Kind]
    classes: int
    generator: Generator = "mt19937"
    rounds: int | None = None


class RandomBatch(NamedTuple):
    """A batch of random images (r, C, H, W) with two sets of labels.

    Attributes:
        output: the teacher's.
        labels: those that the images have of their own, as probabilities (r, c); (r, 0) if they have none.
    """

    images: Tensor
    output: Output
    labels: Tensor


class RandomLabels(NamedTuple):
    """The teacher's labels (n,) int64 for random images, and for all candidates among which they were chosen."""

    labels: Tensor
    candidates: Tensor | None = None


def draw(kind: Kind, numbers: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Return the images that a kind makes of these numbers, and labels of their own (see `RandomBatch`), on the CPU."""
    images, labels = (torch.from_numpy(array) for array in (kind.images(numbers), kind.labels(numbers)))
    return images.contiguous(memory_format=torch.channels_last), labels  # as the image loader yields images


class RandomSource(ABC):
    """A source of random images.

    Attributes:
        stopwatch: how long the teacher has worked; this time overlaps with the students'. A pool leaves it at zero.
    """

    def __init__(self, spec: RandomSpec):
        self.spec, self.stopwatch = spec, Stopwatch(spec.device)

    @abstractmethod
    def batches(self, seed: int, epoch: int, numbers: Sequence[int]) -> Iterator[RandomBatch]:
        """Yield each of these batches of an epoch, normalised."""

    @abstractmethod
    def first_labels(self, count: int) -> RandomLabels:
        """Return the teacher's labels for the first `count` random images, or as many as there are."""
