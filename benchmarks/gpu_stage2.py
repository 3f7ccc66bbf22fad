"""Stage two on a GPU: LeNet-5's epochs, a cohort of twelve with live random images, ResNet-18's rate."""

import csv
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gpu_measure
from gpu_session import Session
from tspipe.cache import Cache, open_cache
from tspipe.experiments.baselines import joined
from tspipe.extraction.extract import Contents, ExtractConfig, extract
from tspipe.losses import Target
from tspipe.models import networks, weights
from tspipe.recipes import load
from tspipe.recipes.load import recipe_for_cache
from tspipe.training.arms import RANDOM, TAUGHT, LearnerSpec
from tspipe.training.checkpoint import Position
from tspipe.training.config import StudentConfig
from tspipe.training.learner import Learner
from tspipe.training.live_teacher import LiveTeacher
from tspipe.training.run_folder import RunFolder
from tspipe.training.trainer import Trainer, build_learner, open_trainer
from tspipe.utils.device import use_full_precision

COHORT = 12
CONVOLUTIONS = [(64, 32), (128, 16), (256, 16), (512, 8), (1024, 16)]  # width, side
PAPER_EPOCHS = 200


def run(session: Session) -> None:
    """Measure what stage two costs, on generated images as many and as large as CIFAR-10's."""
    use_full_precision()
    cache = make_cache(session)
    steps_of_lenet5(session, cache)
    cohort(session, cache)
    fastest = convolution_rate(session)
    resnet18(session, cache, fastest, compiled=False)
    for compiled in (False, True):
        epochs_of_lenet5(session, cache, compiled)
    bench(session, cache)
    resnet18(session, cache, fastest, compiled=True)


def make_cache(session: Session) -> Cache:
    counts = (160, 40) if session.tiny else (50_000, 10_000)
    folder = gpu_measure.make_images(session.work / "images-cifar", (32, 32), *counts, "png")
    file = session.work / "resnet56-untrained-cifar.safetensors"
    torch.manual_seed(0)
    weights.save(file, networks.build("resnet56", gpu_measure.CLASSES, (3, 32, 32), {}), {})
    settings = [f"dataset=folder:{folder}", f"compute.device={session.device.type}", "compute.batch_size=1024"]
    config = ExtractConfig(load.load("cifar10", settings), weights.read(file), session.work / "cifar.h5")
    start = time.monotonic()
    cache = extract(replace(config, contents=Contents(images=True)))
    assert cache is not None
    session.record("stage2", "cache of ResNet-56", seconds=time.monotonic() - start, images=sum(counts))
    return open_cache(cache.path)


def trainer_of(session: Session, cache: Cache, folder: str, *settings: str) -> Trainer:
    """Return a trainer of LeNet-5, or of the student that the settings name."""
    overrides = [f"device={session.device.type}", "checkpoint_seconds=1000", *settings]
    overrides += ["batch_size=16", "random_images=4"] if session.tiny else []
    recipe, _ = recipe_for_cache(str(cache.path), cache.manifest, "cifar10", overrides, {})
    run_folder = RunFolder(Path(folder), {}, {})
    return open_trainer(StudentConfig(recipe, cache, (TAUGHT, RANDOM)), run_folder, session.device)


def learners_of(trainer: Trainer, arms: list[str]) -> list[Learner]:
    student = trainer.config.recipe.student[0]
    specs = [LearnerSpec(student, arm, "ts", seed) for seed, arm in enumerate(arms)]
    return [build_learner(trainer.config, trainer.batches.data, spec) for spec in specs]


def endless(trainer: Trainer, learners: list[Learner], *, random: bool = True) -> Callable[[], object]:
    """Return a function that trains on the next batch, as `tspipe student` does."""
    batches = trainer.batches if random else replace(trainer.batches, random=None)

    def steps() -> Iterator[int]:
        for epoch in itertools.count():
            yield from trainer.steps(learners, batches, Position(epoch=epoch))

    return steps().__next__


