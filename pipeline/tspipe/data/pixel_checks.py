"""Checks that a PyTorch dataset returns the images that the teacher saw, as far as it shows them."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tspipe.cache import Cache
from tspipe.cache.layout import digest
from tspipe.data.decode import to_pixels
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheMismatch

_SAMPLE = 64  # images whose pixels are compared
_REPEATED = 16  # images that are loaded twice


class Source(NamedTuple):
    """Where each image of a dataset comes from: the base dataset, and its position there, (n,) each."""

    bases: list[Any]
    base: NDArray[np.int64]
    position: NDArray[np.int64]


def other_split(split: str) -> str:
    """Return `test` for `train`, and the reverse."""
    return "test" if split == "train" else "train"


def check_pixels(source: Source, rows: NDArray[np.int64], cache: Cache, split: str) -> None:
    """Compare the preprocessing, and the pixels of a random sample, with those of the teacher.

    Args:
        rows: (n,), the cache's row of each image.

    Raises CacheMismatch if they differ, or if an image differs each time it is loaded.
    """
    for base in source.bases:
        _check_preprocess(getattr(base, "transform", None), cache)
    readers = [_reader(base) for base in source.bases]
    bases = [copy.copy(base) for base in source.bases]  # a file that loading opens must not be shared with workers
    chosen = np.sort(np.random.default_rng().choice(len(rows), min(_SAMPLE, len(rows)), replace=False))
    repeated = chosen[:: -(-len(chosen) // _REPEATED)]
    with _kept_random_state():
        for i in repeated.tolist():
            _check_repeated(bases[source.base[i]], int(source.position[i]), f"{cache.path.name}: image {i}")
        for i, stored in zip(chosen.tolist(), cache.split(split).digests.take(rows[chosen]), strict=True):
            base, position = source.base[i], int(source.position[i])
            read, expected = readers[base], stored.tobytes()
            if read is not None and (actual := digest(read(position))) != expected:
                other = other_split(split)
                if (cache.split(other).digests.load() == np.frombuffer(actual, np.uint8)).all(1).any():
                    raise CacheMismatch(f'{cache.path.name}: image {i} is a {other} image: give split="{other}".')
                decoded = hasattr(bases[base], "loader")
                remedy = "ImageFolder(…, loader=tspipe.load_image)" if decoded else "check_pixels=False"
                raise CacheMismatch(
                    f"{cache.path.name}: image {i} has other pixels in the dataset than the teacher saw. If the file "
                    f"is the same, it is decoded differently: use {remedy}"
                )
            visible = read is None or i in repeated
            if visible and not _is_same(_image(bases[base], position), expected, cache):
                raise CacheMismatch(
                    f"{cache.path.name}: image {i} of the dataset is not the unchanged one that the teacher saw. Check "
                    "its order and its transforms, or use check_pixels=False where that is meant."
                )


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restore the random numbers of Python, numpy and torch, which transforms draw, at the end of the block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _check_preprocess(transform: Any, cache: Cache) -> None:
    """Raise CacheMismatch if a transform contains another `Preprocess` than that of the cache."""
    stored = cache.manifest["preprocess"]
    for step in getattr(transform, "transforms", None) or [transform]:
        for field, value in step.as_dict().items() if isinstance(step, Preprocess) else ():
            if value != stored[field]:
                raise CacheMismatch(
                    f"{cache.path.name} was made with preprocess.{field} = {stored[field]}, the dataset's transform "
                    f'has {value}. Use tspipe.Preprocess.from_dict(cache.manifest["preprocess"]), or '
                    "check_pixels=False where that is meant."
                )


def _check_repeated(dataset: Any, index: int, where: str) -> None:
    """Raise CacheMismatch if an image differs when it is loaded again: a transform draws at random."""
    first, second = _image(dataset, index), _image(dataset, index)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        same = torch.equal(first, second)
    else:
        same = not isinstance(first, Image.Image | np.ndarray) or np.array_equal(np.asarray(first), np.asarray(second))
    if not same:
        raise CacheMismatch(
            f"{where} differs each time it is loaded, and the teacher's targets belong to the unchanged image. "
            "Leave out random transforms, or use check_pixels=False where that is meant."
        )


def _image(dataset: Any, index: int) -> Any:
    """Return the image of a sample; None if the sample is no (image, label)."""
    sample = dataset[index]
    return sample[0] if isinstance(sample, tuple | list) and len(sample) > 1 else None


def _is_same(image: Any, expected: bytes, cache: Cache) -> bool:
    """Return whether an image has the teacher's pixels; also True for one that is no longer raw, such as floats."""
    pixels = _raw_pixels(image)
    if pixels is None:
        return True
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    side = preprocess.crop
    if pixels.shape[:2] == ((side, side) if side else preprocess.resize):  # preprocessed, it has another digest
        return True
    grey = (pixels == pixels[:, :, :1]).all()  # a dataset may provide grey images in one channel or in three
    variants = [pixels[:, :, :1], np.repeat(pixels[:, :, :1], 3, axis=2)] if grey else [pixels]
    return any(digest(np.ascontiguousarray(variant)) == expected for variant in variants)


def _raw_pixels(image: Any) -> NDArray[np.uint8] | None:
    """Return an image of Pillow's, or an array of uint8 with the channels first or last, as (H, W, C)."""
    if isinstance(image, Image.Image):
        with contextlib.suppress(ValueError, OSError):
            return to_pixels(image)
        return None
    if not isinstance(image, np.ndarray | Tensor) or image.ndim not in (2, 3):
        return None
    if image.dtype != (torch.uint8 if isinstance(image, Tensor) else np.uint8):
        return None
    array = np.asarray(image.cpu() if isinstance(image, Tensor) else image)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    return array if array.shape[2] in (1, 3) and array.size else None


def _reader(dataset: Any) -> Callable[[int], NDArray[np.uint8]] | None:
    """Return a function that reads the pixels (H, W, C) of image i before any transform, if the dataset shows them."""
    if callable(loader := getattr(dataset, "loader", None)) and getattr(dataset, "samples", None):
        transform = getattr(dataset, "transform", None)
        # Preprocess rotates an image that was not rotated, and no other transform does.
        to_array = transform.to_array if isinstance(transform, Preprocess) else np.asarray
        return lambda index: to_array(loader(dataset.samples[index][0]))
    data = getattr(dataset, "data", None)
    if not isinstance(data, np.ndarray | Tensor) or len(data) != len(dataset) or not 3 <= data.ndim <= 4:
        return None
    array = np.asarray(data)
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):  # (N, C, H, W)
        array = array.transpose(0, 2, 3, 1)
    return (lambda index: array[index].reshape(*array.shape[1:3], -1)) if array.dtype == np.uint8 else None
