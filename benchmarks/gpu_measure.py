"""What both stages need on a GPU: images, times, CUDA graphs and the kernels that take longest."""

import statistics
import time
from collections.abc import Callable
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]
CLASSES = 10


def make_images(folder: Path, size: tuple[int, int], train: int, test: int, suffix: str) -> Path:
    """Write images (width, height) of smooth noise as folder/SPLIT/CLASS/N.suffix, unless they are there; all cores."""
    if not folder.exists():
        parts = [(split, name) for split in ("train", "test") for name in range(CLASSES)]
        counts = {"train": train // CLASSES, "test": test // CLASSES}
        with Pool() as pool:
            pool.starmap(_write_class, [(folder, size, suffix, counts[split], split, name) for split, name in parts])
    return folder


def _write_class(folder: Path, size: tuple[int, int], suffix: str, count: int, split: str, name: int) -> None:
    draw = np.random.default_rng([name, len(split)])
    target = folder / split / f"class{name}"
    target.mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
        noise = draw.integers(0, 16, (size[1], size[0], 3), dtype=np.uint8)
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) // 2 + noise
        Image.fromarray(pixels).save(target / f"{number:05}.{suffix}", quality=90)


def seconds(work: Work, device: torch.device, budget: float = 1.0, turns: int = 5) -> float:
    """Return the median seconds of the work in some turns, which together take about `budget` seconds.

    On a CPU, where this is tried, the work runs three times in all.
    """

    def timed(count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            work()
        synchronize(device)
        return (time.perf_counter() - start) / count

    if device.type == "cpu":
        return min(timed(1) for _ in range(3))
    timed(2)  # load kernels
    count = max(1, int(budget / turns / timed(1)))
    return statistics.median(timed(count) for _ in range(turns))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def graphed(step: Work, device: torch.device) -> Work:
    """Return the replay of a CUDA graph of the step; on a CPU, the step. The step runs three times before."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the live teacher may work in another thread
        step()
    return graph.replay


def side_by_side(steps: list[Work], device: torch.device) -> Work:
    """Return a step that runs these in a stream each, so that a graph of it may run them at the same time."""
    streams = [torch.cuda.Stream() for _ in steps] if device.type == "cuda" else []

    def step() -> None:
        if not streams:
            for one in steps:
                one()
            return
        current = torch.cuda.current_stream()
        for stream, one in zip(streams, steps, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                one()
        for stream in streams:
            current.wait_stream(stream)

    return step


def top_kernels(work: Work, device: torch.device, repeats: int, top: int = 20) -> dict[str, Any]:
    """Profile repetitions of the work, one on a CPU; return their milliseconds, those of the GPU, and what takes most.

    Kernels and operators are [name, number of calls, microseconds in all].
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    repeats = repeats if device.type == "cuda" else 1
    work()
    synchronize(device)
    with profile(activities=activities) as trace:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        wall = time.perf_counter() - start
    averages = trace.key_averages()
    kernels = [e for e in averages if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    operators = [event for event in averages if event.device_type == DeviceType.CPU]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    operators.sort(key=lambda event: -event.self_cpu_time_total)
    return {
        "repeats": repeats,
        "milliseconds": 1e3 * wall,
        "milliseconds_on_gpu": sum(event.self_device_time_total for event in kernels) / 1e3,
        "kernels": [[event.key[:100], event.count, event.self_device_time_total] for event in kernels[:top]],
        "operators": [[event.key[:100], event.count, event.self_cpu_time_total] for event in operators[:top]],
    }
