"""Stage two in several real processes over gloo gives the result of one process, and reports it once."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from conftest import Run, Zygote
from shared import make_folder, pool_config
from tspipe.cache import Cache
from tspipe.extraction.extract import extract
from tspipe.training.partition import SplitBatches, choose_partition
from tspipe.utils.distributed import Group

SETTINGS = ["epochs=2", "seeds=1", "batch_size=100", "random_images=7", "checkpoint_seconds=0"]


def train(
    zygote: Zygote, cache: Cache, out: Path, *arguments: object, ranks: int | None = None, seconds: float | None = None
) -> Run:
    settings = [f"--set={setting}" for setting in SETTINGS]
    command = ["student", "--cache", cache.path, "--out", out, *settings, *arguments]
    return zygote.run(*command, ranks=ranks, seconds=seconds)


def students(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: safetensors.torch.load_file(path) for path in sorted(folder.glob("student-*.safetensors"))}


def assert_close(one: Path, two: Path) -> None:
    """Check that students agree to 1e-5 and metrics accordingly."""
    for (name, tensors), (other, others) in zip(students(one).items(), students(two).items(), strict=True):
        assert name == other
        for key, value in tensors.items():
            torch.testing.assert_close(others[key], value, rtol=0, atol=1e-5)
    for row, other_row in zip(metrics(one), metrics(two), strict=True):
        assert {k: v for k, v in row.items() if isinstance(v, str)} == {
            k: v for k, v in other_row.items() if isinstance(v, str)
        }
        for name, value in row.items():
            if isinstance(value, float):
                near = 2e-3 if "accuracy" in name else 1e-4  # an image near a decision boundary may change its class
                assert other_row[name] == pytest.approx(value, abs=near), name


def metrics(folder: Path) -> list[dict[str, float | str]]:
    rows = csv.DictReader((folder / "metrics.csv").open())
    numbers = {"train_accuracy", "test_accuracy", "mse", "xent"}
    return [{k: float(v) if k in numbers and v else v for k, v in row.items() if "seconds" not in k} for row in rows]


def test_two_processes_split_the_batches_of_one_learner(zygote: Zygote, digits: Cache, tmp_path: Path) -> None:
    """20 Adam steps of 100 + 7 images, which two processes cannot split evenly; they balance the same candidates."""
    settings = ["--set=random_kind=mixed", "--set=random_balanced=true", "--set=random_weight=0.5"]
    one = train(zygote, digits, tmp_path / "one", *settings)
    two = train(zygote, digits, tmp_path / "two", *settings, ranks=2)
    assert (one.code, two.code) == (0, 0), "\n".join(two.lines)
    assert_close(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one/random_labels.json").exists()
    assert (tmp_path / "one/random_labels.json").read_bytes() == (tmp_path / "two/random_labels.json").read_bytes()
    assert sum("Run folder" in line for line in two.lines) == 1
    assert len(two.lines) == len(one.lines)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        path.name for path in (tmp_path / "two").iterdir()
    )


def test_two_processes_split_a_pool_and_images_without_labels(zygote: Zygote, teacher: Path, tmp_path: Path) -> None:
    """Each process takes the cross-entropy's mean over its images with labels, half of those of the batch.

    Adam would enlarge rounding errors where noise makes gradients small.
    """
    for path in make_folder(tmp_path / "more", 8, 0).rglob("*.png"):
        Image.open(path).convert("L").save(path)
    config = pool_config(teacher, tmp_path / "digits.h5")
    cache = extract(replace(config, contents=replace(config.contents, images=True, unlabelled=tmp_path / "more")))
    settings = [
        "--epochs=1",
        "--set=optimizer=sgd",
        "--set=random_source=pool",
        "--random-images=8",
        "--set=unlabelled_images=6",
    ]
    for name, ranks in (("one", None), ("two", 2)):
        run = train(zygote, cache, tmp_path / name, *settings, ranks=ranks)
        assert run.code == 0, run.lines
    assert_close(tmp_path / "one", tmp_path / "two")


def test_a_batch_of_fewer_images_than_processes(zygote: Zygote, digits: Cache, tmp_path: Path) -> None:
    """1,000 images in batches of 499 leave 2 for three processes, so one process has none, not even for the teacher."""
    arguments = ["--random-images=0", "--set=batch_size=499", "--set=view_source=live"]
    assert train(zygote, digits, tmp_path / "one", *arguments).code == 0
    three = train(zygote, digits, tmp_path / "three", *arguments, ranks=3)
    assert three.code == 0, three.lines
    assert_close(tmp_path / "one", tmp_path / "three")


def test_a_split_run_resumes_after_a_kill(zygote: Zygote, digits: Cache, tmp_path: Path) -> None:
    assert train(zygote, digits, tmp_path / "whole", ranks=2).code == 0
    kills = 0
    for seconds in (0.3, 0.6):
        kills += train(zygote, digits, tmp_path / "killed", ranks=2, seconds=seconds).killed
    assert kills
    last = train(zygote, digits, tmp_path / "killed", ranks=2)
    assert last.code == 0, last.lines
    assert_close(tmp_path / "whole", tmp_path / "killed")


def test_processes_share_the_learners_of_a_cohort(zygote: Zygote, digits: Cache, tmp_path: Path) -> None:
    """Four arms in two processes, killed and finished by one process: equal students, rows in order."""
    arguments = ["--compare", "--set=random_kind=mixed"]
    assert train(zygote, digits, tmp_path / "one", *arguments).code == 0
    two = train(zygote, digits, tmp_path / "two", *arguments, ranks=2)
    assert two.code == 0, two.lines
    assert sum("Run folder" in line for line in two.lines) == 1
    train(zygote, digits, tmp_path / "killed", *arguments, ranks=2, seconds=1.5)
    assert train(zygote, digits, tmp_path / "killed", *arguments).code == 0
    for other in ("two", "killed"):
        assert metrics(tmp_path / other) == metrics(tmp_path / "one")
        for name in students(tmp_path / "one"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_non_finite_loss_is_reported_once(zygote: Zygote, digits: Cache, tmp_path: Path) -> None:
    result = train(zygote, digits, tmp_path / "run", "--set=lr=1e30", ranks=2)
    assert result.code == 1
    assert sum("Error" in line for line in result.lines) == 1
    assert "The loss of lenet5-taught-random-seed0 is not finite in epoch 1, step" in result.error
    assert "Rank 1 stops: another process has failed, or cannot be reached." in result.lines


def test_batch_norm_is_not_split_on_the_cpu(zygote: Zygote, digits: Cache, tmp_path: Path) -> None:
    result = train(zygote, digits, tmp_path / "run", "--student=resnet20", ranks=2)
    assert result.code == 1
    sentence = (
        "A student or a loss with batch norm cannot be split between processes on the CPU: its statistics are of the "
        "whole batch, and PyTorch exchanges them between GPUs only. Train it in one process, or train as many "
        "students, arms counted, as there are processes."
    )
    assert sentence in result.error


@pytest.mark.parametrize(
    ("size", "cohort", "shares"),
    [
        (1, "abc", ["abc"]),
        (2, "abc", ["ac", "b"]),
        (3, "abc", ["c", "b", "a"]),
        (4, "abc", ["abc"] * 4),
    ],
)
def test_learners_are_sharded(size: int, cohort: str, shares: list[str]) -> None:
    """Rank 0 trains the last arm, because it counts the labels of its random images."""
    names = ["".join(choose_partition(Group(rank, size), len(cohort)).local_learners(cohort)) for rank in range(size)]
    assert names == shares


def test_the_parts_of_a_split_batch_make_the_batch() -> None:
    rows = torch.arange(178)
    parts = [SplitBatches(Group(rank, 4)).local_rows(rows) for rank in range(4)]
    assert torch.equal(torch.cat(parts), rows)
    assert {len(part) for part in parts} == {44, 45}
