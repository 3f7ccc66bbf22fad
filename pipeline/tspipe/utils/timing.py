"""Clocks: for checkpoints, and for the time that a device works."""

import contextlib
import time
from collections.abc import Iterator

import torch


class Clock:
    """Tells when the next checkpoint is due."""

    def __init__(self, every: float):
        self.every, self._last = every, time.monotonic()

    def due(self) -> bool:
        """Whether `every` seconds have passed since it last returned True."""
        now = time.monotonic()
        if now - self._last < self.every:
            return False
        self._last = now
        return True


class Stopwatch:
    """Adds up the seconds between `start` and `stop`; on a GPU those of its work, without waiting for it."""

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Reset to zero."""
        self._sum = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Start counting."""
        if self._gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop counting."""
        if self._gpu:
            self._events[-1][1].record()
        else:
            self._sum += time.perf_counter() - self._started

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Count the time of the block."""
        self.start()
        yield
        self.stop()

    def seconds(self) -> float:
        """Return the seconds counted; this waits for a GPU."""
        if self._gpu:
            torch.cuda.synchronize()
            return float(sum(start.elapsed_time(stop) for start, stop in self._events)) / 1000
        return self._sum
