"""Resize, crop, normalise; shifts and flips."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tspipe.data.decode import to_pixels
from tspipe.data.preprocess import Preprocess, shift_and_flip
from tspipe.errors import DatasetError


def image(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_resize_and_crop_are_pillows() -> None:
    pixels = image(40, 30, 3)
    result = Preprocess((0.5,) * 3, (0.5,) * 3, resize=(20, 24), crop=16).apply(pixels)
    resized = Image.fromarray(pixels).resize((24, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(result, np.asarray(resized)[2:18, 4:20])


def test_grey_is_repeated_where_the_network_takes_colour() -> None:
    pixels = image(8, 8, 1)
    result = Preprocess((0.5,) * 3, (0.5,) * 3, resize=(16, 16)).apply(pixels)
    assert result.shape == (16, 16, 3)
    assert (result == result[:, :, :1]).all()


def test_colour_is_not_made_grey() -> None:
    with pytest.raises(DatasetError) as refused:
        Preprocess((0.5,), (0.5,)).apply(image(8, 8, 3))
    assert str(refused.value) == "the image has 3 channels, mean and std have 1."


def test_a_crop_larger_than_the_image() -> None:
    with pytest.raises(DatasetError) as refused:
        Preprocess((0.5,), (0.5,), crop=9).apply(image(8, 12, 1))
    assert str(refused.value) == "a crop of 9 does not fit an image of 8×12."


def test_normalise_is_the_formula_for_bytes_and_for_floats() -> None:
    preprocess = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.from_numpy(image(5, 4, 3)).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    expected = (pixels.double() / 255 - mean) / std
    before = pixels.clone()
    torch.testing.assert_close(preprocess.normalise(pixels).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(preprocess.normalise(pixels.float() / 255).double(), expected, rtol=0, atol=1e-6)
    assert (pixels == before).all()


def test_normalise_leaves_a_float_input_as_it_is() -> None:
    images = torch.rand(2, 1, 3, 3)
    before = images.clone()
    Preprocess((0.5,), (0.25,)).normalise(images)
    assert (images == before).all()


def test_it_survives_the_manifest() -> None:
    preprocess = Preprocess((0.5,), (0.25,), resize=(6, 7), crop=5, interpolation="bicubic")
    assert Preprocess.from_dict(preprocess.as_dict()) == preprocess


@given(
    views=st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6), st.integers(0, 1)), min_size=1, max_size=5),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_shift_and_flip_is_the_plain_loop(views: list[tuple[int, int, int]], height: int, width: int) -> None:
    images = torch.arange(1, len(views) * 2 * height * width + 1).view(len(views), 2, height, width)
    result = shift_and_flip(images, torch.tensor(views))
    for i, (dy, dx, flip) in enumerate(views):
        for y in range(height):
            for x in range(width):
                source_y, source_x = y - dy, (width - 1 - x if flip else x) - dx
                inside = 0 <= source_y < height and 0 <= source_x < width
                expected = images[i, :, source_y, source_x] if inside else torch.zeros(2)
                assert result[i, :, y, x].tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_layout_in_memory_changes_no_bit(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 7, 4), generator=draw, dtype=torch.uint8)
    images = images if dtype == torch.uint8 else torch.rand(images.shape, generator=draw)
    last = images.contiguous(memory_format=torch.channels_last)
    before = last.clone()
    preprocess = Preprocess((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    result = preprocess.normalise(last)
    assert torch.equal(result, preprocess.normalise(images))
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, before), "what is given is left as it is"


def pillow_images() -> dict[str, Image.Image]:
    colour = Image.fromarray(image(6, 5, 3))
    palette = colour.quantize(16)
    palette.info["transparency"] = 3
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (6, 5), np.uint16))
    modes = {mode: colour.convert(mode) for mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")}
    return {**modes, "P": palette, "I;16": wide}


@pytest.mark.parametrize("mode", list(pillow_images()))
def test_pillow_images_become_what_is_decoded_from_their_file(mode: str) -> None:
    picture = pillow_images()[mode]
    expected = to_pixels(picture)
    three, one = Preprocess((0.0,) * 3, (1.0,) * 3), Preprocess((0.0,), (1.0,))
    np.testing.assert_array_equal((three(picture) * 255).round().permute(1, 2, 0), expected)
    if mode in ("1", "L", "LA", "I;16"):
        np.testing.assert_array_equal((one(picture) * 255).round()[0], expected[:, :, 0])
    else:
        with pytest.raises(DatasetError, match="the image has 3 channels, mean and std have 1"):
            one(picture)


def test_a_pillow_image_is_rotated_by_its_exif() -> None:
    picture, exif = Image.fromarray(image(6, 5, 3)), Image.Exif()
    exif[0x0112] = 6
    picture.info["exif"] = exif.tobytes()
    assert Preprocess((0.0,) * 3, (1.0,) * 3)(picture).shape == (3, 5, 6)


def test_a_truncated_file_of_pillows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DatasetError, match=r"^A Pillow image of mode RGB cannot be converted: .*truncated"):
        Preprocess((0.5,) * 3, (0.5,) * 3)(Image.open(path))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_pillow_image_without_an_agreed_range(dtype: type) -> None:
    with pytest.raises(DatasetError) as refused:
        Preprocess((0.5,), (0.5,))(Image.fromarray(np.full((4, 4), 300, dtype)))
    mode = "I" if dtype == np.int32 else "F"
    assert str(refused.value).startswith(
        f"A Pillow image of mode {mode} cannot be converted: signed, 32-bit and floating-point pixels"
    )


@pytest.mark.parametrize(
    ("value", "description"),
    [
        (np.zeros((4, 5, 3), np.float32), "float32 of shape (4, 5, 3)"),
        (np.zeros((0, 16, 3), np.uint8), "uint8 of shape (0, 16, 3)"),
        (np.zeros((1, 4, 5, 3), np.uint8), "uint8 of shape (1, 4, 5, 3)"),
        (torch.zeros((3, 4, 5), dtype=torch.uint8), "Tensor"),
    ],
)
def test_what_is_no_image_is_refused(value: object, description: str) -> None:
    with pytest.raises(DatasetError) as refused:
        Preprocess((0.5,) * 3, (0.5,) * 3)(value)
    assert str(refused.value) == (
        f"Preprocess takes a Pillow image or a uint8 array of shape (H, W, C), not {description}."
    )