def bare_step(learner: Learner, images: Tensor, target: Target, device: torch.device) -> Callable[[], object]:
    """Return a training step on this batch, in a CUDA graph that holds the optimiser's step, too."""
    step = plain_step(learner, images, target, device)
    return gpu_measure.graphed(step, device)


def plain_step(learner: Learner, images: Tensor, target: Target, device: torch.device) -> Callable[[], object]:
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(learner.model.parameters(), lr=1e-4, fused=True, capturable=on_gpu)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        _, terms = learner.model(images, target, None)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()

    return step


def graphed_forward(live: LiveTeacher, images: Tensor, device: torch.device) -> Callable[[], object]:
    @torch.inference_mode()
    def forward() -> object:
        return live.teacher(images)

    return gpu_measure.graphed(forward, device)


def steps_of_lenet5(session: Session, cache: Cache) -> None:
    """Time a taught step as tspipe does it, bare, and in a CUDA graph."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(session, cache, folder)
        (learner,) = learners_of(trainer, [TAUGHT])
        (_, batch), *_ = trainer.batches.epoch(0, 0, slice(1))
        ours = endless(trainer, [learner], random=False)
        ways = {
            "as in tspipe student": ours,
            "bare": plain_step(learner, batch.images, batch.target, session.device),
            "in a CUDA graph": bare_step(learner, batch.images, batch.target, session.device),
        }
        for name, way in ways.items():
            session.record("stage2", f"lenet5 step, {name}", ms=1e3 * gpu_measure.seconds(way, session.device))
        kernels = gpu_measure.top_kernels(ours, session.device, 20)
        session.record("stage2", "lenet5, kernels", **kernels)


def cohort(session: Session, cache: Cache) -> None:
    """Time a cohort's step beside the sum of its graphed steps and one pass of the teacher over random images."""
    device, count = session.device, 2 if session.tiny else COHORT
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(session, cache, folder)
        learners = learners_of(trainer, [RANDOM] * count)
        live = trainer.batches.random
        assert isinstance(live, LiveTeacher)
        (_, batch), *_ = trainer.batches.epoch(0, 0, slice(1))
        both = joined(batch)
        ours = endless(trainer, learners)
        step = gpu_measure.seconds(ours, device, 3)
        numbers = itertools.count()
        teacher = gpu_measure.seconds(lambda: live.batch(0, 0, next(numbers)), device)
        assert batch.random is not None
        graphed_teacher = gpu_measure.seconds(graphed_forward(live, batch.random.images, device), device)
        each = [gpu_measure.seconds(bare_step(learner, *both, device), device, 0.2) for learner in learners]
        floor = sum(each) + teacher
        session.record(
            "stage2",
            f"cohort of {count}",
            ms=1e3 * step,
            graphed_steps_ms=1e3 * sum(each),
            teacher_ms=1e3 * teacher,
            graphed_teacher_ms=1e3 * graphed_teacher,
            ratio=step / floor,
        )
        kernels = gpu_measure.top_kernels(ours, device, 10)
        session.record("stage2", f"cohort of {count}, kernels", **kernels)
        steps = [plain_step(learner, *both, device) for learner in learners]
        one = gpu_measure.graphed(gpu_measure.side_by_side(steps, device), device)
        ms = 1e3 * gpu_measure.seconds(one, device)
        session.record("stage2", f"cohort of {count}, all steps in one CUDA graph", ms=ms)


