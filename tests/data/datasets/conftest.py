"""Tiny archives in each dataset's published layout, with checksums to match."""

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared import write_picture
from tspipe.data.datasets import cifar10, cifar100, fashion_mnist

Patch = pytest.MonkeyPatch


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: Patch) -> Callable[[str], Path]:
    """`archive(name)` makes a tiny archive of that dataset and gives its root."""

    def make(name: str) -> Path:
        if name not in MAKERS:
            pytest.fail(
                f"datasets/{name}.py has no tiny archive to be tested on: add a maker of one to MAKERS in "
                "tests/datasets/conftest.py."
            )
        root = tmp_path / name
        root.mkdir()
        MAKERS[name](root, monkeypatch)
        return root

    return make


@pytest.fixture
def picture() -> Callable[..., None]:
    """`picture(path, …)` writes an image file."""
    return write_picture


def python2_pickle(value: object) -> bytes:
    """A pickle as Python 2 and the numpy of 2009 wrote it: byte strings, and a dtype whose flags are integers."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: object) -> bytes:
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"(" + b"".join(map(_pickled, value)) + b"l"
    if isinstance(value, dict):
        return b"(" + b"".join(_pickled(key) + _pickled(item) for key, item in value.items()) + b"d"
    assert isinstance(value, np.ndarray)
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    shape = b"(" + b"".join(map(_pickled, value.shape)) + b"t"
    content = b"T" + struct.pack("<i", value.nbytes) + value.tobytes()
    return empty + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"


def make_cifar10(root: Path, monkeypatch: Patch, rows: int = 4) -> None:
    """Five training batches and a test batch; label and first pixel are (batch + row) mod 10, counted from 0."""
    files = {"batches.meta": python2_pickle({"label_names": list("abcdefghij"), "num_vis": 3072})}
    for number, name in enumerate([*cifar10.BATCHES["train"], "test_batch"]):
        labels = [(number + row) % 10 for row in range(rows)]
        files[name] = python2_pickle({"data": _rows(number, labels), "labels": labels})
    _write(root / cifar10.FOLDER, files)
    monkeypatch.setattr(cifar10, "MD5", _md5(files))


def make_cifar100(root: Path, monkeypatch: Patch) -> None:
    """Six images a split, their fine labels 94 to 99, their coarse labels 0."""
    labels = list(range(94, 100))
    files = {"meta": python2_pickle({"fine_label_names": [f"c{i}" for i in range(100)], "coarse_label_names": ["x"]})}
    for seed, name in enumerate(["train", "test"]):
        files[name] = python2_pickle({"data": _rows(seed, labels), "fine_labels": labels, "coarse_labels": [0] * 6})
    _write(root / cifar100.FOLDER, files)
    monkeypatch.setattr(cifar100, "MD5", _md5(files))


def _rows(seed: int, labels: list[int]) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), np.uint8)
    rows[:, 0] = labels  # red of the upper left pixel
    return rows


def make_fashion_mnist(root: Path, monkeypatch: Patch) -> None:
    """Twelve training and ten test images as .gz; label i mod 10."""
    files = {}
    for prefix, n in [("train", 12), ("t10k", 10)]:
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        files[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4I", 0x803, n, 28, 28) + pixels.tobytes()
        files[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2I", 0x801, n) + labels.tobytes()
    _write(root, {f"{name}.gz": gzip.compress(data) for name, data in files.items()})
    monkeypatch.setattr(fashion_mnist, "MD5", _md5(files))


def make_cub200(root: Path, monkeypatch: Patch) -> None:
    """Two classes of three images, one of them grey; the second image of each is for testing."""
    names = [f"{label:03}.Bird_{label}/Bird_{label}_{i:04}.jpg" for label in (1, 2) for i in range(3)]
    for name in names:
        write_picture(root / "CUB_200_2011/images" / name, mode="L" if name == names[0] else "RGB")
    text = {
        "classes.txt": ["1 001.Bird_1", "2 002.Bird_2"],
        "images.txt": [f"{i} {name}" for i, name in enumerate(names, 1)],
        "image_class_labels.txt": [f"{i} {1 + (i > 3)}" for i in range(1, 7)],
        "train_test_split.txt": [f"{i} {int(i not in (2, 5))}" for i in range(1, 7)],
    }
    _write(root / "CUB_200_2011", {name: "".join(f"{line}\n" for line in text[name]).encode() for name in text})


def make_folder(root: Path, monkeypatch: Patch) -> None:
    """Classes cat and dog; one image lies a folder deeper."""
    for name in ["train/cat/b.png", "train/cat/deep/a.jpg", "train/dog/1.jpg", "test/cat/c.jpg", "test/dog/2.PNG"]:
        write_picture(root / name)


MAKERS: dict[str, Callable[[Path, Patch], None]] = {
    "cifar10": make_cifar10,
    "cifar100": make_cifar100,
    "cub200": make_cub200,
    "digits": lambda root, monkeypatch: None,  # comes with scikit-learn
    "fashion_mnist": make_fashion_mnist,
    "folder": make_folder,
}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _md5(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
