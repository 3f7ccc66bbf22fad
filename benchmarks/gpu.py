"""Times stage two on a GPU: python benchmarks/gpu.py CACHE [EPOCHS [DEVICE]], where CACHE holds images.

Prints the time of `tspipe student` for a taught LeNet-5 over EPOCHS; `tspipe bench` with CUDA graphs; and the
floating-point rate of ResNet-18's training steps in bfloat16, as a share of the fastest convolution's. PyTorch counts
the operations. DEVICE cpu is for trying the script.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tspipe.cache import open_cache
from tspipe.recipes.load import recipe_for_cache
from tspipe.training.arms import TAUGHT
from tspipe.training.batches import BatchSource
from tspipe.training.checkpoint import Position
from tspipe.training.config import StudentConfig
from tspipe.training.run_folder import RunFolder, environment
from tspipe.training.trainer import Trainer, open_trainer

CACHE, EPOCHS, DEVICE = [*sys.argv[1:], *("200", "cuda")[len(sys.argv) - 2 :]]
TURNS, STEPS = (7, 20) if DEVICE == "cuda" else (1, 1)
CONVOLUTIONS = [(64, 32), (128, 16), (256, 16), (512, 8), (1024, 16)][: None if DEVICE == "cuda" else 1]  # width, side


def seconds(work: Callable[[], object]) -> float:
    """Return the median of TURNS repetitions, after one to warm up."""
    times = []
    for _ in range(TURNS + 1):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def operations(work: Callable[[], object]) -> int:
    """Count the floating-point operations of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def convolution_rate() -> float:
    """Return the operations per second of the fastest convolution, forward and backward, in bfloat16."""
    best = 0.0
    for channels, side in CONVOLUTIONS:
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layer = layer.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.randn(128, channels, side, side, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        images = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        gradient = torch.randn_like(layer(images))

        def once(layer: nn.Conv2d = layer, images: torch.Tensor = images, gradient: torch.Tensor = gradient) -> None:
            layer(images).backward(gradient)

        def often(once: Callable[[], None] = once) -> None:
            for _ in range(STEPS):
                once()

        best = max(best, operations(once) * STEPS / seconds(often))
    return best


def endless(trainer: Trainer, batches: BatchSource, learner: Any) -> Iterator[int]:
    while True:
        yield from trainer.steps([learner], batches, Position())


def resnet18() -> tuple[float, float]:
    """Return the operations per second of its training steps, data handling included, and the seconds of a step."""
    cache = open_cache(CACHE)
    overrides = [f"device={DEVICE}", "precision=bfloat16", "compile=true", "random_images=0", "batch_size=128"]
    recipe, _ = recipe_for_cache(CACHE, cache.manifest, None, overrides, {"student": ["resnet18"]})
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device(DEVICE)
        trainer = open_trainer(StudentConfig(recipe, cache, (TAUGHT,)), RunFolder(Path(folder), {}, {}), device)
        batches = trainer.batches
        (learner,) = trainer.learners(0)
        (_, batch), *_ = batches.epoch(0, 0, slice(1))
        counted = operations(lambda: sum(part.sum() for part in learner.network(batch.images)).backward())
        steps = endless(trainer, batches, learner)
        one = seconds(lambda: [next(steps) for _ in range(STEPS)]) / STEPS
    return counted / one, one


def main() -> None:
    settings = [f"--set=device={DEVICE}", "--set=compile=true"]
    program = [sys.executable, "-m", "tspipe"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        arguments = ["--student", "lenet5", "--random-images", "0", "--epochs", EPOCHS, "--seeds", "1"]
        subprocess.run(
            [*program, "student", "--cache", CACHE, "--out", f"{folder}/run", *arguments, *settings], check=True
        )
        print(f"lenet5, taught, {EPOCHS} epochs: {time.perf_counter() - start:.1f} s from the command to its end")
    command = [*program, "bench", "--cache", CACHE, "--student", "lenet5", "--json", *settings]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for line in result["lines"]:
        print(f"{line['what']}: {line['ratio']:.3f} ({line['lower']:.3f} to {line['upper']:.3f}), n = {line['n']}")
    fastest, (rate, step) = convolution_rate(), resnet18()
    print(f"resnet18, bfloat16: {1000 * step:.2f} ms a step, {rate / 1e12:.2f} TFLOP/s")
    print(f"the fastest convolution: {fastest / 1e12:.2f} TFLOP/s; resnet18 is at {rate / fastest:.0%} of it")
    machine = environment(DEVICE, torch.get_num_threads())
    print(", ".join(f"{name} {value}" for name, value in machine.items()))


if __name__ == "__main__":
    main()
