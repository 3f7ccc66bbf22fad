"""From a dataset's pixels to a network's input: the one description that both stages use.

It has two parts. `apply` (resize, centre crop) goes from uint8 to uint8, once per image; `normalise` goes from
uint8 or [0, 1] to the network's floats, once per batch. The cache stores the description, so that stage two
cannot use another. A view of an image is shifted and flipped between resize and crop.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from tspipe.data.decode import to_pixels
from tspipe.errors import DatasetError

if TYPE_CHECKING:  # recipes describe preprocessing, and are listed without the seconds that importing torch takes
    import torch
    from torch import Tensor

_LARGEST_SIDE = 4096  # pixels, as in a cache


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop, then (x / 255 − mean) / std.

    The fields' descriptions are those of the settings in a recipe.
    """

    mean: Annotated[
        tuple[float, ...],
        Field(
            description="The mean per channel, for pixels in [0, 1]. Its length is the number of channels of the "
            "network's input; a grey image is repeated to fill them."
        ),
    ]
    std: Annotated[tuple[float, ...], Field(description="The standard deviation per channel, for pixels in [0, 1].")]
    resize: Annotated[tuple[int, int] | None, Field(description="(height, width) in pixels; none keeps the size.")] = (
        None
    )
    crop: Annotated[int | None, Field(description="The side of the centred square in pixels; none keeps the size.")] = (
        None
    )
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic"],
        Field(description="How resizing samples; bilinear and bicubic are antialiased, as in PIL."),
    ] = "bilinear"

    # For recipes: a mistyped field, Infinity and NaN are errors.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std has {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if min(*(self.resize or (1, 1)), self.crop or 1) < 1:
            raise ValueError("resize and crop must be positive")
        if max(*(self.resize or (1, 1)), self.crop or 1) > _LARGEST_SIDE:
            raise ValueError(f"resize and crop must be at most {_LARGEST_SIDE} pixels")

    @property
    def channels(self) -> int:
        """The number of channels of the network's input."""
        return len(self.mean)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as the cache's manifest has them: lists, not tuples."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preprocess:
        """Return the preprocessing with these fields; the inverse of `as_dict`."""
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**plain)

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop one image: (H, W, C) uint8 in, (H', W', `channels`) uint8 out.

        Raises DatasetError when the crop is larger than the image or the number of channels does not fit.
        """
        if self.resize is not None and image.shape[:2] != self.resize:
            height, width = self.resize
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            resized = np.asarray(picture.resize((width, height), Image.Resampling[self.interpolation.upper()]))
            image = resized.reshape(height, width, -1)
        rows, columns = self._centre(*image.shape[:2])
        image = image[rows, columns]
        if image.shape[2] == 1 and self.channels > 1:
            image = np.repeat(image, self.channels, axis=2)
        if image.shape[2] != self.channels:
            raise DatasetError(f"the image has {image.shape[2]} channels, mean and std have {self.channels}.")
        return np.ascontiguousarray(image)

    @property
    def before_views(self) -> Preprocess:
        """The preprocessing without the crop, whose output is the input of `replay`."""
        return replace(self, crop=None)

    def replay(self, images: Tensor, views: Tensor | None = None) -> Tensor:
        """Shift, flip and crop: (n, C, H, W) in, (n, C, H', W') of the same dtype out, channels-last.

        A random crop is a centre crop of a shifted image.

        Args:
            views: (n, 3) integers on the images' device, as for `shift_and_flip`; None to crop only.

        Raises DatasetError when the crop is larger than the images.
        """
        import torch

        rows, columns = self._centre(*images.shape[2:])
        images = images if views is None else shift_and_flip(images, views)
        return images[:, :, rows, columns].contiguous(memory_format=torch.channels_last)

    def _centre(self, height: int, width: int) -> tuple[slice, slice]:
        """Return the rows and columns of the centre crop."""
        if self.crop is None:
            return slice(None), slice(None)
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        if top < 0 or left < 0:
            raise DatasetError(f"a crop of {self.crop} does not fit an image of {height}×{width}.")
        return slice(top, top + self.crop), slice(left, left + self.crop)

    def __call__(self, image: Image.Image | NDArray[np.uint8]) -> Tensor:
        """Apply both parts to one image: a transform for torchvision's datasets.

        Args:
            image: (H, W) or (H, W, C) uint8; or Pillow's, which becomes the pixels that tspipe decodes from its file.

        Raises DatasetError for pixels of another type, or without an agreed range.
        """
        import torch

        pixels = np.array(self.apply(self.to_array(image)))  # a copy, since PyTorch warns of read-only memory
        return self.normalise(torch.from_numpy(pixels).permute(2, 0, 1))

    def to_array(self, image: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return an image as (H, W, C) uint8; Pillow's has three channels, or one if it is grey and so is the input."""
        if isinstance(image, Image.Image):
            try:
                pixels = to_pixels(image)
            except (ValueError, OSError, SyntaxError) as problem:  # Pillow decodes a file when it is used
                raise DatasetError(f"A Pillow image of mode {image.mode} cannot be converted: {problem}.") from problem
            return pixels[:, :, :1] if self.channels == 1 and Image.getmodebase(image.mode) == "L" else pixels
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3) and image.size:
            return image.reshape(*image.shape[:2], -1)
        kind = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DatasetError(f"Preprocess takes a Pillow image or a uint8 array of shape (H, W, C), not {kind}.")

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise (n, C, H, W) uint8, or float32 in [0, 1], to float32 of the same shape."""
        import torch

        is_uint8, (count, channels, height, width) = images.dtype == torch.uint8, (-1, *images.shape)[-4:]
        if images.ndim < 4 or not images.is_contiguous(memory_format=torch.channels_last):
            scale, shift = _scale_and_shift(self.mean, self.std, 1, is_uint8, images.device)
            scale, shift = scale[:, None, None], shift[:, None, None]
            return images.to(torch.float32).mul(scale).sub_(shift)
        # A channels-last image is treated as one line of pixels: an inner loop over three channels is 4 × slower.
        scale, shift = _scale_and_shift(self.mean, self.std, height * width, is_uint8, images.device)
        lines = images.permute(0, 2, 3, 1).reshape(count, height * width * channels).to(torch.float32)
        # The float32 copy of bytes is overwritten in place, which takes half the time of allocating another.
        lines = (lines.mul_(scale) if is_uint8 else lines * scale).sub_(shift)
        return lines.view(count, height, width, channels).permute(0, 3, 1, 2)


@lru_cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], pixels: int, is_uint8: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return scale and shift of (x / 255 − mean) / std for a line of pixels, channels innermost.

    Cached, since the copy to a GPU waits for it. They are computed on the CPU, so that they are complete when this
    returns: a caller may use them in another CUDA stream.
    """
    import torch

    means, deviations = (torch.tensor(v).repeat(pixels) for v in (mean, std))
    scale = 1 / ((255.0 if is_uint8 else 1.0) * deviations)
    return scale.to(device), (means / deviations).to(device)


def shift_and_flip(images: Tensor, views: Tensor) -> Tensor:
    """Replay views: shift each image by (dy, dx) pixels, filled with zeros, then mirror it where flip is 1.

    Args:
        images: (n, C, H, W), any dtype.
        views: (n, 3) integers: dy, dx, flip.
    """
    import torch

    n, channels, height, width = images.shape
    dy, dx, flip = views.long().unbind(1)
    rows = torch.arange(height, device=images.device) - dy[:, None]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns) - dx[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    # One index per pixel: indices of image, row and column gather 3 × slower.
    rows = torch.arange(n, device=images.device)[:, None] * height + rows.clamp(0, height - 1)
    pixels = rows[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    shifted = images.permute(0, 2, 3, 1).reshape(n * height * width, channels).index_select(0, pixels.view(-1))
    return shifted.view(n, height, width, channels).mul_(inside[..., None]).permute(0, 3, 1, 2)
