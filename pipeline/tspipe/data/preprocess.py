"""From a dataset's pixels to a network's input: the one description both stages use.

It has two halves. `apply` (resize, centre crop) goes from uint8 to uint8, once per image; `normalise` goes from
uint8 or [0, 1] to the network's floats, once per batch. The description is stored in the cache, so that stage two
cannot use another. A view of an image, moved or mirrored, is made between resize and crop.
"""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from tspipe.errors import DatasetError

_PIL_MODES = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


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

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return len(self.mean)

    def as_dict(self) -> dict[str, Any]:
        """In the form of the cache's manifest: lists, not tuples."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Preprocess":
        """The inverse of `as_dict`."""
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**plain)

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop one image: (H, W, C) uint8 in, (H', W', `channels`) uint8 out.

        Raises DatasetError when the crop is larger than the image or the channels cannot be had.
        """
        if self.resize is not None and image.shape[:2] != self.resize:
            height, width = self.resize
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            resized = np.asarray(picture.resize((width, height), _PIL_MODES[self.interpolation]))
            image = resized.reshape(height, width, -1)
        rows, columns = self._centre(*image.shape[:2])
        image = image[rows, columns]
        if image.shape[2] == 1 and self.channels > 1:
            image = np.repeat(image, self.channels, axis=2)
        if image.shape[2] != self.channels:
            raise DatasetError(f"the image has {image.shape[2]} channels, mean and std have {self.channels}.")
        return np.ascontiguousarray(image)

    @property
    def before_views(self) -> "Preprocess":
        """The same without the crop: `apply` then gives what `replay` takes."""
        return replace(self, crop=None)

    def replay(self, images: Tensor, views: Tensor | None = None) -> Tensor:
        """Views, cropped, of images that are not: (n, C, H, W) in, (n, C, H', W') of the same dtype out, channels-last.

        A crop at a random place is one in the middle of an image that was moved.

        Args:
            views: (n, 3) integers on the images' device, as for `shift_and_flip`; None: the images as they are.

        Raises DatasetError when the crop is larger than the images.
        """
        rows, columns = self._centre(*images.shape[2:])
        images = images if views is None else shift_and_flip(images, views)
        return images[:, :, rows, columns].contiguous(memory_format=torch.channels_last)

    def _centre(self, height: int, width: int) -> tuple[slice, slice]:
        """The rows and columns that the crop leaves of an image."""
        if self.crop is None:
            return slice(None), slice(None)
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        if top < 0 or left < 0:
            raise DatasetError(f"a crop of {self.crop} does not fit an image of {height}×{width}.")
        return slice(top, top + self.crop), slice(left, left + self.crop)

    def __call__(self, image: Image.Image | NDArray[np.uint8]) -> Tensor:
        """Both halves for one image, (H, W) or (H, W, C) uint8, as torchvision's datasets want a transform."""
        array = np.array(image)  # a copy: Pillow's own memory cannot be written to, which PyTorch warns of
        pixels = torch.from_numpy(self.apply(array.reshape(*array.shape[:2], -1)))
        return self.normalise(pixels.permute(2, 0, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """(n, C, H, W) of uint8, or of float32 in [0, 1], to the network's float32 of the same shape."""
        of_bytes, (count, channels, height, width) = images.dtype == torch.uint8, (-1, *images.shape)[-4:]
        if images.ndim < 4 or not images.is_contiguous(memory_format=torch.channels_last):
            scale, shift = (v[:, None, None] for v in self._line(1, of_bytes, images.device))
            return images.to(torch.float32).mul(scale).sub_(shift)
        # Channels-last, an image is one line of pixels: three channels as the innermost loop would be 4 × slower.
        scale, shift = self._line(height * width, of_bytes, images.device)
        lines = images.permute(0, 2, 3, 1).reshape(count, height * width * channels).to(torch.float32)
        # Of bytes that is a copy, which may be written to: with memory for another it would take twice as long.
        lines = (lines.mul_(scale) if of_bytes else lines * scale).sub_(shift)
        return lines.view(count, height, width, channels).permute(0, 3, 1, 2)

    def _line(self, pixels: int, of_bytes: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        return _scale_and_shift(self.mean, self.std, pixels, of_bytes, device)


@lru_cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], pixels: int, of_bytes: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(x / 255 − mean) / std as one multiplication and one subtraction of a line of pixels, channels innermost.

    Kept, since making them waits for a GPU.
    """
    means, deviations = (torch.tensor(v, device=device).repeat(pixels) for v in (mean, std))
    return 1 / ((255.0 if of_bytes else 1.0) * deviations), means / deviations


def shift_and_flip(images: Tensor, views: Tensor) -> Tensor:
    """Replay views: move each image by (dy, dx) pixels, zeros coming in at the edges, then mirror it where flip is 1.

    Args:
        images: (n, C, H, W), any dtype.
        views: (n, 3) integers: dy, dx, flip.
    """
    n, channels, height, width = images.shape
    dy, dx, flip = views.long().unbind(1)
    rows = torch.arange(height, device=images.device) - dy[:, None]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns) - dx[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    # Pixels by one number each: by image, row and column they would be gathered 3 × slower.
    rows = torch.arange(n, device=images.device)[:, None] * height + rows.clamp(0, height - 1)
    pixels = rows[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    moved = images.permute(0, 2, 3, 1).reshape(n * height * width, channels).index_select(0, pixels.view(-1))
    return moved.view(n, height, width, channels).mul_(inside[..., None]).permute(0, 3, 1, 2)
