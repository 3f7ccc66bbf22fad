"""Tests that need a GPU: make test-gpu. (TSPIPE_TEST_GPU=cpu runs them on a CPU, to test the tests.)"""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from conftest import GPU, Zygote
from shared import pool_config
from tspipe.cache import Cache
from tspipe.extraction.extract import extract
from tspipe.recipes import load
from tspipe.training.arms import ALONE, RANDOM, TAUGHT
from tspipe.training.checkpoint import Position
from tspipe.training.config import StudentConfig
from tspipe.training.run_folder import RunFolder
from tspipe.training.trainer import open_trainer, train_students

pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU: make test-gpu")
ARMS = (ALONE, TAUGHT, RANDOM)
SMALL = ["epochs=2", "seeds=1", "batch_size=100", "random_images=7"]


def config(cache: Cache, out: Path | None, *settings: str) -> StudentConfig:
    facts = {"preprocess": cache.manifest["preprocess"]}
    return StudentConfig(load.load("digits", [*SMALL, *settings], facts=facts), cache, ARMS, out=out)


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Make everything that waits for the GPU raise."""
    if GPU == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if GPU == "cuda":
            torch.cuda.set_sync_debug_mode("default")


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
    for row, other in zip(expected.rows(), result.rows(), strict=True):
        for name in ("mse", "xent") if row["arm"] != ALONE else ("xent",):
            assert other[name] == pytest.approx(row[name], rel=near), (row["arm"], name)


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
        assert len(list(steps)) == 9


def test_the_same_inputs_give_the_same_cache(teacher: Path, tmp_path: Path) -> None:
    one, two = (
        extract(pool_config(teacher, tmp_path / f"{name}.h5", f"compute.device={GPU}")).path.read_bytes()
        for name in ("one", "two")
    )
    assert one == two


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
