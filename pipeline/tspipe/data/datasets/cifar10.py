"""CIFAR-10: 60,000 colour images of 32×32 in 10 classes, 50,000 for training and 10,000 for testing."""

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tspipe.data.datasets import Images, _archive, from_array

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"
LICENSE = "not stated"
CITATION = "Krizhevsky, A. (2009). Learning Multiple Layers of Features from Tiny Images. University of Toronto."

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
MD5 = {  # of the files in it; from torchvision.datasets.CIFAR10
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def load(root: Path, split: str) -> Images:
    """Return images (N, 32, 32, 3) uint8 from the published python version, unpacked in `root` or as `root` itself.

    Keys are indices; the five training batches follow one another.

    Raises DatasetError: missing, not unpacked, or a file that is not as published.
    """
    files = [f"{FOLDER}/data_batch_1", "data_batch_1"]
    folder = _archive.find("CIFAR-10", root, files, _archive.FETCH, ARCHIVE)
    return load_batches(folder, BATCHES[split], "batches.meta", MD5)


def download(root: Path) -> None:
    """Fetch the published archive (163 MiB) into `root` and unpack it there."""
    _archive.fetch("CIFAR-10", "CIFAR10", root)


def load_batches(folder: Path, batches: Sequence[str], meta: str, md5: Mapping[str, str], prefix: str = "") -> Images:
    """Return the images of these pickled batches in order; `meta` has the class names, `prefix` begins the labels' key.

    Raises DatasetError: a file is missing or its MD5 is not the one in `md5`.
    """
    parts = [_unpickle(folder / batch, md5[batch]) for batch in batches]
    # A row is a plane of red, one of green and one of blue, each row by row.
    rows = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([part[f"{prefix}labels"] for part in parts])
    classes = _unpickle(folder / meta, md5[meta])[f"{prefix}label_names"]
    return from_array(np.ascontiguousarray(rows.transpose(0, 2, 3, 1)), labels, classes)


def _unpickle(path: Path, md5: str) -> dict[str, Any]:
    """Unpickle a file only if it is the published one, since a pickle can run any code."""
    data = _archive.read(path, md5)
    with warnings.catch_warnings():
        # numpy 2.4.0 to 2.4.4 warns of the form of dtypes in pickles of 2009.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        content: dict[str, Any] = pickle.loads(data, encoding="latin1")  # pickled by Python 2
    return content
