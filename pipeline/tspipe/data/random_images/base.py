"""What every kind of random images provides."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Generator = Literal["mt19937", "minstd"]
KindName = Literal["uniform", "mixed", "cutmix", "structured"]
KINDS: tuple[str, ...] = get_args(KindName)
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Photos:
    """The training images that a kind is made from.

    Attributes:
        count: the number of images.
        read: maps indices (n,) int64 to images (n, C, H, W) uint8 on the CPU, resized and cropped.
        shift: images are shifted by up to this many pixels in each direction; the edges are filled with zeros.
        flip: images are mirrored at random.
        labels: (N,) int64, their labels; only the labels of mixtures need them.
        classes: the number of classes.
    """

    count: int
    read: Callable[[Tensor], Tensor]
    shift: int = 0
    flip: bool = False
    labels: NDArray[np.int64] | None = None
    classes: int = 0


class Kind(ABC):
    """A kind of random images of one shape.

    Attributes:
        shape: (C, H, W) of an image.
        draws: random numbers per image; each takes one word of the generator.
    """

    draws: int

    def __init__(self, shape: Shape, photos: Photos | None = None):
        self.shape, self.photos = shape, photos

    def numbers(self, generator: np.random.Generator, count: int) -> NDArray[Any]:
        """Draw the random numbers of `count` images: (count, draws) float32, the top 24 bits of a word / 2^24."""
        return generator.random((count, self.draws), dtype=np.float32)

    @abstractmethod
    def images(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """Turn numbers (n, draws) into images (n, C, H, W): uint8, or float32 in [0, 1)."""

    def labels(self, numbers: NDArray[Any]) -> NDArray[np.float32]:
        """Return the images' labels as probabilities (n, c); (n, 0) for kinds whose images have none of their own."""
        return np.empty((len(numbers), 0), np.float32)


def make(name: str, shape: Shape, photos: Photos | None = None) -> Kind:
    """Return a kind by its name, one of `KINDS`; those in `cache.layout.FROM_PHOTOS` need `photos`."""
    kind: Kind = importlib.import_module(f"tspipe.data.random_images.{name}").Images(shape, photos)
    return kind
