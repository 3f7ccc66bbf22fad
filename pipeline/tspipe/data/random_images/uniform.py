"""Uniform noise, the paper's random images: pixels are U[0, 1), independent per pixel and channel."""

import math
from typing import Any

from numpy.typing import NDArray

from tspipe.data.random_images.base import Kind, Photos, Shape


class Images(Kind):
    """One number is one pixel: channels, then rows, then columns."""

    def __init__(self, shape: Shape, photos: Photos | None = None):
        super().__init__(shape, photos)
        self.draws = math.prod(shape)

    def images(self, numbers: NDArray[Any]) -> NDArray[Any]:
        return numbers.reshape(-1, *self.shape)
