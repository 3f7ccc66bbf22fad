"""A cache beside any PyTorch dataset, for a training loop of one's own."""

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
    """A map-style dataset whose samples also have what the teacher says: `(image, label, features, logits)`.

    Each image is found in the cache by its key, where the dataset has keys: a sequence `dataset.keys`, or the files of
    torchvision's `ImageFolder`, whose keys are the paths below its root. Other datasets must have the cache's length
    and are taken in its order. `Subset` and `ConcatDataset` of either work. Every label is compared with the cache's.

    In a `DataLoader` it works with any start method: it pickles without its rows, and each worker opens the file.

    Args:
        dataset: `dataset[i]` gives an image and its label, perhaps more, which is left out. The targets are of the
            image as the dataset has it: a crop or a mirror image of it has others.
        cache: an opened cache, or its path.
        split: `train` or `test`.
        keys: the dataset's keys, where it does not tell them itself.
        check_labels: False for a dataset whose labels are meant to be others than the cache's.

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
        """Image and label as the dataset gives them; features (d,) and logits (c,), float32."""
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
    found = cache.split(split)
    return _Opened(found.features, found.logits, found.labels)


def _rows(dataset: Any, cache: Cache, split: str, keys: Sequence[str] | None) -> NDArray[np.int64] | None:
    """The cache's row of each of the dataset's images; None where they are in the same order."""
    stored, name = cache.split(split), cache.path.name
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DatasetError("CachedTargets takes a map-style dataset, one with a length and dataset[i].")
    base, indices = _unwrapped(dataset)
    own = keys if keys is not None else _keys(base)
    if own is None:
        if len(base) != len(stored):
            raise CacheMismatch(
                f"{name} has {len(stored):,} {split} images, the dataset {len(base):,} and no keys to find them by. "
                "Give them: CachedTargets(…, keys=[…])"
            )
        return indices
    if keys is None and indices is not None:
        own = [own[i] for i in indices]
    if len(own) != len(dataset):
        raise DatasetError(f"{len(own):,} keys for {len(dataset):,} images.")
    row_of = {key.decode("utf-8", "replace"): row for row, key in enumerate(stored.keys.load().tolist())}
    for i, key in enumerate(own):
        if key not in row_of:
            raise CacheMismatch(f"{name} has no {split} image {key!r}, which the dataset has at index {i}.")
    rows = np.array([row_of[key] for key in own], np.int64)
    return None if np.array_equal(rows, np.arange(len(stored))) else rows


def _concatenated(datasets: Sequence[Any]) -> list[str] | None:
    """The keys of several datasets, one after the other; None if none has any."""
    found = []
    for base, indices in map(_unwrapped, datasets):
        own = _keys(base)
        found.append(own if own is None or indices is None else [own[i] for i in indices])
    if all(own is None for own in found):
        return None
    if any(own is None for own in found):
        raise DatasetError("Some of the concatenated datasets have keys and some have not. Give all: keys=[…]")
    return [key for own in found if own is not None for key in own]


def _unwrapped(dataset: Any) -> tuple[Any, NDArray[np.int64] | None]:
    """The dataset below any number of `Subset`s, and which of its images are meant; None: all."""
    if not isinstance(dataset, torch.utils.data.Subset):
        return dataset, None
    base, below = _unwrapped(dataset.dataset)
    indices = np.asarray(dataset.indices, np.int64)
    return base, indices if below is None else below[indices]


def _keys(dataset: Any) -> list[str] | None:
    """A dataset's own keys; those of torchvision's `ImageFolder` are the paths below its root, as for `folder`."""
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return _concatenated(dataset.datasets)
    keys = getattr(dataset, "keys", None)
    if keys is not None and not callable(keys):
        return [str(key) for key in keys]
    root, samples = getattr(dataset, "root", None), getattr(dataset, "samples", None)
    if root is None or not samples or not isinstance(samples[0][0], str):
        return None
    return [PurePath(os.path.relpath(path, Path(root))).as_posix() for path, _ in samples]
