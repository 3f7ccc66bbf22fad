"""Stage one in several processes writes the same file as one process, and reports once."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Result, Zygote
from shared import make_folder, small
from tspipe.errors import CacheError, CacheMismatch, NetworkError, OutOfMemory
from tspipe.extraction import extract as stage
from tspipe.extraction.extract import extract
from tspipe.training.train_teacher import TeacherConfig
from tspipe.utils.distributed import ALONE, Group

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, as a process of its own."""
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


def test_torchrun_writes_the_file_of_one_process(tspipe: Callable[..., Result], zygote: Zygote, tmp_path: Path) -> None:
    """The missing teacher is trained once, and only rank 0 prints."""
    make_folder(tmp_path / "shapes")
    settings = ["teacher.epochs=1", "teacher.batch_size=8", "compute.block_rows=4"]
    command = ["cache", "--dataset", "folder:shapes", "--teacher", "lenet5", *(f"--set={s}" for s in settings)]
    two = run(tmp_path, *TORCHRUN, "-m", "tspipe", *command, "--train-teacher", "--out=two.h5")
    assert two.returncode == 0, two.stderr
    one = tspipe(*command, "--out=one.h5")
    assert one.code == 0, one.err
    assert (tmp_path / "two.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()
    first, accuracy, metrics, *rest = two.stdout.splitlines()
    assert first == "There are no weights for lenet5 on folder:shapes yet, so the teacher is trained first."
    assert (accuracy.split(" ")[:2], metrics.split(" ")[:2]) == (["Test", "accuracy"], ["Its", "metrics"])
    assert rest == one.out.replace("one.h5", "two.h5").splitlines()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "one.h5", "shapes", "two.h5"]

    command[2] = f"folder:{tmp_path}/shapes"
    weights = next((tmp_path / "checkpoints").glob("*.safetensors"))
    out = tmp_path / "two.h5"
    other = zygote.run(*command, "--weights", weights, "--out", out, "--set=compute.batch_size=3", ranks=2)
    assert other.code == 1
    assert sum("Error" in line for line in other.lines) == 1
    assert "two.h5 is another cache: compute.batch_size is 64, not 3." in other.error
    assert sum(line.startswith("Teacher lenet5") for line in other.lines) == 1


def test_no_teacher_is_trained_inside_rank_zero_first(
    tspipe: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training may take hours, so the other ranks wait for it by heartbeat, and it may make collective calls."""
    make_folder(tmp_path / "shapes")
    trained: list[Path | None] = []

    def train(config: TeacherConfig) -> None:
        ALONE.barrier()
        trained.append(config.out)
        raise NetworkError("stop")

    monkeypatch.setattr("tspipe.training.teacher_weights.train_and_report", train)
    result = tspipe("cache", "--dataset", "folder:shapes", "--teacher", "lenet5", "--train-teacher")
    assert (result.code, result.error) == (1, "stop")
    assert trained == [Path("checkpoints/shapes-lenet5.safetensors")]


def test_one_failing_rank_reports_alone(zygote: Zygote, tmp_path: Path) -> None:
    """Rank 0 names the broken images of all; any number of processes can use the blocks that both have written."""
    requested = small(tmp_path / "shapes")
    command = ["cache", "--dataset", requested.recipe.dataset, "--teacher", "lenet5", "--out", requested.out]
    command += ["--weights", tmp_path / "shapes/w.safetensors", "--set=compute.block_rows=4", "--views", 0]
    command += ["--set=preprocess.resize=none", "--set=preprocess.crop=none"]  # as in the recipe without the images
    broken = tmp_path / "shapes/train/b/07.png"  # in block 3, the second of rank 1
    pixels = broken.read_bytes()
    broken.write_bytes(pixels[:100])
    failed = zygote.run(*command, ranks=2)
    assert failed.code == 1
    assert sum("Error" in line for line in failed.lines) == 1
    assert "b/07.png" in failed.error
    assert "Rank 1 stops: another process has failed, or cannot be reached." in failed.lines
    assert not requested.out.exists()
    assert (tmp_path / "shapes.h5.part-1").exists()
    assert "written train 1" in failed.lines

    broken.write_bytes(pixels)
    done = {line.replace("written", "computed") for line in failed.lines if line.startswith("written")}
    again = zygote.run(*command, ranks=3)
    assert again.code == 0
    assert {"computed train 1", "computed train 0"} <= done
    assert not done & set(again.lines)
    data = requested.out.read_bytes()
    requested.out.unlink()
    assert extract(requested).path.read_bytes() == data


def test_a_rank_of_another_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = stage._prepare(small(tmp_path / "shapes"))
    plan = {**job.plan, "compute": {**job.plan["compute"], "device": "cuda"}}
    monkeypatch.setattr(Group, "broadcast", lambda self, value: (plan, {"train": [0], "test": []}))
    with pytest.raises(CacheMismatch) as refused:
        stage._write_part(job, Group(1, 2))
    assert str(refused.value) == (
        "Rank 1 would write another cache than rank 0: compute.device is 'cpu', not 'cuda'. "
        "All machines of a job need the same data, settings and kind of device."
    )


def test_progress_counts_the_images_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's progress is scaled to the images of all ranks: each of 3 blocks of rank 0 counts as 8 images."""
    displayed: list[int] = []

    @contextlib.contextmanager
    def progress(what: str, total: int, unit: str, done: int, visible: bool) -> Iterator[Any]:
        yield lambda count, what: visible and displayed.append(count)

    monkeypatch.setattr(stage, "progress", progress)
    job = stage._prepare(small(tmp_path / "shapes"))
    missing = {split: list(range(job.dimensions.blocks(split))) for split in ("train", "test")}
    for rank in range(3):
        with job.writer(rank) as writer:
            stage._write_share(writer, job, missing, Group(rank, 3))
            assert [writer.missing("train"), writer.missing("test")] == [
                [block for block in missing[split] if block % 3 != rank] for split in ("train", "test")
            ]
    assert displayed == [8, 8, 8]


def test_out_of_memory_on_one_of_many_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names rank 0's part file, which exists whatever this rank has written."""

    def hungry(*_: Any) -> None:
        raise OutOfMemory(4, 2)

    monkeypatch.setattr("tspipe.extraction.forward.run_teacher_on_blocks", hungry)
    job = stage._prepare(small(tmp_path / "shapes"))
    with job.writer(1) as writer, pytest.raises(CacheError) as refused:
        stage._write_share(writer, job, {"train": [0, 1], "test": []}, Group(1, 2))
    assert str(refused.value) == (
        "The teacher runs out of memory with batches of 4 images; batches of 2 fit. Give the command "
        f"--set compute.batch_size=2 after deleting {tmp_path}/shapes.h5.part, which was begun with the larger batches."
    )
