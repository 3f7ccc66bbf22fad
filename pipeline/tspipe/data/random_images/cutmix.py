"""CutMix: a rectangle of one training image pasted into another (Yun et al., arXiv 1905.04899, Equations 1 and 2).

λ, the share of the first image, is uniform. The rectangle has the image's proportions and the area 1 − λ; its centre is
uniform, and what lies outside the image is cut off. The teacher labels the result; the student alone learns from the
labels of both images, weighted by their shares of the pixels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tspipe.data.random_images import mixed


class Images(mixed.Images):
    """Eleven words w per image: those of `mixed`, and the row and the column of the rectangle's centre."""

    draws = 11

    def images(self, numbers: NDArray[Any]) -> NDArray[Any]:
        first, second = self.pair(numbers)
        return np.where(self._rectangles(numbers)[:, None], second, first)

    def shares(self, numbers: NDArray[Any]) -> NDArray[np.float64]:
        return 1 - self._rectangles(numbers).mean((1, 2))  # type: ignore[no-any-return]

    def _rectangles(self, numbers: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which pixels (n, H, W) are those of the second image."""
        side = np.sqrt(1 - super().shares(numbers))
        spans = []
        for size, centre in zip(self.shape[1:], (numbers[:, 9], numbers[:, 10]), strict=True):
            length = (size * side).astype(np.int64)
            start = (centre % size - length // 2)[:, None]
            spans.append((np.arange(size) >= start) & (np.arange(size) < start + length[:, None]))
        return spans[0][:, :, None] & spans[1][:, None, :]
