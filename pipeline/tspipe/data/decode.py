"""The decoder of image files, which every path to pixels uses."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tspipe.data.datasets import Pixels
from tspipe.errors import DatasetError


def decode(path: Path) -> Pixels:
    """Decode an image file to (H, W, 3) uint8, rotated by its EXIF orientation. Safe to call from several threads.

    Grey becomes three equal channels, 16 bits their upper 8, a palette its colours. Alpha is dropped, as in
    torchvision's ImageFolder; an animation yields its first frame.

    Raises DatasetError naming the file: missing, truncated, no image, floating point, or larger than Pillow's
    limit against decompression bombs.
    """
    with _open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(_rgb(image))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Open an image file; an error inside the `with` statement names the file."""
    try:
        with Image.open(path) as image:
            # Pillow only warns up to twice its limit, and warnings cannot be caught safely in threads.
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            yield image
            return
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reason = f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except UnidentifiedImageError:
        reason = "is not an image that Pillow knows"
    except FileNotFoundError:
        reason = "does not exist"
    except Exception as problem:  # Pillow's decoders raise many types of errors for broken files
        detail = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        reason = f"cannot be decoded: {detail}"
    raise DatasetError(f"{path} {reason}.")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip to 255
        wide = np.asarray(image).astype(np.int64)  # in either byte order
        image = Image.fromarray((wide.clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of a direct conversion to RGB
    return image.convert("RGB")
