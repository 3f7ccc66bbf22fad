"""Times the optimisations of the live teacher and of students: python benchmarks/forward.py [NETWORK [IMAGES]]

First one pass of the teacher over random images: as a plain network, with freed memory kept, frozen for inference
(batch norms folded, channels-last), compiled by torch.compile, and in bfloat16. Then training steps of students:
channels-first, channels-last, compiled, and in bfloat16. Each runs in a process of its own, because kept memory stays
kept.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from tspipe.losses.ts import ts_loss
from tspipe.models import feature_net, networks
from tspipe.models.inference import freeze
from tspipe.models.probe import probe_images
from tspipe.utils.memory import keep_freed_memory
from tspipe.utils.threads import available_cores

SHAPE, TURNS, BATCH = (3, 32, 32), 9, 128
TEACHER = ("plain", "kept", "frozen", "compiled", "bfloat16")
STUDENTS = ("channels-first", "channels-last", "compiled", "bfloat16")


def teacher(way: str, name: str, count: int) -> Callable[[], object]:
    torch.manual_seed(0)
    module = networks.build(name, 10, SHAPE, {}).eval()
    images = torch.rand(count, *SHAPE)
    if way != "plain":
        keep_freed_memory()
    if way in ("plain", "kept"):
        network: nn.Module = feature_net.split(module, name, probe_images(SHAPE))
    else:
        images = images.contiguous(memory_format=torch.channels_last)
        network = frozen = freeze(module, name, SHAPE, torch.device("cpu"))
        if way == "bfloat16":
            frozen.precision = torch.bfloat16
        if way == "compiled":
            network = torch.compile(network)  # type: ignore[assignment]

    @torch.inference_mode()
    def run() -> object:
        return network(images)

    return run


def student(way: str, name: str, _: int) -> Callable[[], object]:
    keep_freed_memory()
    torch.manual_seed(0)
    module = networks.build(name, 10, SHAPE, {})
    network: nn.Module = feature_net.student_of(module, name, 64, 10, probe_images(SHAPE))
    network.precision = torch.bfloat16 if way == "bfloat16" else torch.float32
    images, features, labels = torch.rand(BATCH, *SHAPE), torch.rand(BATCH, 64), torch.randint(0, 10, (BATCH,))
    if way != "channels-first":
        images = images.contiguous(memory_format=torch.channels_last)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    if way == "compiled":
        network = torch.compile(network)  # type: ignore[assignment]

    def run() -> None:
        loss = sum(ts_loss(*network(images), features, labels).values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()

    return run


def main() -> None:
    name, count = (*sys.argv[1:], *("resnet56", "178")[len(sys.argv) - 1 :])
    threads = f"{torch.get_num_threads()} threads of {available_cores()} cores"
    print(f"torch {torch.__version__}, {threads}, n = {TURNS} a process")
    works = [("teacher", name, TEACHER)]
    works += [("student", network, STUDENTS) for network in ("lenet5", "alexnet", "mobilenet_v2", "resnet18")]
    for kind, network, ways in works:
        print(f"{kind} {network}, {count if kind == 'teacher' else BATCH} images, ms: median (min to max)")
        for way in ways:
            done = subprocess.run(
                [sys.executable, __file__, "one", kind, network, way, count], check=True, capture_output=True, text=True
            )
            print(f"  {way:15}{done.stdout}", end="", flush=True)


def one(kind: str, network: str, way: str, count: str) -> None:
    run = (teacher if kind == "teacher" else student)(way, network, int(count))
    start = time.perf_counter()
    run()
    first, seconds = time.perf_counter() - start, []
    run()
    for _ in range(TURNS):
        start = time.perf_counter()
        run()
        seconds.append(1000 * (time.perf_counter() - start))
    middle = statistics.median(seconds)
    print(f"{middle:7.1f} ({min(seconds):.1f} to {max(seconds):.1f}), first after {first:.1f} s")


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1:2] == ["one"] else main()
