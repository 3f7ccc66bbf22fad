"""Preprocessed pixels, batch by batch: from memory where they fit, decoded ahead in threads where not."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.cache import SPLITS, Cache
from tspipe.data.datasets import Dataset, Images
from tspipe.data.decode import read
from tspipe.data.preprocess import Preprocess
from tspipe.errors import DatasetError
from tspipe.utils.device import batches_to_device, to_device
from tspipe.utils.progress import progress
from tspipe.utils.threads import available_cores, prefetch

T = TypeVar("T")
_LOADED = 64  # images decoded at once into memory
_TASK = 16  # the most images a thread takes at once: one at a time, handing them out costs more than a small JPEG


def read_ahead(work: Callable[[int], T], batches: Iterable[Sequence[int]], ahead: int = 4) -> Iterator[list[T]]:
    """`[work(i) for i in batch]` for each batch, worked on by threads while the caller uses the ones before.

    Pillow decodes and resizes without holding Python's lock, so with images of some size threads keep all cores busy.
    """

    def task(indices: Sequence[int]) -> list[T]:
        return [work(i) for i in indices]

    threads = available_cores()
    pool = ThreadPoolExecutor(threads)
    waiting: deque[list[Future[list[T]]]] = deque()
    try:
        for batch in batches:
            size = min(_TASK, -(-len(batch) // threads)) or 1
            waiting.append([pool.submit(task, batch[i : i + size]) for i in range(0, len(batch), size)])
            if len(waiting) > ahead:
                yield [result for future in waiting.popleft() for result in future.result()]
        while waiting:
            yield [result for future in waiting.popleft() for result in future.result()]
    finally:
        pool.shutdown(cancel_futures=True)


def open_images(cache: Cache, local: Callable[[], Dataset]) -> tuple[Dataset, Preprocess]:
    """A cache's images, and the steps left to do: those in the file, else the local ones that `local` opens."""
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    if not cache.has_images:
        return local(), preprocess
    held = Dataset(cache.manifest["dataset"]["name"], "", *(_held(cache, split) for split in SPLITS))
    return held, replace(preprocess, resize=None, crop=None)


def _held(cache: Cache, split: str) -> Images:
    """A split's images as the cache holds them, resized and cropped already."""
    found = cache.split(split)
    assert found.images is not None
    keys = [key.decode("utf-8", "replace") for key in found.keys.load().tolist()]
    return Images(found.labels, keys, cache.classes, found.images.__getitem__, found.images)


def input_shape(images: Images, preprocess: Preprocess) -> tuple[int, int, int]:
    """(C, H, W) of what the network gets, as the first image has it."""
    height, width, channels = read(images, preprocess, 0)[1].shape
    return channels, height, width


def check_sizes(sizes: Sequence[tuple[int, ...]], keys: Sequence[str]) -> None:
    """Check that images are of one size (H, W); raises DatasetError naming the first of another."""
    for key, size in zip(keys, sizes, strict=True):
        if size != sizes[0]:
            raise DatasetError(
                f"The images differ in size: {keys[0]} is {_stated(sizes[0])}, {key} is {_stated(size)}. "
                "Give one size, for example --set preprocess.resize=[256,256]"
            )


class ImageLoader:
    """A split's preprocessed images, uint8.

    Args:
        images: the split.
        preprocess: resize and crop to apply to each.
        what: what to call it while it is decoded.
        memory: bytes that may be held; a larger split is decoded again every epoch.
        device: where batches are wanted; what is held is held there.
        views: whether batches may be of views, which are cropped only then.

    Attributes:
        shape: (C, H, W) of what a batch has.
    """

    def __init__(
        self,
        images: Images,
        preprocess: Preprocess,
        what: str,
        memory: int,
        device: torch.device,
        *,
        views: bool = False,
    ):
        self._images, self.device = images, device
        self._preprocess = preprocess.before_views if views else preprocess
        self._replay = preprocess.replay if views else None
        self.shape, self._whole = input_shape(images, preprocess), input_shape(images, self._preprocess)
        fits = math.prod(self._whole) * len(images) <= memory
        self._held = self._load(what).to(device) if fits else None

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, order: Sequence[Tensor], views: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """(n, C, H, W) uint8, channels-last, on the device for each batch of indices (n,) int64.

        With `views`, (n, 3) for each batch on the device, they are those views; without, the images as they are.
        """
        if self._replay is None:
            return self._as_held(order)
        return map(self._replay, self._as_held(order), views or itertools.repeat(None))

    def normalised(self, order: Sequence[Tensor], views: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """As `batches`, but normalised, float32; on the CPU a thread makes each while the one before is used.

        That takes 2 % off a training step of LeNet-5 even on two cores of which PyTorch uses two, since it cannot fill
        them. Forwards alone do fill them, and would be slower.
        """
        made = map(self._preprocess.normalise, self.batches(order, views))
        return prefetch(made) if self.device.type == "cpu" else made

    def _as_held(self, order: Sequence[Tensor]) -> Iterator[Tensor]:
        """Batches as they are held, or decoded."""
        if self._held is not None:
            for rows in batches_to_device(order, self.device):
                yield self._held.index_select(0, rows).permute(0, 3, 1, 2)
            return
        for batch in self._decoded(rows.tolist() for rows in order):
            yield to_device(torch.from_numpy(batch), self.device).permute(0, 3, 1, 2)

    def _load(self, what: str) -> Tensor:
        channels, height, width = self._whole
        if self._images.array is not None and self._images.array.shape[1:] == (height, width, channels):
            return torch.from_numpy(np.asarray(self._images.array))
        out, done = torch.empty((len(self), height, width, channels), dtype=torch.uint8), 0
        with progress(f"reading {what}", len(self), "images") as advance:
            for batch in self._decoded(range(i, min(i + _LOADED, len(self))) for i in range(0, len(self), _LOADED)):
                check_sizes([(height, width), batch.shape[1:3]], [self._images.keys[0], self._images.keys[done]])
                out[done : done + len(batch)] = torch.from_numpy(batch)
                done += len(batch)
                advance(len(batch), f"reading {what}")
        return out

    def _decoded(self, batches: Iterable[Sequence[int]]) -> Iterator[NDArray[np.uint8]]:
        """(n, H, W, C) for each batch."""

        def work(index: int) -> tuple[str, NDArray[np.uint8]]:
            return self._images.keys[index], read(self._images, self._preprocess, index)[1]

        for results in read_ahead(work, batches):
            keys, pixels = zip(*results, strict=True)
            check_sizes([image.shape[:2] for image in pixels], keys)
            yield np.stack(pixels)


def _stated(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
