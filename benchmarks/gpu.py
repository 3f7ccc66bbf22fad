"""What a GPU makes of stage two: python benchmarks/gpu.py CACHE [EPOCHS [DEVICE]], of a cache with images.

LeNet-5, taught, for so many epochs, from the command to its last line; a cohort's epoch beside CUDA-graphed bare steps
and the teacher (`tspipe bench`); ResNet-18's share of the rate at which the card convolves, in bfloat16: a step's
operations, counted by PyTorch, beside those of the fastest of some convolutions. DEVICE cpu is for trying the script.
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
    """The median of some turns, after one to warm up."""
    result = []
    for _ in range(TURNS + 1):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        result.append(time.perf_counter() - start)
    return statistics.median(result[1:])


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of convolutions and matrix products, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def convolving() -> float:
    """Operations a second of the fastest convolution, forward and backward, in bfloat16."""
    best = 0.0
    for channels, side in CONVOLUTIONS:
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layer = layer.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.randn(128, channels, side, side, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        images = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        over = torch.randn_like(layer(images))

        def once(layer: nn.Conv2d = layer, images: torch.Tensor = images, over: torch.Tensor = over) -> None:
            layer(images).backward(over)

        def often(once: Callable[[], None] = once) -> None:
            for _ in range(STEPS):
                once()

        best = max(best, operations(once) * STEPS / seconds(often))
    return best


def endless(trainer: Trainer, batches: BatchSource, learner: Any) -> Iterator[int]:
    while True:
        yield from trainer.steps([learner], batches, Position())


def resnet18() -> tuple[float, float]:
    """Operations a second of its training steps, data handling and all, and the seconds of one."""
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
        arguments = [
            "--student",
            "lenet5",
            "--random-images",
            "0",
            "--epochs",
            EPOCHS,
            "--seeds",
            "1",
            "--out",
            f"{folder}/run",
        ]
        subprocess.run([*program, "student", "--cache", CACHE, *arguments, *settings], check=True)
        print(f"lenet5, taught, {EPOCHS} epochs: {time.perf_counter() - start:.1f} s from the command to its end")
    command = [*program, "bench", "--cache", CACHE, "--student", "lenet5", "--json", *settings]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for line in result["lines"]:
        print(f"{line['what']}: {line['ratio']:.3f} ({line['lower']:.3f} to {line['upper']:.3f}), n = {line['n']}")
    most, (rate, step) = convolving(), resnet18()
    print(f"resnet18, bfloat16: {1000 * step:.2f} ms a step, {rate / 1e12:.2f} TFLOP/s")
    print(f"the fastest convolution: {most / 1e12:.2f} TFLOP/s; resnet18 is at {rate / most:.0%} of it")
    machine = environment(DEVICE, torch.get_num_threads())
    print(", ".join(f"{name} {value}" for name, value in machine.items()))


if __name__ == "__main__":
    main()
