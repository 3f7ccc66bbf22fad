"""Tests that need a GPU: make test-gpu. (TSPIPE_TEST_GPU=cpu runs them on a CPU, to test the tests.)"""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from conftest import GPU, Zygote
from shared import interrupted_at, pool_config
from tspipe.cache import Cache
from tspipe.data.preprocess import Preprocess
from tspipe.errors import OutOfMemory
from tspipe.extraction.extract import extract
from tspipe.extraction.forward import run_teacher_on_blocks
from tspipe.models.feature_net import FeatureNet
from tspipe.recipes import load
from tspipe.training.arms import ALONE, RANDOM, TAUGHT
from tspipe.training.checkpoint import Position
from tspipe.training.config import StudentConfig
from tspipe.training.run_folder import RunFolder
from tspipe.training.trainer import open_trainer, train_students
from tspipe.utils import distributed

pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU: make test-gpu")
ARMS = (ALONE, TAUGHT, RANDOM)
SMALL = ["epochs=2", "seeds=1", "batch_size=100", "random_images=7"]


def config(cache: Cache, out: Path | None, *settings: str) -> StudentConfig:
    facts = {"preprocess": cache.manifest["preprocess"]}
    return StudentConfig(load.load("digits", [*SMALL, *settings], facts=facts), cache, ARMS, out=out)


def assert_same_losses(expected: RunFolder, result: RunFolder, near: float) -> None:
    for row, other in zip(expected.rows(), result.rows(), strict=True):
        for name in ("mse", "xent") if row["arm"] != ALONE else ("xent",):
            assert other[name] == pytest.approx(row[name], rel=near), (row["arm"], name)


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Make everything that waits for the GPU raise, also in other threads; fail if the profiler sees a wait."""
    waits = {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
    set_mode = torch.cuda.set_sync_debug_mode if GPU == "cuda" else lambda mode: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU == "cuda" else [])]
    with profile(activities=activities) as trace:
        set_mode("error")
        try:
            with record_function("steps"):
                yield
        finally:
            set_mode("default")  # the end of a profile waits
    events = [event for event in trace.events() if event.device_type == DeviceType.CPU]
    (steps,) = (event.time_range for event in events if event.name == "steps")
    during = [event.name for event in events if steps.start <= event.time_range.start <= steps.end]
    assert not waits.intersection(during)


@pytest.mark.parametrize(
    ("settings", "near"),
    [
        ([], 1e-3),
        (["random_source=pool"], 1e-3),
        (["compile=true"], 1e-3),
        (["memory=20kB"], 1e-3),
        (["precision=bfloat16", "live_precision=bfloat16"], 0.1),
    ],
    ids=str,
)
def test_students_learn_as_on_the_cpu(settings: list[str], near: float, pool: Cache, tmp_path: Path) -> None:
    same = [setting for setting in settings if "random_source" in setting]
    expected = train_students(config(pool, tmp_path / "cpu", "device=cpu", *same))
    result = train_students(config(pool, tmp_path / "gpu", f"device={GPU}", *settings))
    assert_same_losses(expected, result, near)


@pytest.mark.parametrize("source", ["live", "pool"])
def test_nothing_waits_for_the_gpu_within_an_epoch(source: str, pool: Cache, tmp_path: Path) -> None:
    trainer = open_trainer(
        config(pool, None, f"device={GPU}", f"random_source={source}", "checkpoint_seconds=1000"),
        RunFolder(tmp_path, {}, {}),
        torch.device(str(GPU)),
    )
    learners, batches = trainer.learners(0), trainer.batches
    for _ in trainer.steps(learners, batches, Position()):  # the first epoch loads kernels and fills buffers
        pass
    steps = trainer.steps(learners, batches, Position(epoch=1))
    next(steps)  # the order of the images is copied when an epoch starts
    with no_synchronisation():
        for _ in range(9):
            next(steps)
    assert list(steps) == []  # the end of an epoch reads the metrics


def test_a_run_resumes(pool: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Atomic additions of the GPU are in no particular order, so results are equal to rounding."""
    expected = train_students(config(pool, tmp_path / "one", f"device={GPU}"))
    settings = config(pool, tmp_path / "two", f"device={GPU}", "checkpoint_seconds=0")
    with monkeypatch.context() as patch:
        interrupted_at(patch, 40)  # in the second epoch of three learners with ten batches each
        with pytest.raises(KeyboardInterrupt):
            train_students(settings)
    assert_same_losses(expected, train_students(settings), 1e-3)


def test_the_same_inputs_give_the_same_cache(teacher: Path, tmp_path: Path) -> None:
    one, two = (
        extract(pool_config(teacher, tmp_path / f"{name}.h5", f"compute.device={GPU}")).path.read_bytes()
        for name in ("one", "two")
    )
    assert one == two


def test_features_are_those_of_the_cpu(teacher: Path, tmp_path: Path) -> None:
    expected, features = (
        np.asarray(extract(pool_config(teacher, tmp_path / name, f"compute.device={device}")).train.features[:])
        for name, device in (("cpu.h5", "cpu"), ("gpu.h5", str(GPU)))
    )
    np.testing.assert_allclose(features, expected, atol=2e-3 * np.abs(expected).max())  # of float16's 11 bits


@pytest.mark.skipif(GPU != "cuda", reason="the memory of a CPU cannot be limited")
def test_without_memory_a_batch_that_fits_is_named() -> None:
    convolution = nn.Conv2d(3, 512, 3, padding=1)
    backbone = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = FeatureNet(backbone, nn.Linear(512, 10)).cuda().eval()
    pixels = np.zeros((256, 64, 64, 3), np.uint8)  # 2 GiB after the convolution
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        with pytest.raises(OutOfMemory, match=r"batches of 256 images; batches of \d+ fit") as error:
            run_teacher_on_blocks(network, Preprocess((0.5,) * 3, (0.5,) * 3), 256, pixels, "train", 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < error.value.fits < 256


@pytest.mark.skipif(GPU != "cuda", reason="NCCL needs a GPU")
def test_gradients_of_a_group_are_those_of_one_process() -> None:
    """A group of one: NCCL takes no second process on the same GPU."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4)).cuda()
    images = torch.rand(16, 3, 8, 8, device="cuda")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module(images).square().sum().backward()
        expected = [parameter.grad.clone() for parameter in module.parameters()]
        wrapped = distributed.Group().wrap_ddp(module.train(), torch.device("cuda", 0))
        wrapped.zero_grad()
        wrapped(images).square().sum().backward()
        for parameter, gradient in zip(wrapped.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3)
    finally:
        dist.destroy_process_group()
        distributed._nccl_group.cache_clear()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_batch_norm_is_of_the_whole_batch(zygote: Zygote, digits: Cache, tmp_path: Path) -> None:
    """SyncBatchNorm in two processes gives the statistics of batch norm in one."""
    settings = [f"--set={setting}" for setting in (*SMALL, "epochs=1", "device=cuda")]
    for name, ranks in (("one", None), ("two", 2)):
        command = ["student", "--cache", digits.path, "--student", "resnet20", "--out", tmp_path / name, *settings]
        result = zygote.run(*command, ranks=ranks)
        assert result.code == 0, result.lines
    rows = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        assert float(two["mse"]) == pytest.approx(float(one["mse"]), rel=1e-2)
    one, two = (
        safetensors.torch.load_file(next((tmp_path / name).glob("student-*.safetensors"))) for name in ("one", "two")
    )
    means = [key for key in one if key.endswith("running_mean")]
    assert means
    for key in means:
        torch.testing.assert_close(two[key], one[key], rtol=1e-2, atol=1e-2)
