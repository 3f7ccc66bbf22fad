"""The test images of the cache that a student was trained from, where they are available."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tspipe.cache import Cache, open_cache
from tspipe.data import datasets
from tspipe.data.image_loader import ImageLoader, open_images
from tspipe.data.local import open_local
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheError, CacheMismatch, TspipeError
from tspipe.utils.memory import memory_limit

CPU = torch.device("cpu")


class LabelledImages(NamedTuple):
    """The test split of a cache, preprocessed, with its labels; and the training split."""

    cache: Cache
    images: ImageLoader
    labels: Tensor
    train: ImageLoader

    @property
    def preprocess(self) -> Preprocess:
        """The cache's preprocessing."""
        return Preprocess.from_dict(self.cache.manifest["preprocess"])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (n, C, H, W) uint8 and labels (n,) int64."""
        rows = list(torch.arange(len(self.labels)).split(batch_size))
        yield from zip(self.images.batches(rows), self.labels.split(batch_size), strict=True)

    def training_sample(self, count: int) -> Tensor:
        """Return at most so many images of the training split (n, C, H, W) uint8, evenly spaced."""
        rows = torch.linspace(0, len(self.train) - 1, min(count, len(self.train))).round().long()
        (pixels,) = self.train.batches([rows])
        return pixels


def find_cache(cache_id: str, file: Path | None = None, folder: Path = Path("cache")) -> Cache:
    """Return the cache of this id: `file`, or one in `folder`. Raises CacheMismatch if it is another or none."""
    if file:
        cache = open_cache(file)
        if cache.id != cache_id:
            raise CacheMismatch(f"{file} has the id {cache.id[:12]}; the student was trained from {cache_id[:12]}.")
        return cache
    for path in sorted(folder.rglob("*.h5")) if folder.is_dir() else []:
        with contextlib.suppress(CacheError):
            if (cache := open_cache(path)).id == cache_id:
                return cache
    raise CacheMismatch(f"The student's cache, id {cache_id[:12]}, is not in {folder}/. Name it: --cache FILE")


def open_labelled_images(cache: Cache, data: Path | None = None) -> LabelledImages:
    """Open the test split of a cache, from the file or else from the local dataset, see `default_folder`."""
    name = cache.manifest["dataset"]["name"]
    folder = data or datasets.default_folder(name)
    dataset, remaining = open_images(cache, lambda: open_local(cache, name, folder, download=False, trust=False))
    test = ImageLoader(dataset.test, remaining, "test", memory_limit(CPU) // 3, CPU)
    train = ImageLoader(dataset.train, remaining, "train", 0, CPU)  # of which a few images are read
    return LabelledImages(cache, test, torch.from_numpy(cache.test.labels), train)


def find_test_images(cache_id: str, file: Path | None, data: Path | None) -> LabelledImages | str:
    """Return the test images of the cache of this id or, unless a file or folder is named, why there are none."""
    try:
        return open_labelled_images(find_cache(cache_id, file), data)
    except TspipeError as error:
        if file or data:
            raise
        return str(error)
