"""Images with the statistics of natural ones, made without any photograph.

Each is of one of three styles: noise at several scales, noise with a 1/f^α spectrum (Field, JOSA A 4, 1987), or dead
leaves, overlapping discs whose radii follow a power law (Lee, Mumford and Huang, IJCV 41, 2001). Networks learn from
such images (Baradad et al., arXiv 2106.05963). Colour and contrast vary from image to image.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tspipe.data.random_images.base import Kind, Photos, Shape

Field = NDArray[np.float64]  # (n, C, H, W)
_LEAVES = 32  # discs of an image; fewer in small images, whose numbers describe fewer


class Images(Kind):
    """Numbers u per image: style, contrast, exponent, saturation, C of brightness, and C·H·W of noise."""

    def __init__(self, shape: Shape, photos: Photos | None = None):
        super().__init__(shape, photos)
        self.draws = 4 + shape[0] + math.prod(shape)

    def images(self, numbers: NDArray[Any]) -> NDArray[Any]:
        out = np.empty((len(numbers), *self.shape), np.uint8)
        numbers = numbers.astype(np.float64)
        styles = (3 * numbers[:, 0]).astype(np.int64)
        for style, draw in enumerate((_several_scales, _spectrum, _dead_leaves)):
            chosen = numbers[styles == style]
            if len(chosen):
                channels = self.shape[0]
                contrast, exponent, saturation = (chosen[:, i, None, None, None] for i in (1, 2, 3))
                noise = chosen[:, 4 + channels :].reshape(-1, *self.shape)
                field = _standardise(draw(noise, exponent))
                field = saturation * field + (1 - saturation) * field.mean(1, keepdims=True)
                brightness = 0.2 + 0.6 * chosen[:, 4 : 4 + channels, None, None]
                pixels = brightness + (0.05 + 0.3 * contrast) * field
                out[styles == style] = np.floor(256 * pixels).clip(0, 255)
        return out


def _standardise(field: Field) -> Field:
    """Return fields with mean 0 and standard deviation 1 in each image."""
    field = field - field.mean((1, 2, 3), keepdims=True)
    deviation: Field = np.maximum(field.std((1, 2, 3), keepdims=True), 1e-6)
    return field / deviation


def _several_scales(noise: Field, exponent: Field) -> Field:
    """Sum noise in squares of 1, 2, 4, … pixels; squares of side s have the amplitude s^(1.5 u)."""
    height, width = noise.shape[2:]
    field, side = np.zeros_like(noise), 1
    while side < min(height, width):
        squares = noise[:, :, : -(-height // side), : -(-width // side)]
        field += side ** (1.5 * exponent) * squares.repeat(side, 2).repeat(side, 3)[:, :, :height, :width]
        side *= 2
    return field


def _spectrum(noise: Field, exponent: Field) -> Field:
    """Filter noise so that its amplitude at the frequency f is proportional to 1 / f^(0.5 + 1.5 u)."""
    height, width = noise.shape[2:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no constant
    return np.fft.irfft2(np.fft.rfft2(noise) * frequency ** -(0.5 + 1.5 * exponent), s=(height, width))


def _dead_leaves(noise: Field, exponent: Field) -> Field:
    """Paint discs over each other, with a density r^−3 of radii r from 1/8 to 1/2 of the image's larger side.

    Leaf k takes 3 + C numbers of the noise, from number k (3 + C) on: its row, column, radius and colour.
    """
    count, channels, height, width = noise.shape
    leaves = min(_LEAVES, channels * height * width // (3 + channels))
    described = noise.reshape(count, -1)[:, : leaves * (3 + channels)].reshape(count, leaves, 3 + channels)
    y, x, radius = described[..., 0] * height, described[..., 1] * width, described[..., 2]
    radius = max(height, width) / 2 / np.sqrt(16 - 15 * radius)  # inverse of the distribution function
    top = np.zeros((count, height, width), np.int64)
    for k in range(leaves):
        rows = (np.arange(height) + 0.5 - y[:, k, None]) ** 2
        columns = (np.arange(width) + 0.5 - x[:, k, None]) ** 2
        np.copyto(top, k, where=rows[:, :, None] + columns[:, None, :] < radius[:, k, None, None] ** 2)
    colours = described[np.arange(count)[:, None, None], top, 3:]
    return colours.transpose(0, 3, 1, 2)
