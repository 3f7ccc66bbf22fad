"""Mixtures λ a + (1 − λ) b of two training images, each shifted and mirrored at random; λ is uniform.

The mixture is that of mixup (Zhang et al., arXiv 1710.09412) with α = 1 and a λ of its own for each image. The teacher
labels the result; the student alone learns from the mixed labels λ y_a + (1 − λ) y_b.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tspipe.data.random_images.base import Kind

if TYPE_CHECKING:
    from torch import Tensor


class Images(Kind):
    """Nine words w per image: index, dy, dx and flip of a, the same of b, and λ = ⌊w / 2^24⌋ / 256."""

    draws = 9

    def numbers(self, generator: np.random.Generator, count: int) -> NDArray[Any]:
        """Draw whole words, (count, draws) int64, because 24 bits are too few to choose among many images evenly."""
        words = generator.bit_generator.random_raw(count * self.draws)
        return words.view(np.int64).reshape(count, self.draws)

    def images(self, numbers: NDArray[Any]) -> NDArray[Any]:
        first, second = self.pair(numbers)
        share = (numbers[:, 8, None, None, None] >> 24).astype(np.uint16)
        mixture = first * share + second * (256 - share) + np.uint16(128)  # at most 255 · 256 + 128: no overflow
        return (mixture >> 8).astype(np.uint8)

    def labels(self, numbers: NDArray[Any]) -> NDArray[np.float32]:
        assert self.photos and self.photos.labels is not None
        first, second = self.photos.labels[numbers[:, [0, 4]] % self.photos.count].T
        labels, rows = np.zeros((len(numbers), self.photos.classes), np.float32), np.arange(len(numbers))
        shares = self.shares(numbers)
        labels[rows, first] += shares
        labels[rows, second] += 1 - shares
        return labels

    def shares(self, numbers: NDArray[Any]) -> NDArray[np.float64]:
        """Return the share of a in each image, (n,)."""
        return (numbers[:, 8] >> 24) / 256

    def pair(self, numbers: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the images a and b (n, C, H, W) that the first eight words of each row select."""
        import torch

        from tspipe.data.preprocess import shift_and_flip

        assert self.photos
        words = torch.from_numpy(numbers[:, :8].reshape(-1, 4))
        sides = 2 * self.photos.shift + 1
        views = words[:, 1:] % torch.tensor([sides, sides, 1 + self.photos.flip])
        views -= torch.tensor([self.photos.shift, self.photos.shift, 0])
        images: Tensor = shift_and_flip(self.photos.read(words[:, 0] % self.photos.count), views)
        pairs = images.numpy().reshape(len(numbers), 2, *images.shape[1:])
        return pairs[:, 0], pairs[:, 1]
