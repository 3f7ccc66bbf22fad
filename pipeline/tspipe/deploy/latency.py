"""How long classifiers take for a batch, measured in turns, so that the machine's other load falls on all alike."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_WARM_UP = 3


class Latency(NamedTuple):
    """Milliseconds from uint8 pixels to probabilities: the median and the 95th percentile of n batches."""

    median: float
    p95: float
    n: int


def measure(
    runs: Sequence[Callable[[Tensor], Tensor]], input_shape: tuple[int, int, int], batch_size: int, seconds: float
) -> list[Latency]:
    """Return the latency of each function for batches of random pixels (n, C, H, W); it takes about `seconds` for each.

    Each is run at least five times.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch_size, *input_shape), dtype=torch.uint8, generator=generator)
    for run in runs:
        for _ in range(_WARM_UP):
            run(pixels)
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds * len(runs)
    while runs and (time.perf_counter() < end or len(times[0]) < 5):
        for run, measured in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(pixels)
            measured.append(1000 * (time.perf_counter() - start))
    return [_summarise(torch.tensor(measured)) for measured in times]


def _summarise(milliseconds: Tensor) -> Latency:
    median, p95 = milliseconds.quantile(torch.tensor([0.5, 0.95])).tolist()
    return Latency(median, p95, len(milliseconds))
