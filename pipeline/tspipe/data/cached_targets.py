"""The targets of a cache for any PyTorch dataset, for custom training loops."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from tspipe.cache import Cache, Split, open_cache
from tspipe.cache.read import read_keys
from tspipe.data import pixel_checks
from tspipe.data.pixel_checks import Source
from tspipe.errors import CacheMismatch, DatasetError


class CachedTargets(Dataset[tuple[Any, Any, Tensor, Tensor]]):
    """A map-style dataset whose samples include the teacher's output: `(image, label, features, logits)`.

    Images are matched by key if the dataset has keys: a sequence `dataset.keys`, or the files of torchvision's
    `ImageFolder`, whose keys are the paths below its root. Any other dataset must have the cache's length and order.
    `Subset` and `ConcatDataset` of either work. Every label is compared with the cache's, and a sample of the images
    if the dataset shows what it decodes: by `loader` and `samples` as `ImageFolder`, as an array `data` of uint8, or as
    Pillow images and uint8 in its samples. So is a `Preprocess` in its transform. Images that are drawn at random are
    refused.

    If `tspipe cache --split` split the dataset, give all of it: images of the other split are left out here.

    It works in a `DataLoader` with any start method: rows are not pickled, and each worker opens the file.

    Args:
        dataset: `dataset[i]` returns an image and its label; further items are ignored. The targets belong to the
            unchanged image, not to a crop or a mirror image of it.
        cache: an opened cache, or its path.
        split: `train` or `test`.
        keys: the keys of a dataset that does not provide them.
        check_labels: False for a dataset whose labels differ from the cache's on purpose.
        check_pixels: False for a dataset whose images differ from those that the teacher saw on purpose.

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
        check_pixels: bool = True,
    ):
        cache = cache if isinstance(cache, Cache) else open_cache(cache)
        if split not in ("train", "test"):
            raise DatasetError(f"There is no split {split!r}: give train or test.")
        if cache.manifest["views"]:
            raise CacheMismatch(
                f"{cache.path.name} holds views of its images, which CachedTargets cannot replay. Make a cache without "
                "them: tspipe cache --set views.count=0"
            )
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DatasetError("CachedTargets takes a map-style dataset, one with a length and dataset[i].")
        if not len(dataset):
            raise DatasetError("The dataset has no images.")
        self.dataset, self.path, self.id, self.split = dataset, cache.path, cache.id, split
        self.check_labels = check_labels
        source = _source(dataset)
        rows = _rows(source, cache, split, keys)
        if (rows < 0).any():
            self.dataset = Subset(dataset, np.flatnonzero(rows >= 0).tolist())
            source, rows = _source(self.dataset), rows[rows >= 0]
        if check_pixels:
            pixel_checks.check_pixels(source, rows, cache, split)
        self._rows = None if np.array_equal(rows, np.arange(len(cache.split(split)))) else rows
        self._opened: Split | None = cache.split(split)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor, Tensor]:
        """Return image and label as the dataset does, and features (d,) and logits (c,), float32."""
        sample = self.dataset[index]
        if not isinstance(sample, tuple | list) or len(sample) < 2:
            raise DatasetError(f"dataset[{index}] is no (image, label).")
        image, label = sample[0], sample[1]
        row = range(len(self))[index] if self._rows is None else int(self._rows[index])
        opened = self._open()
        if self.check_labels and _class_number(label, index) != opened.labels[row]:
            raise CacheMismatch(
                f"{self.path.name}: image {index} has label {label} in the dataset, {opened.labels[row]} in the cache "
                f"(row {row}). Give the dataset the cache was made from, or check_labels=False."
            )
        features, logits = (torch.from_numpy(column[row]).float() for column in (opened.features, opened.logits))
        return image, label, features, logits

    def _open(self) -> Split:
        if self._opened is None:  # in a worker that was not forked
            cache = open_cache(self.path)
            if cache.id != self.id:
                raise CacheMismatch(f"{self.path} was replaced by another cache meanwhile. Start again.")
            self._opened = cache.split(self.split)
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def _class_number(label: Any, index: int) -> int:
    try:
        number = torch.as_tensor(label)
        if isinstance(label, str | bytes) or number.is_floating_point():
            raise TypeError
        return int(number)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise DatasetError(
            f"The label of image {index} is no class number, so it cannot be compared with the cache's. Where that is "
            "meant: CachedTargets(…, check_labels=False)"
        ) from problem


