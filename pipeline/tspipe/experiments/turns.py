"""Times several ways of doing the same work in short, shuffled turns."""

import random
import time
from collections.abc import Callable

import torch

Way = Callable[[int], object]  # does its work a given number of times
_MIN_TURNS, _MAX_TURNS = 11, 101


class Timer:
    """Times ways on a device, each for about `seconds`, longer where one repetition takes seconds."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.budget = device, seconds

    def turns(self, ways: dict[str, Way], share: float = 1) -> dict[str, list[float]]:
        """Return the seconds of one repetition in each turn, by way; `share` scales the time for this measurement.

        In each turn all ways run for about the same time, in random order, because one may affect the next.
        """
        for way in ways.values():
            way(1)  # warm up
        once = {name: self.seconds(way, 1) for name, way in ways.items()}
        seconds = share * self.budget
        turns = min(_MAX_TURNS, max(_MIN_TURNS, int(seconds / max(once.values()))))
        counts = {name: max(1, round(seconds / turns / each)) for name, each in once.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        shuffle = random.Random(0)
        for _ in range(turns):
            for name in shuffle.sample(list(ways), len(ways)):
                times[name].append(self.seconds(ways[name], counts[name]) / counts[name])
        return times

    def seconds(self, way: Way, count: int) -> float:
        """Return the seconds of `count` repetitions, the device's work included."""
        self._synchronize()
        start = time.perf_counter()
        way(count)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
