"""A full or forbidden disk gives one sentence; what is on it stays usable, and the same command resumes."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Zygote
from shared import TEACHER
from tspipe.cache import Cache

KEPT = "Existing files are kept. Fix this, then run the same command again."


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not permitted")
    yield folder
    subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """Fill the file system of a folder, except for `left` bytes."""
    filler = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    filler.write_bytes(bytes(free - left))
    yield
    filler.unlink()


def stage_one(teacher: Path, out: Path, *settings: str) -> list[object]:
    flags = [f"--set={setting}" for setting in (*TEACHER, *settings)]
    return ["cache", "--dataset", "digits", "--weights", teacher, "--out", out, *flags]


def stage_two(cache: Path, out: Path) -> list[object]:
    settings = ["epochs=1", "seeds=1", "batch_size=200", "random_images=4", "checkpoint_seconds=0"]
    return ["student", "--cache", cache, "--student", "lenet5", "--out", out, *(f"--set={s}" for s in settings)]


def test_stage_one_on_a_full_disk(zygote: Zygote, digits: Cache, teacher: Path, small_disk: Path) -> None:
    out = small_disk / "digits.h5"
    with filled(small_disk, 300_000):
        result = zygote.run(*stage_one(teacher, out))
        assert result.code == 1
        assert result.error == f"{out}.part cannot be written: No space left on device. {KEPT}"
        assert [path.name for path in small_disk.iterdir()] == ["filler"]
    assert zygote.run(*stage_one(teacher, out)).code == 0
    assert out.read_bytes() == digits.path.read_bytes()


def test_stage_one_at_a_limit_on_files(zygote: Zygote, digits: Cache, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits.h5"
    result = zygote.run(*stage_one(teacher, out), limit=100_000)
    assert result.code == 1
    assert result.error == f"{out}.part cannot be written: File too large. {KEPT}"
    assert list(tmp_path.iterdir()) == []
    assert zygote.run(*stage_one(teacher, out)).code == 0
    assert out.read_bytes() == digits.path.read_bytes()


def test_a_limit_that_is_reached_in_the_middle(zygote: Zygote, teacher: Path, tmp_path: Path) -> None:
    """A write fails although its space was reserved, as on a network disk whose quota was reduced."""
    blocks = "compute.block_rows=16"
    complete, out = tmp_path / "whole.h5", tmp_path / "digits.h5"
    assert zygote.run(*stage_one(teacher, complete, blocks)).code == 0
    part = tmp_path / "digits.h5.part"
    begun = zygote.run(*stage_one(teacher, out, blocks), after="written train")
    assert begun.killed
    assert part.exists()
    result = zygote.run(*stage_one(teacher, out, blocks), limit=part.stat().st_size // 2)
    assert result.code == 1
    assert result.error == f"{part} cannot be written: File too large. {KEPT}"
    assert not out.exists()
    rest = zygote.run(*stage_one(teacher, out, blocks))
    assert rest.code == 0
    done = {line for run in (begun, result) for line in run.lines if line.startswith("written")}
    assert not done & set(rest.lines)  # no block is written twice
    assert out.read_bytes() == complete.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, digits: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run stage two on a disk with space."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert zygote.run(*stage_two(digits.path, out)).code == 0
    return out


@pytest.mark.parametrize("left", [0, 20_000, 120_000])
def test_stage_two_on_a_full_disk(
    zygote: Zygote, digits: Cache, small_disk: Path, undisturbed: Path, left: int
) -> None:
    out = small_disk / "run"
    with filled(small_disk, left):
        result = zygote.run(*stage_two(digits.path, out))
        assert result.code == 1
        assert result.error.startswith(str(out))
        assert result.error.endswith(f" cannot be written: No space left on device. {KEPT}")
    finished = zygote.run(*stage_two(digits.path, out))
    assert finished.code == 0, finished.lines
    for path in undisturbed.glob("student-*"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_read_only_folder(zygote: Zygote, digits: Cache, teacher: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for arguments, name in (
        (stage_one(teacher, locked / "digits.h5"), "digits.h5.lock"),
        (stage_two(digits.path, locked / "run"), "run"),
    ):
        run = zygote.run(*arguments, obey=True)
        assert run.code == 1
        assert run.error == f"{locked}/{name} cannot be written: Permission denied. {KEPT}"
    assert list(locked.iterdir()) == []