def _source(dataset: Any) -> Source:
    """Return the datasets below any number of `Subset`s and `ConcatDataset`s."""
    if isinstance(dataset, Subset):
        bases, base, position = _source(dataset.dataset)
        chosen = np.asarray(dataset.indices)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "biu"):
            raise DatasetError("The indices of a Subset are not a list of integers.")
        chosen = chosen.astype(np.int64)
        outside = chosen[(chosen < -len(base)) | (chosen >= len(base))]
        if outside.size:
            raise DatasetError(f"A Subset has the index {outside[0]} of a dataset of {len(base):,} images.")
        return Source(bases, base[chosen], position[chosen])
    if isinstance(dataset, ConcatDataset):
        parts = [_source(part) for part in dataset.datasets]
        firsts = np.cumsum([0, *(len(part.bases) for part in parts)]).tolist()
        return Source(
            [base for part in parts for base in part.bases],
            np.concatenate([part.base + first for part, first in zip(parts, firsts[:-1], strict=True)]),
            np.concatenate([part.position for part in parts]),
        )
    return Source([dataset], np.zeros(len(dataset), np.int64), np.arange(len(dataset)))


def _rows(source: Source, cache: Cache, split: str, keys: Sequence[str] | None) -> NDArray[np.int64]:
    """Return the cache's row of each image of the dataset; −1 for those of the other split that stage one made."""
    stored, name = cache.split(split), cache.path.name
    if keys is None:
        keys_of_bases = list(map(_keys, source.bases))
        if all(base_keys is None for base_keys in keys_of_bases):
            sizes = [len(base) for base in source.bases]
            if sum(sizes) != len(stored):
                other = pixel_checks.other_split(split)
                fits = sum(sizes) == len(cache.split(other))
                remedy = f'For its {other} images: split="{other}"' if fits else "Give them: CachedTargets(…, keys=[…])"
                raise CacheMismatch(
                    f"{name} has {len(stored):,} {split} images, the dataset {sum(sizes):,} and no keys to find them "
                    f"by. {remedy}"
                )
            return np.cumsum([0, *sizes])[source.base] + source.position
        if any(base_keys is None for base_keys in keys_of_bases):
            raise DatasetError("Some of the concatenated datasets have keys and some have not. Give all: keys=[…]")
        known_keys = [base_keys or [] for base_keys in keys_of_bases]
        image_keys = [known_keys[base][i] for base, i in zip(source.base, source.position, strict=True)]
        same_base = np.array([[a is b for a in source.bases] for b in source.bases]).argmax(1)
        images = np.stack([same_base[source.base], source.position])  # a `Subset` may have an image several times
        _check_unique("The dataset", [image_keys[i] for i in np.unique(images, axis=1, return_index=True)[1]])
    else:
        image_keys = _normalise(keys, len(source.position))
        _check_unique("The dataset", image_keys)
    stored_keys = read_keys(stored)
    _check_unique(name, stored_keys)
    row_of = {key: row for row, key in enumerate(stored_keys)}
    rows = [row_of.get(key, -1) for key in image_keys]
    in_other = set(read_keys(cache.split(other := pixel_checks.other_split(split)))) if -1 in rows else set()
    left_out = in_other if "split" in cache.manifest["dataset"] and max(rows) >= 0 else set()
    absent = [i for i, row in enumerate(rows) if row < 0 and image_keys[i] not in left_out]
    if absent:
        i = absent[0]
        remedy = f' It is a {other} image: split="{other}"' if image_keys[i] in in_other else ""
        raise CacheMismatch(
            f"{name} has no {split} image {image_keys[i]!r}, which the dataset has at index {i}.{remedy}"
        )
    return np.array(rows, np.int64)


def _check_unique(owner: str, keys: Sequence[str]) -> None:
    """Raise CacheMismatch if two images have one key: one of them would get the other's targets."""
    key, count = Counter(keys).most_common(1)[0] if keys else ("", 0)
    if count > 1:
        raise CacheMismatch(
            f"{owner} has {count} images with the key {key!r}, which would get the targets of one. Use keys that occur "
            "once, such as paths below a common folder."
        )


def _keys(dataset: Any) -> list[str] | None:
    """Return a dataset's keys; those of torchvision's `ImageFolder` are the paths below its root, as for `folder`."""
    keys = getattr(dataset, "keys", None)
    if keys is not None and not callable(keys):
        return _normalise(keys, len(dataset))
    root, samples = getattr(dataset, "root", None), getattr(dataset, "samples", None)
    if root is None or not samples or not isinstance(samples[0][0], str):
        return None
    paths = [PurePath(os.path.relpath(path, Path(root))).as_posix() for path, _ in samples]
    return _normalise(paths, len(dataset))


def _normalise(keys: Any, images: int) -> list[str]:
    """Return keys in Unicode NFC, the form of the keys in a cache; raise DatasetError unless each image has a str."""
    keys = list(keys) if isinstance(keys, Iterable) and not isinstance(keys, str) else [keys]
    for index, key in enumerate(keys):
        if not isinstance(key, str):
            raise DatasetError(f"The key of image {index} is {key!r}. Give keys that are str, as in the cache.")
    if len(keys) != images:
        raise DatasetError(f"{len(keys):,} keys for {images:,} images.")
    return [normalize("NFC", key) for key in keys]
