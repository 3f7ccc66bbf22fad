"""What the two sources of random images, the live teacher and the random pool, have in common."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tspipe.data.preprocess import Preprocess
from tspipe.models.output import Output


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


class RandomSource(Protocol):
    """Random images with the teacher's output for them."""

    spec: RandomSpec

    def batches(self, seed: int, epoch: int, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Output]]:
        """Yield normalised images (r, C, H, W) and the teacher's output for each of these batches of an epoch."""
        ...

    def first_labels(self, count: int) -> Tensor:
        """Return the teacher's labels (count,) int64 for the first random images."""
        ...

    def reset_timer(self) -> None:
        """Start counting the teacher's time anew."""
        ...

    def seconds(self) -> float:
        """Return how long the teacher has worked since `reset_timer`."""
        ...
