"""The decoder of images, which every path to pixels uses."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from tspipe.data.datasets import Pixels
from tspipe.errors import DatasetError
from tspipe.utils.progress import remark_once

# Pillow only identifies these formats, and passes EPS to another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT, _ORIENTATION = 258, 262, 339, 274  # tags of TIFF and EXIF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def set_pixel_limit(text: str) -> None:
    """Set Pillow's limit of pixels in an image, the value of TSPIPE_MAX_PIXELS; 0 is no limit."""
    if not text.isdecimal():
        raise DatasetError(f"TSPIPE_MAX_PIXELS is {text!r}. Give it a number of pixels, or 0 for no limit.")
    Image.MAX_IMAGE_PIXELS = int(text) or None


if limit := os.environ.get("TSPIPE_MAX_PIXELS"):
    set_pixel_limit(limit)


def has_image_extension(name: str) -> bool:
    """Return whether a file's name ends like that of an image that Pillow, with the plug-ins it has now, decodes."""
    image_format = Image.registered_extensions().get(PurePath(name).suffix.lower())
    return image_format in Image.OPEN and image_format not in _NOT_DECODED


def decode(path: Path, dataset: str = "") -> Pixels:
    """Decode an image file to (H, W, 3) uint8, as `to_pixels` does. Safe to call from several threads.

    Raises DatasetError naming the file: missing, truncated, no image, pixels without an agreed range, or larger than
    the limit against decompression bombs.
    """
    with _open(path) as image:
        return to_pixels(image, dataset)


def check_header(path: Path) -> None:
    """Read only the header of an image file; raise DatasetError if it shows that `decode` would fail."""
    with _open(path) as image:
        _check_range(image)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file to exactly the pixels that the teacher sees: a `loader` for torchvision's datasets."""
    return Image.fromarray(decode(Path(path)))


def to_pixels(image: Image.Image, dataset: str = "") -> Pixels:
    """Return an image as (H, W, 3) uint8, rotated by its EXIF orientation; damaged EXIF is ignored.

    Grey becomes three equal channels, a palette its colours. The range of unsigned 12 and 16 bits is mapped to 8 bits
    by their upper 8. Alpha is dropped, as in torchvision's ImageFolder; an animation yields its first frame.

    Args:
        dataset: for each, one image that is nearly black because its values use few of 16 bits is remarked on.

    Raises ValueError for signed, 32-bit and floating-point pixels.
    """
    _check_range(image)
    has_16_bits = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    if image.mode.startswith("I"):
        rgb = Image.fromarray(_upper_8_bits(image, dataset)).convert("RGB")
    else:  # Pillow warns of a direct conversion of a palette with transparency
        rgb = (image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image).convert("RGB")
        if has_16_bits:  # in colour, of which Pillow gives the upper 8
            _remark_on_range(image, int(np.asarray(rgb).max()), 8, dataset)
    try:
        transposition = _TRANSPOSITIONS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises many types of errors for damaged EXIF
        transposition = None
    return np.asarray(rgb if transposition is None else rgb.transpose(transposition))


def _check_range(image: Image.Image) -> None:
    """Raise ValueError if the range of the pixels is not that of an unsigned type of 8 to 16 bits."""
    # Pillow has the 16 bits of these formats in its mode of signed 32 bits.
    unclear = image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM"))
    unclear |= image.mode == "I;16" and image.format == "FITS"  # signed
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        unclear |= any(sample != _UNSIGNED for sample in image.tag_v2.get(_SAMPLE_FORMAT, ()))
    if unclear:
        raise ValueError(
            "signed, 32-bit and floating-point pixels have no agreed range. Convert all images to unsigned 8 or 16 "
            "bits with one scale, such as numpy.uint8(255 * (pixels - low) / (high - low))"
        )


def _upper_8_bits(image: Image.Image, dataset: str) -> NDArray[np.uint8]:
    wide, bits = np.asarray(image).astype(np.int64), 16  # in either byte order
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]
        wide = (1 << bits) - 1 - wide if image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else wide
    _remark_on_range(image, int(wide.max()), bits, dataset)
    return (wide >> (bits - 8)).astype(np.uint8)


def _remark_on_range(image: Image.Image, largest: int, bits: int, dataset: str) -> None:
    """Remark on an image of more than 8 bits that is nearly black; `largest` is its largest value in `bits`."""
    if largest < (1 << bits) // 10:
        original = 16 if bits == 8 else bits  # of colour, Pillow gives the upper 8 of 16
        remark_once(
            f"narrow range {dataset}",
            f"{getattr(image, 'filename', '') or 'An image'} is nearly black: its largest value is {largest:,} of "
            f"{(1 << bits) - 1:,}. If its pixels have fewer than {original} bits, scale those of the dataset to "
            f"{original}.",
        )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Open an image file; an error inside the `with` statement names the file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            raise DatasetError(f"{path} is not a regular file.")
        Image.init()
        formats = [name for name in Image.ID if name not in _NOT_DECODED]
        with Image.open(path, formats=formats) as image:
            # Pillow only warns up to twice its limit, and warnings cannot be caught safely in threads.
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            yield image
            return
    except DatasetError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reason = f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels. Raise the limit with TSPIPE_MAX_PIXELS=N."
    except UnidentifiedImageError:
        reason = "is not an image that Pillow knows."
    except FileNotFoundError:
        reason = "does not exist."
    except Exception as problem:  # Pillow's decoders raise many types of errors for broken files
        detail = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        reason = f"cannot be decoded: {detail}."
    raise DatasetError(f"{path} {reason}")