def operations(work: Callable[[], object]) -> int:
    """Count the floating-point operations of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def convolution_rate(session: Session) -> float:
    """Return the operations per second of the fastest convolution, forward and backward, in bfloat16."""
    best = 0.0
    for channels, side in [(4, 8)] if session.tiny else CONVOLUTIONS:
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(session.device, torch.bfloat16)
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        images = torch.randn(128, channels, side, side, device=session.device, dtype=torch.bfloat16)
        images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
        gradient = torch.randn_like(layer(images))

        def once(layer: nn.Conv2d = layer, images: Tensor = images, gradient: Tensor = gradient) -> None:
            layer(images).backward(gradient)

        best = max(best, operations(once) / gpu_measure.seconds(once, session.device, 0.3))
    session.record("stage2", "fastest convolution, bfloat16", tflops=best / 1e12)
    return best


def resnet18(session: Session, cache: Cache, fastest: float, *, compiled: bool) -> None:
    """Record the rate of its training steps in bfloat16, data handling included, beside the fastest convolution."""
    precision = "float32" if session.tiny else "bfloat16"
    settings = [f"precision={precision}", f"compile={str(compiled).lower()}", "student=resnet18"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(session, cache, folder, *settings)
        (learner,) = learners_of(trainer, [TAUGHT])
        (_, batch), *_ = trainer.batches.epoch(0, 0, slice(1))
        counted = operations(lambda: sum(part.sum() for part in learner.network(batch.images)).backward())
        step = endless(trainer, [learner], random=False)
        start = time.monotonic()
        step()
        first = time.monotonic() - start
        one = gpu_measure.seconds(step, session.device, 2)
        ways = {"": one}
        if not compiled:
            graph = bare_step(learner, batch.images, batch.target, session.device)
            ways[", in a CUDA graph"] = gpu_measure.seconds(graph, session.device)
        for way, each in ways.items():
            name = f"resnet18, {precision}{', compiled' if compiled else ''}{way}"
            rate, share = counted / each / 1e12, counted / each / fastest
            session.record("stage2", name, ms=1e3 * each, tflops=rate, share=share, first_step_seconds=first)
        kernels = gpu_measure.top_kernels(step, session.device, 5)
        session.record("stage2", f"resnet18{', compiled' if compiled else ''}, kernels", **kernels)


def epochs_of_lenet5(session: Session, cache: Cache, compiled: bool) -> None:
    """Run `tspipe student` for some epochs; 200 take as long as its start and 200 of the later ones."""
    epochs = 2 if session.tiny else 20
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "tspipe", "student", "--cache", str(cache.path), "--recipe", "cifar10", "--student", "lenet5"]
        command += ["--random-images", "0", "--epochs", str(epochs), "--out", f"{folder}/run"]
        command += ["--set", f"device={session.device.type}", "--set", f"compile={str(compiled).lower()}"]
        command += ["--set", "batch_size=80"] if session.tiny else []
        code, total = session.python(command, session.work)
        with (Path(folder) / "run/metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
    each = statistics.median(float(row["seconds_training"]) + float(row["seconds_testing"]) for row in rows[1:])
    session.record(
        "stage2",
        f"lenet5, {epochs} epochs{', compiled' if compiled else ''}",
        exit_code=code,
        seconds=total,
        seconds_of_an_epoch_on_device=each,
        seconds_of_200_estimated=total + (PAPER_EPOCHS - epochs) * each,
    )


def bench(session: Session, cache: Cache) -> None:
    """Keep the output of `tspipe bench`."""
    command = ["-m", "tspipe", "bench", "--cache", str(cache.path), "--recipe", "cifar10", "--student", "lenet5"]
    command += ["--json", "--seconds", "2" if session.tiny else "40", "--set", f"device={session.device.type}"]
    command += ["--set", "batch_size=16", "--set", "random_images=4"] if session.tiny else []
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys; sys.stdout = open('{folder}/bench.json', 'w'); sys.argv[0] = 'tspipe'"
        code += "; from tspipe.cli.app import main; main()"
        exit_code, seconds = session.python(["-c", code, *command[2:]], session.work)
        text = (Path(folder) / "bench.json").read_text()
    session.record("stage2", "bench", exit_code=exit_code, seconds=seconds, output=json.loads(text) if text else {})
