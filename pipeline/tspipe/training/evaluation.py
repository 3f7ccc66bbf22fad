"""Test accuracy."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tspipe.data.preprocess import Preprocess
from tspipe.utils.timing import Stopwatch


@torch.no_grad()
def count_correct(
    networks: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[Tensor],
    labels: Iterable[Tensor],
    preprocess: Preprocess,
    stopwatches: Sequence[Stopwatch] = (),
) -> list[int]:
    """How many images each network classifies rightly.

    Args:
        networks: each maps normalised images to logits, in the mode it is in.
        batches: (n, C, H, W) uint8.
        labels: (n,) int64 for each of them, on the networks' device.
        stopwatches: one a network, to time it with.
    """
    correct: list[Tensor | int] = [0] * len(networks)
    for pixels, right in zip(batches, labels, strict=True):
        images = preprocess.normalise(pixels)
        for i, network in enumerate(networks):
            with stopwatches[i].on() if stopwatches else contextlib.nullcontext():
                correct[i] += (network(images).argmax(1) == right).sum()
        del images  # so that the next ones take their memory
    return [int(count) for count in correct]
