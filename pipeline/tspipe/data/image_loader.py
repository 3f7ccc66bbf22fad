"""Preprocessed images, batch by batch: from memory if they fit, else decoded ahead in threads."""

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
from tspipe.cache.layout import UNLABELLED
from tspipe.cache.read import read_keys
from tspipe.data.datasets import Dataset, Images
from tspipe.data.preprocess import Preprocess
from tspipe.errors import DatasetError
from tspipe.utils.device import batches_to_device, to_device
from tspipe.utils.progress import progress
from tspipe.utils.threads import available_cores

T = TypeVar("T")
_Keyed = tuple[str, NDArray[np.uint8]]  # an image with its key
_LOAD_BATCH = 64  # images decoded at once into memory
_MAX_AHEAD = 8  # chunks of images decoded before they are used
_MAX_TASK = 16  # images per task of a thread: a task for one image costs more than decoding a small JPEG


def read_ahead(work: Callable[[int], T], batches: Iterable[Sequence[int]], ahead: int = 4) -> Iterator[list[T]]:
    """Yield `[work(i) for i in batch]` for each batch, computed by threads while the caller uses earlier ones.

    Pillow decodes and resizes without holding Python's lock, so unless images are tiny, threads keep all cores busy.
    """

    def task(indices: Sequence[int]) -> list[T]:
        return [work(i) for i in indices]

    threads = available_cores()
    pool = ThreadPoolExecutor(threads)
    waiting: deque[list[Future[list[T]]]] = deque()
    try:
        for batch in batches:
            size = min(_MAX_TASK, -(-len(batch) // threads)) or 1
            waiting.append([pool.submit(task, batch[i : i + size]) for i in range(0, len(batch), size)])
            if len(waiting) > ahead:
                yield [result for future in waiting.popleft() for result in future.result()]
        while waiting:
            yield [result for future in waiting.popleft() for result in future.result()]
    finally:
        pool.shutdown(cancel_futures=True)


def read(images: Images, preprocess: Preprocess, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image `index` as the dataset provides it, and preprocessed; an error names the image."""
    original = images.read(index)
    try:
        return original, preprocess.apply(original)
    except DatasetError as error:
        raise DatasetError(f"{images.keys[index]}: {error}") from error


def find_broken(images: Images, what: str) -> dict[int, str]:
    """Return what is wrong with each image of a split whose header cannot be read, by index; `what` names the split.

    It takes a fraction of the time of decoding, so that all such images are known before the teacher starts.
    """
    broken: dict[int, str] = {}
    if (check_header := images.check_header) is None:
        return broken

    def problem(index: int) -> str:
        try:
            check_header(index)
        except DatasetError as error:
            return str(error)
        return ""

    batches = [range(i, min(i + _LOAD_BATCH, len(images))) for i in range(0, len(images), _LOAD_BATCH)]
    with progress(f"checking {what}", len(images), "images") as advance:
        for batch, problems in zip(batches, read_ahead(problem, batches), strict=True):
            broken |= {index: text for index, text in zip(batch, problems, strict=True) if text}
            advance(len(batch), f"checking {what}")
    return broken


def open_images(cache: Cache, local: Callable[[], Dataset]) -> tuple[Dataset, Preprocess]:
    """Return a cache's images, from the file or else from `local()`, and the preprocessing that they still need."""
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    if not cache.has_images:
        return local(), preprocess

    train, test = (stored_images(cache, split) for split in SPLITS)
    unlabelled = stored_images(cache, UNLABELLED) if cache.unlabelled else None
    stored = Dataset(cache.manifest["dataset"]["name"], "", train, test, unlabelled)
    return stored, replace(preprocess, resize=None, crop=None)


def stored_images(cache: Cache, split: str) -> Images:
    """Return the images of a split of a cache that has their pixels."""
    rows = cache.split(split)
    assert rows.images is not None
    return Images(rows.labels, read_keys(rows), cache.classes, rows.images.__getitem__, rows.images)


def input_shape(images: Images, preprocess: Preprocess) -> tuple[int, int, int]:
    """Return the (C, H, W) of the network's input, from the first image."""
    height, width, channels = read(images, preprocess, 0)[1].shape
    return channels, height, width


def check_sizes(sizes: Sequence[tuple[int, ...]], keys: Sequence[str]) -> None:
    """Raise DatasetError, naming the first image of another size (H, W) than the first, unless all are of one size."""
    for key, size in zip(keys, sizes, strict=True):
        if size != sizes[0]:
            raise DatasetError(
                f"The images differ in size: {keys[0]} is {'×'.join(map(str, sizes[0]))}, {key} is "
                f"{'×'.join(map(str, size))}. "
                "Give one size, for example --set preprocess.resize=[256,256]"
            )


class ImageLoader:
    """A split's preprocessed images, uint8.

    Args:
        images: the split.
        preprocess: the resize and crop to apply to each image.
        what: the name of the split in progress messages.
        memory: limit in bytes; a split that exceeds it is decoded again every epoch, up to half of the limit ahead.
        device: the device of batches, and of images kept in memory.
        views: whether batches may be views, which are cropped after the shift.

    Attributes:
        shape: (C, H, W) of an image in a batch.
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
        self.shape, self._stored_shape = input_shape(images, preprocess), input_shape(images, self._preprocess)
        image_bytes = math.prod(self._stored_shape)
        self._chunk = max(1, min(_LOAD_BATCH, memory // (8 * image_bytes)))
        self._ahead = max(1, min(_MAX_AHEAD, memory // (2 * image_bytes * self._chunk) - 1))
        self._loaded = self._load(what).to(device) if image_bytes * len(images) <= memory else None

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, order: Sequence[Tensor], views: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """Yield (n, C, H, W) uint8, channels-last, on the device for each batch of indices (n,) int64.

        `views` has (n, 3) on the device for each batch; without it, images are neither shifted nor flipped.
        """
        if self._replay is None:
            return self._stored_batches(order)
        return map(self._replay, self._stored_batches(order), views or itertools.repeat(None))

    def normalised(self, order: Sequence[Tensor], views: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """Yield `batches` normalised, float32.

        No thread prepares them ahead: where PyTorch's threads use all cores, one more makes each of their regions wait.
        """
        return map(self._preprocess.normalise, self.batches(order, views))

    def _stored_batches(self, order: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield batches from memory, or decoded."""
        if self._loaded is not None:
            for rows in batches_to_device(order, self.device):
                yield self._loaded.index_select(0, rows).permute(0, 3, 1, 2)
            return
        # Here and below, no local name keeps a batch in memory until the next one is complete.
        yield from map(self._copy_to_device, self._decoded(rows.tolist() for rows in order))

    def _copy_to_device(self, batch: NDArray[np.uint8]) -> Tensor:
        return to_device(torch.from_numpy(batch), self.device).permute(0, 3, 1, 2)

    def _load(self, what: str) -> Tensor:
        channels, height, width = self._stored_shape
        if self._images.array is not None and self._images.array.shape[1:] == (height, width, channels):
            return torch.from_numpy(np.asarray(self._images.array))
        out, done = torch.empty((len(self), height, width, channels), dtype=torch.uint8), 0
        with progress(f"reading {what}", len(self), "images") as advance:
            for batch in self._decoded(
                range(i, min(i + _LOAD_BATCH, len(self))) for i in range(0, len(self), _LOAD_BATCH)
            ):
                check_sizes([(height, width), batch.shape[1:3]], [self._images.keys[0], self._images.keys[done]])
                out[done : done + len(batch)] = torch.from_numpy(batch)
                done += len(batch)
                advance(len(batch), f"reading {what}")
        return out

    def _decoded(self, batches: Iterable[Sequence[int]]) -> Iterator[NDArray[np.uint8]]:
        """Yield (n, H, W, C) for each batch; threads decode it and the next ones in chunks, as memory allows."""
        counts: deque[int] = deque()
        channels, *extent = self._stored_shape
        empty = np.empty((0, *extent, channels), np.uint8)  # one of several processes may have no images of a batch

        def chunks() -> Iterator[Sequence[int]]:
            for batch in batches:
                counts.append(len(batch))
                yield from (batch[i : i + self._chunk] for i in range(0, len(batch), self._chunk))

        def work(index: int) -> _Keyed:
            return self._images.keys[index], read(self._images, self._preprocess, index)[1]

        decoded = itertools.chain.from_iterable(read_ahead(work, chunks(), self._ahead))
        for first in decoded:
            while not counts[0]:
                yield empty[: counts.popleft()]
            yield _stack(first, itertools.islice(decoded, counts[0] - 1), counts.popleft())
        yield from (empty for _ in counts)


def _stack(first: _Keyed, others: Iterable[_Keyed], count: int) -> NDArray[np.uint8]:
    """Return images with their keys as one array."""
    out = np.empty((count, *first[1].shape), np.uint8)
    for i, (key, image) in enumerate(itertools.chain([first], others)):
        check_sizes([first[1].shape[:2], image.shape[:2]], [first[0], key])
        out[i] = image
    return out
