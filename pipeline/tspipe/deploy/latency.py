"""How long classifiers take for a batch, measured in turns, so that the machine's other load falls on all alike."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tspipe.utils.progress import Advance, progress
from tspipe.utils.threads import available_cores

BATCH_SIZES = (1, 32)
_LEAST = 3  # measured batches
_TURN = 0.05  # seconds
Run = Callable[[Tensor], Tensor]  # images (n, C, H, W) uint8 to probabilities (n, c)


class Latency(NamedTuple):
    """Milliseconds from uint8 pixels to probabilities: the median and the 95th percentile of n batches."""

    batch_size: int
    threads: int
    median: float
    p95: float
    n: int


class Subject(NamedTuple):
    """What is measured: a function of the number of threads that returns one of images, and their shape (C, H, W)."""

    load: Callable[[int], Run]
    input_shape: tuple[int, int, int]


def measure(subjects: Sequence[Subject], seconds: float) -> list[list[Latency]]:
    """Return the latencies of each subject: batches of 1 and 32 images, with one thread and with all.

    Each is measured for about `seconds`, and at least three times.
    """
    threads = sorted({1, available_cores()})
    results: list[list[Latency]] = [[] for _ in subjects]
    with progress("measuring latency", len(BATCH_SIZES) * len(threads) * len(subjects), "latencies") as advance:
        for count, batch_size in itertools.product(threads, BATCH_SIZES):
            with _threads(count):
                runs = [_bind(subject, count, batch_size) for subject in subjects]
                for times, result in zip(_in_turns(runs, seconds, advance), results, strict=True):
                    median, p95 = torch.tensor(times).quantile(torch.tensor([0.5, 0.95])).tolist()
                    result.append(Latency(batch_size, count, median, p95, len(times)))
    return results


def random_pixels(input_shape: tuple[int, int, int], batch_size: int) -> Tensor:
    """Return random images (n, C, H, W) uint8, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch_size, *input_shape), dtype=torch.uint8, generator=generator)


def _bind(subject: Subject, threads: int, batch_size: int) -> Callable[[], object]:
    run, pixels = subject.load(threads), random_pixels(subject.input_shape, batch_size)
    return lambda: run(pixels)


def _in_turns(runs: Sequence[Callable[[], object]], seconds: float, advance: Advance) -> list[list[float]]:
    """Return the milliseconds of calls of each function.

    The first call of a turn is left out if there are more: the turn before has filled the caches with other data.
    """
    for run in runs:
        run()  # the first call may initialise something
    times: list[list[float]] = [[] for _ in runs]
    spent, pending = [0.0] * len(runs), list(range(len(runs)))
    while pending:
        for i in list(pending):
            calls, start = list[float](), time.perf_counter()
            now = start
            while now - start < _TURN:
                runs[i]()
                previous, now = now, time.perf_counter()
                calls.append(1000 * (now - previous))
            times[i] += calls[1:] or calls
            spent[i] += now - start
            if spent[i] >= seconds and len(times[i]) >= _LEAST:
                pending.remove(i)
                advance(1, "measuring latency")
    return times


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let PyTorch use this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
