"""The python version of CIFAR: pickled batches of 3,072-byte rows, and a pickled list of class names."""

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tspipe.data.datasets import Images, _archive, from_array


def load(folder: Path, batches: Sequence[str], labels: str, meta: str, classes: str, md5: Mapping[str, str]) -> Images:
    """Return the images of these batches, one batch after the other, as (N, 32, 32, 3) uint8.

    Args:
        folder: the folder of the files.
        batches: their file names.
        labels: the key of the labels in a batch.
        meta: the file with the class names.
        classes: the key of the class names in it.
        md5: the MD5 of every file by name.

    Raises DatasetError: a file is missing or not as published.
    """
    parts = [_unpickle(folder / batch, md5[batch]) for batch in batches]
    # A row is a plane of red, one of green and one of blue, each row by row.
    rows = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    numbers = np.concatenate([part[labels] for part in parts])
    return from_array(
        np.ascontiguousarray(rows.transpose(0, 2, 3, 1)), numbers, _unpickle(folder / meta, md5[meta])[classes]
    )


def _unpickle(path: Path, md5: str) -> dict[str, Any]:
    """Unpickle a file only if it is the published one, since a pickle can run any code."""
    data = _archive.check(path, _archive.read(path), md5)
    with warnings.catch_warnings():
        # numpy 2.4.0 to 2.4.4 warns of the form of dtypes in pickles of 2009.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        content: dict[str, Any] = pickle.loads(data, encoding="latin1")  # pickled by Python 2
    return content
