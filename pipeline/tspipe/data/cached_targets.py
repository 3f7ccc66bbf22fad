"""The targets of a cache for any PyTorch dataset, for custom training loops."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tspipe.cache import Cache, Column, open_cache
from tspipe.errors import CacheMismatch, DatasetError


class _Opened(NamedTuple):
    features: Column
    logits: Column
    labels: NDArray[np.int64]


class CachedTargets(Dataset[tuple[Any, Any, Tensor, Tensor]]):
    """A map-style dataset whose samples include the teacher's output: `(image, label, features, logits)`.

    Images are matched by key if the dataset has keys: a sequence `dataset.keys`, or the files of torchvision's
    `ImageFolder`, whose keys are the paths below its root. Any other dataset must have the cache's length and order.
    `Subset` and `ConcatDataset` of either work. Every label is compared with the cache's.

    It works in a `DataLoader` with any start method: rows are not pickled, and each worker opens the file.

    Args:
        dataset: `dataset[i]` returns an image and its label; further items are ignored. The targets belong to the
            unchanged image, not to a crop or a mirror image of it.
        cache: an opened cache, or its path.
        split: `train` or `test`.
        keys: the keys of a dataset that does not provide them.
        check_labels: False for a dataset whose labels differ from the cache's on purpose.

    Raises CacheMismatch when an image or its label is not the cache's, naming the first.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        cache: Cache | str | os.PathLike[str],
        split: str = "train",
        *,
        keys: Sequence[str] | None = None,
        check_labels: bool = True,
    ):
        cache = cache if isinstance(cache, Cache) else open_cache(cache)
        if split not in ("train", "test"):
            raise DatasetError(f"There is no split {split!r}: give train or test.")
        if cache.manifest["views"]:
            raise CacheMismatch(f"{cache.path.name} holds views of its images, which CachedTargets cannot replay.")
        self.dataset, self.path, self.id, self.split = dataset, cache.path, cache.id, split
        self.check_labels = check_labels
        self._rows = _rows(dataset, cache, split, keys)
        self._opened: _Opened | None = _open(cache, split)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor, Tensor]:
        """Return image and label as the dataset does, and features (d,) and logits (c,), float32."""
        image, label = self._sample(index)
        row = range(len(self))[index] if self._rows is None else int(self._rows[index])
        opened = self._open()
        if self.check_labels and _number(label, index) != opened.labels[row]:
            raise CacheMismatch(
                f"{self.path.name}: image {index} has label {label} in the dataset, {opened.labels[row]} in the cache "
                f"(row {row}). Give the dataset the cache was made from, or check_labels=False."
            )
        features, logits = (torch.from_numpy(column[row]).float() for column in (opened.features, opened.logits))
        return image, label, features, logits

    def _sample(self, index: int) -> tuple[Any, Any]:
        sample = self.dataset[index]
        if not isinstance(sample, tuple | list) or len(sample) < 2:
            raise DatasetError(f"dataset[{index}] is no (image, label).")
        return sample[0], sample[1]

    def _open(self) -> _Opened:
        if self._opened is None:  # in a worker that was not forked
            cache = open_cache(self.path)
            if cache.id != self.id:
                raise CacheMismatch(f"{self.path} was replaced by another cache meanwhile. Start again.")
            self._opened = _open(cache, self.split)
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def _number(label: Any, index: int) -> int:
    try:
        if isinstance(label, str | bytes):
            raise TypeError
        return int(label)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise DatasetError(
            f"The label of image {index} is no class number, so it cannot be compared with the cache's. Where that is "
            "meant: CachedTargets(…, check_labels=False)"
        ) from problem


def _open(cache: Cache, split: str) -> _Opened:
    rows = cache.split(split)
    return _Opened(rows.features, rows.logits, rows.labels)


def _rows(dataset: Any, cache: Cache, split: str, keys: Sequence[str] | None) -> NDArray[np.int64] | None:
    """Return the cache's row of each image of the dataset; None if the order is the same."""
    stored, name = cache.split(split), cache.path.name
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DatasetError("CachedTargets takes a map-style dataset, one with a length and dataset[i].")
    base, indices = _unwrap(dataset)
    image_keys = keys if keys is not None else _keys(base)
    if image_keys is None:
        if len(base) != len(stored):
            raise CacheMismatch(
                f"{name} has {len(stored):,} {split} images, the dataset {len(base):,} and no keys to find them by. "
                "Give them: CachedTargets(…, keys=[…])"
            )
        return indices
    if keys is None and indices is not None:
        image_keys = [image_keys[i] for i in indices]
    if len(image_keys) != len(dataset):
        raise DatasetError(f"{len(image_keys):,} keys for {len(dataset):,} images.")
    row_of = {key.decode("utf-8", "replace"): row for row, key in enumerate(stored.keys.load().tolist())}
    for i, key in enumerate(image_keys):
        if key not in row_of:
            raise CacheMismatch(f"{name} has no {split} image {key!r}, which the dataset has at index {i}.")
    rows = np.array([row_of[key] for key in image_keys], np.int64)
    return None if np.array_equal(rows, np.arange(len(stored))) else rows


def _concatenated(datasets: Sequence[Any]) -> list[str] | None:
    """Return the keys of several datasets, one after the other; None if no dataset has keys."""
    keys_of_each = []
    for base, indices in map(_unwrap, datasets):
        keys = _keys(base)
        keys_of_each.append(keys if keys is None or indices is None else [keys[i] for i in indices])
    if all(keys is None for keys in keys_of_each):
        return None
    if any(keys is None for keys in keys_of_each):
        raise DatasetError("Some of the concatenated datasets have keys and some have not. Give all: keys=[…]")
    return [key for keys in keys_of_each if keys is not None for key in keys]


def _unwrap(dataset: Any) -> tuple[Any, NDArray[np.int64] | None]:
    """Return the dataset below any number of `Subset`s, and the indices of its images; None for all."""
    if not isinstance(dataset, torch.utils.data.Subset):
        return dataset, None
    base, below = _unwrap(dataset.dataset)
    indices = np.asarray(dataset.indices, np.int64)
    return base, indices if below is None else below[indices]


def _keys(dataset: Any) -> list[str] | None:
    """Return a dataset's keys; those of torchvision's `ImageFolder` are the paths below its root, as for `folder`."""
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return _concatenated(dataset.datasets)
    keys = getattr(dataset, "keys", None)
    if keys is not None and not callable(keys):
        return [str(key) for key in keys]
    root, samples = getattr(dataset, "root", None), getattr(dataset, "samples", None)
    if root is None or not samples or not isinstance(samples[0][0], str):
        return None
    return [PurePath(os.path.relpath(path, Path(root))).as_posix() for path, _ in samples]
