"""What is not a sound, finished cache is refused before any row is read, in one sentence."""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from forging import forge, overwrite, refusal
from tspipe.cache import Cache, open_cache
from tspipe.errors import CacheDamaged, CacheError, CacheIncomplete, CacheMismatch, NotACache


@pytest.fixture
def copy(digits: Cache, tmp_path: Path) -> Path:
    """A sound cache to spoil."""
    return Path(shutil.copy(digits.path, tmp_path / "digits.h5"))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(NotACache) as refused:
        open_cache(tmp_path / "none.h5")
    assert str(refused.value) == (
        f"There is no file {tmp_path}/none.h5. Make the cache first: tspipe cache --dataset NAME"
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x89HDF"])
def test_not_hdf5(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(content)
    assert refusal(path, NotACache) == "it is not an HDF5 file, so not a tspipe cache."


def test_a_pipe_and_a_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        assert refusal(tmp_path / name) == "it is not a regular file, so not a tspipe cache."


def test_another_hdf5_file(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, 2))
    expected = "it is an HDF5 file, but not a tspipe cache (root attributes `format` and `version`)."
    assert refusal(path, NotACache) == expected


def test_unfinished(copy: Path) -> None:
    overwrite(copy, "id", bytes(64))
    assert refusal(copy, CacheIncomplete) == ("it is not finished. Run the command that makes it again to resume it.")


def test_truncated_and_too_long(copy: Path) -> None:
    data = copy.read_bytes()
    copy.write_bytes(data[:-1])
    size = len(data)
    again = "Get it again from its source."
    assert refusal(copy, NotACache) == f"it is truncated: {size - 1:,} bytes, not {size:,}. {again}"
    copy.write_bytes(data + b"\0")
    assert refusal(copy, NotACache) == f"it is too long: {size + 1:,} bytes, not {size:,}. {again}"
    copy.write_bytes(data[:50])
    assert refusal(copy, NotACache) == "it is truncated: 50 bytes, fewer than any HDF5 file has."


@pytest.mark.parametrize("name", ["manifest", "train_checksums", "id"])
def test_what_the_id_covers_cannot_change(copy: Path, name: str) -> None:
    data = b"g" if name != "manifest" else b'{"block_rows":255'
    overwrite(copy, name, data, at=0)
    assert refusal(copy, CacheDamaged) == "its id does not match its manifest and checksums. Get the file again."


@pytest.mark.parametrize("shape", [[1, 60000, 60000], ["a", "b", "c"], None])
def test_a_forged_input_shape_takes_no_memory(copy: Path, tmp_path: Path, shape: object) -> None:
    from tspipe.recipes import load
    from tspipe.training.config import StudentConfig
    from tspipe.training.trainer import train_students

    forge(copy, lambda manifest: manifest["teacher"]["options"].update(input_shape=shape))
    facts = {"preprocess": open_cache(copy).manifest["preprocess"]}
    with pytest.raises(CacheMismatch) as refused:
        train_students(StudentConfig(load.load("digits", facts=facts), open_cache(copy), out=tmp_path / "run"))
    assert str(refused.value) == (
        f"digits.h5: its teacher takes images of {shape}, its dataset has images of [1, 16, 16]."
    )


def test_a_file_replaced_while_in_use_is_noticed(copy: Path) -> None:
    cache = open_cache(copy)
    copy.write_bytes(copy.read_bytes())
    with pytest.raises(CacheError) as refused:
        cache.train.features.load()
    assert str(refused.value) == f"{copy} was replaced while it was in use. Run the command again."
