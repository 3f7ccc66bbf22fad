"""Fashion-MNIST: 70,000 grey images of 28×28 in 10 classes of clothing, 60,000 for training and 10,000 for testing."""

import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tspipe.data.datasets import Images, _archive, from_array
from tspipe.errors import DatasetError

SOURCE = "https://github.com/zalandoresearch/fashion-mnist"
LICENSE = "MIT"
CITATION = (
    "Xiao, H., Rasul, K. and Vollgraf, R. (2017). "
    "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms. arXiv 1708.07747."
)
CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip

# Of their contents. These are checked, so that unpacked files are accepted too, and files that were packed again, such
# as those of Debian's dataset-fashion-mnist.
MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
FOLDERS = [".", "raw", "FashionMNIST/raw"]  # the last is where torchvision puts the files


def load(root: Path, split: str) -> Images:
    """Return images (N, 28, 28, 1) uint8 from the four idx files, .gz or unpacked, in `root` or torchvision's folder.

    Raises DatasetError: missing, or a file that is not as published.
    """
    first = "train-images-idx3-ubyte"
    files = [str(Path(folder, first + end)) for folder in FOLDERS for end in (".gz", "")]
    folder = _archive.find("Fashion-MNIST", root, files, _archive.FETCH)
    prefix = "train" if split == "train" else "t10k"
    images = _read(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise DatasetError(f"{folder}: {prefix} has {len(images)} images and {len(labels)} labels.")
    return from_array(images[..., None], labels, CLASSES)


def download(root: Path) -> None:
    """Fetch the four published files (29 MiB) into `root`/FashionMNIST/raw."""
    _archive.fetch("Fashion-MNIST", "FashionMNIST", root)


def _read(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file: two zeros, 8 for unsigned bytes, the number of dimensions, their big-endian sizes, bytes."""
    packed = folder / f"{name}.gz"
    path = packed if packed.exists() else folder / name
    data = _archive.read(path, MD5[name])
    start = 4 + 4 * dimensions
    shape = struct.unpack_from(f">{dimensions}I", data, 4) if len(data) >= start else ()
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != start + math.prod(shape):
        raise DatasetError(f"{path} is not an idx file of unsigned bytes in {dimensions} dimensions.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()  # writeable, as torch wants it
