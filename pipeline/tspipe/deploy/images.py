"""Images as users have them, made a network's input: paths, Pillow images and arrays."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tspipe.data.decode import decode, to_pixels
from tspipe.data.preprocess import Preprocess
from tspipe.errors import DatasetError

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
Pictures = Picture | Sequence[Picture]


def prepare(picture: Picture, preprocess: Preprocess, input_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return a picture as (H, W, C) uint8, resized and cropped; colours become grey where the network takes grey.

    Raises DatasetError, which names the picture, if it cannot be decoded or has another size than the network takes.
    """
    name = str(picture) if isinstance(picture, str | os.PathLike) else "The image"
    pixels = _pixels(picture)
    if pixels.shape[2] not in (1, 3, preprocess.channels):
        raise DatasetError(
            f"{name} has {pixels.shape[2]} channels, and the student takes {preprocess.channels}. Arrays are (H, W) or "
            "(H, W, C)."
        )
    if preprocess.channels == 1 and pixels.shape[2] == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
    try:
        prepared = preprocess.apply(pixels)
    except DatasetError as error:
        raise DatasetError(f"{name}: {error}") from error
    channels, *size = input_shape
    if prepared.shape != (*size, channels):
        raise DatasetError(
            f"{name} has {prepared.shape[0]}×{prepared.shape[1]} pixels (height×width), and the student takes "
            f"{size[0]}×{size[1]} without resizing. Resize the image first."
        )
    return prepared


def as_sequence(pictures: Pictures) -> Sequence[Picture]:
    """Return the pictures as a sequence; one path, Pillow image or array of at most three dimensions is one picture."""
    if isinstance(pictures, np.ndarray):
        return [pictures] if pictures.ndim <= 3 else list(pictures)
    return [pictures] if isinstance(pictures, str | os.PathLike | Image.Image) else list(pictures)


def _pixels(picture: Picture) -> NDArray[np.uint8]:
    """Return a picture as (H, W, C) uint8."""
    if isinstance(picture, str | os.PathLike):
        return decode(Path(picture))
    if isinstance(picture, Image.Image):
        try:
            return to_pixels(picture)
        except ValueError as error:
            raise DatasetError(f"The image cannot be used: {error}.") from error
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not pixels.size:
        raise DatasetError(
            f"An image is {pixels.dtype} of shape {pixels.shape}. Give paths, Pillow images, or uint8 arrays of shape "
            "(H, W) or (H, W, C)."
        )
    return pixels.reshape(*pixels.shape[:2], -1)
