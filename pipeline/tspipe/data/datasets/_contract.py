"""Checks of what a dataset's `load` returns, made once where it enters."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from tspipe.data.datasets import Images, Pixels
from tspipe.errors import DatasetError


def check_images(images: Any, dataset: str, split: str) -> Images:
    """Return a split whose `read` checks each image; raise DatasetError if it breaks the contract of `Images`.

    Args:
        images: what `load(root, split)` returned.
        dataset: the dataset's name, for the message.
    """
    where = f"{dataset}, split {split}"
    if not isinstance(images, Images):
        raise DatasetError(f"{where}: load returns {type(images).__name__}. Return tspipe.data.datasets.Images.")
    _check_names(where, "classes", images.classes)
    _check_labels(where, images)
    if len(images.keys) != len(images.labels):
        raise DatasetError(
            f"{where}: {len(images.keys)} keys for {len(images.labels)} labels. Return one key per image."
        )
    _check_names(where, "keys", images.keys)

    def read(index: int) -> Pixels:
        pixels: Any = images.read(index)
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size):
            raise DatasetError(
                f"{where}: read({index}) returns {_describe(pixels)}. Return a uint8 array of shape (H, W, C)."
            )
        return pixels

    return replace(images, read=read)


def _check_labels(where: str, images: Images) -> None:
    labels: Any = images.labels
    if not (isinstance(labels, np.ndarray) and labels.dtype == np.int64 and labels.ndim == 1 and labels.size):
        raise DatasetError(f"{where}: labels are {_describe(labels)}. Return an int64 array of shape (N,), N > 0.")
    outside = np.flatnonzero((labels < 0) | (labels >= len(images.classes)))
    if outside.size:
        raise DatasetError(
            f"{where}: label {labels[outside[0]]} of image {outside[0]} is no index into "
            f"{len(images.classes)} classes. Return labels from 0 to {len(images.classes) - 1}."
        )


def _check_names(where: str, field: str, names: Any) -> None:
    """Check the keys or the classes: str, and each of them once."""
    if not len(names):
        raise DatasetError(f"{where}: there are no {field}. Return at least one.")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise DatasetError(f"{where}: {field}[{index}] is {name!r}. Return a sequence of str.")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise DatasetError(f"{where}: {name!r} occurs {count} times in {field}. Return each once.")


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
