import gzip
import hashlib
import struct

import numpy as np
import pytest

from tspipe.data.datasets import _archive, fashion_mnist
from tspipe.errors import DatasetError


@pytest.fixture
def root(archive):
    return archive("fashion_mnist")


def test_images_and_labels(root):
    train, test = fashion_mnist.load(root, "train"), fashion_mnist.load(root, "test")
    assert train.array.shape == (12, 28, 28, 1)
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert test.array.shape == (10, 28, 28, 1)
    assert test.keys == [str(i) for i in range(10)]
    stored = gzip.decompress((root / "train-images-idx3-ubyte.gz").read_bytes())
    assert train.array.tobytes() == stored[16:]


@pytest.mark.parametrize("folder", ["raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_where_torchvision_puts_them(root, folder, unpacked):
    expected = fashion_mnist.load(root, "train").array
    (root / folder).mkdir(parents=True)
    for path in list(root.glob("*.gz")):
        data = path.read_bytes()
        name = path.name.removesuffix(".gz") if unpacked else path.name
        (root / folder / name).write_bytes(gzip.decompress(data) if unpacked else data)
        path.unlink()
    np.testing.assert_array_equal(fashion_mnist.load(root, "train").array, expected, strict=True)


def test_packed_again_is_the_same_data(root):
    path = root / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1, mtime=7))
    assert len(fashion_mnist.load(root, "test")) == 10


@pytest.mark.parametrize("unpacked", [False, True])
def test_another_file(root, unpacked):
    name = "train-images-idx3-ubyte"
    data = bytearray(gzip.decompress((root / f"{name}.gz").read_bytes()))
    data[-1] ^= 1
    (root / f"{name}.gz").unlink()
    path = root / (name if unpacked else f"{name}.gz")
    path.write_bytes(data if unpacked else gzip.compress(data))
    with pytest.raises(DatasetError) as problem:
        fashion_mnist.load(root, "train")
    assert str(problem.value) == (
        f"{path} is not the published file: its MD5 is {hashlib.md5(data).hexdigest()}, that of the published one "
        f"{fashion_mnist.MD5[name]}. Remove it and fetch it again (--download)."
    )


def test_truncated_gz(root):
    path = root / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DatasetError) as problem:
        fashion_mnist.load(root, "train")
    assert str(problem.value) == (
        f"{path} cannot be read: Compressed file ended before the end-of-stream marker was reached."
    )


def test_no_gz_at_all(root):
    path = root / "train-labels-idx1-ubyte.gz"
    path.write_bytes(b"<html>")
    with pytest.raises(DatasetError) as problem:
        fashion_mnist.load(root, "train")
    assert str(problem.value) == f"{path} cannot be read: Not a gzipped file (b'<h')."


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack(">2I", 0x801, 3),
        struct.pack(">2I", 0x801, 3) + bytes(4),
        struct.pack(">2I", 0x803, 3) + bytes(3),
        struct.pack(">2I", 0x80D, 3) + bytes(3),
        struct.pack(">2I", 0x10801, 3) + bytes(3),
    ],
)
def test_header_and_length(data, root, monkeypatch):
    name = "train-labels-idx1-ubyte"
    path = root / f"{name}.gz"
    path.write_bytes(gzip.compress(data))
    monkeypatch.setitem(fashion_mnist.MD5, name, hashlib.md5(data).hexdigest())
    with pytest.raises(DatasetError) as problem:
        fashion_mnist.load(root, "train")
    assert str(problem.value) == f"{path} is not an idx file of unsigned bytes in 1 dimensions."


def test_counts_must_agree(root, monkeypatch):
    data = struct.pack(">2I", 0x801, 3) + bytes(3)
    (root / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(data))
    monkeypatch.setitem(fashion_mnist.MD5, "train-labels-idx1-ubyte", hashlib.md5(data).hexdigest())
    with pytest.raises(DatasetError) as problem:
        fashion_mnist.load(root, "train")
    assert str(problem.value) == f"{root}: train has 12 images and 3 labels."


def test_a_gz_that_unpacks_without_end(root, monkeypatch):
    monkeypatch.setattr(_archive, "_LARGEST", 20_000)
    (root / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(50_000)))
    with pytest.raises(DatasetError) as problem:
        fashion_mnist.load(root, "train")
    assert hashlib.md5(bytes(20_000)).hexdigest() in str(problem.value)


def test_nothing_there(tmp_path):
    with pytest.raises(DatasetError) as problem:
        fashion_mnist.load(tmp_path, "train")
    name = "train-images-idx3-ubyte"
    assert str(problem.value) == (
        f"There is no Fashion-MNIST in {tmp_path}: looked for {name}.gz, {name}, raw/{name}.gz, raw/{name}, "
        f"FashionMNIST/raw/{name}.gz, FashionMNIST/raw/{name}. "
        "Give its folder (--data FOLDER) or fetch it (--download)."
    )


def test_classes_are_those_of_torchvision():
    published = pytest.importorskip("torchvision.datasets")
    assert published.FashionMNIST.classes == fashion_mnist.CLASSES
