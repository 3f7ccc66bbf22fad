"""The decoder: what becomes of every kind of image file and of Pillow's images."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared import write_picture
from tspipe.data.decode import check_header, decode, load_image, set_pixel_limit
from tspipe.errors import DatasetError

NO_RANGE = (
    "signed, 32-bit and floating-point pixels have no agreed range. Convert all images to unsigned 8 or 16 bits with "
    "one scale, such as numpy.uint8(255 * (pixels - low) / (high - low))"
)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(orientation, tmp_path):
    displayed = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {
        1: displayed,
        2: displayed[:, ::-1],
        3: displayed[::-1, ::-1],
        4: displayed[::-1],
        5: displayed.T,
        6: np.rot90(displayed),
        7: displayed[::-1, ::-1].T,
        8: np.rot90(displayed, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decode(tmp_path / "a.png"), np.repeat(displayed[..., None], 3, 2))


@pytest.mark.parametrize("dtype, extension", [("<u2", "png"), ("<u2", "tif"), (">u2", "tif"), ("<u2", "jp2")])
def test_16_bits_become_the_upper_8(dtype, extension, tmp_path):
    wide = np.array([[0, 255, 256], [32768, 40000, 65535]], dtype)
    Image.fromarray(wide).save(tmp_path / f"a.{extension}")
    pixels = decode(tmp_path / f"a.{extension}")
    assert pixels.dtype == np.uint8
    assert pixels[:, :, 0].tolist() == [[0, 0, 1], [128, 156, 255]]
    np.testing.assert_array_equal(pixels, np.repeat(pixels[:, :, :1], 3, 2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_modes(mode, tmp_path):
    bright = Image.new("L", (3, 2), 255)
    image = Image.fromarray(np.full((2, 3), 65535, np.uint16)) if mode == "I;16" else bright.convert(mode)
    image.save(tmp_path / f"a.{'jpg' if mode in ('CMYK', 'YCbCr') else 'tif'}")
    pixels = decode(next(tmp_path.iterdir()))
    assert pixels.shape == (2, 3, 3)
    assert pixels.min() >= 250


def test_alpha_is_dropped(tmp_path):
    Image.new("RGBA", (2, 1), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png").tolist() == [[[10, 20, 30], [10, 20, 30]]]


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "a.png").tolist() == [[[10, 20, 30], [10, 20, 30]]]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (2, 1), colour) for colour in ["red", "blue"]]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "a.gif").tolist() == [[[255, 0, 0], [255, 0, 0]]]


@pytest.mark.parametrize("limit", [95, 47])  # 96 pixels: past the limit, past twice the limit
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(limit, tmp_path, monkeypatch):
    write_picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DatasetError) as problem:
        decode(tmp_path / "a.png")
    assert (
        str(problem.value)
        == f"{tmp_path}/a.png has more than {limit} pixels. Raise the limit with TSPIPE_MAX_PIXELS=N."
    )


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_where_warnings_are_errors(tmp_path, monkeypatch):
    write_picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 95)
    with pytest.raises(DatasetError) as problem:
        decode(tmp_path / "a.png")
    assert str(problem.value) == f"{tmp_path}/a.png has more than 95 pixels. Raise the limit with TSPIPE_MAX_PIXELS=N."


def test_just_within_the_limit(tmp_path, monkeypatch):
    write_picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96)
    assert decode(tmp_path / "a.png").shape == (8, 12, 3)


def test_no_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DatasetError) as problem:
        decode(path)
    assert str(problem.value) == f"{path} is not an image that Pillow knows."


def test_floating_point(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.zeros((2, 3), np.float32)).save(path)
    with pytest.raises(DatasetError) as problem:
        decode(path)
    assert str(problem.value) == f"{path} cannot be decoded: {NO_RANGE}."


def test_a_folder_named_like_an_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.mkdir()
    with pytest.raises(DatasetError) as problem:
        decode(path)
    assert str(problem.value) == f"{path} is not a regular file."


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp", "bmp", "tif"])
def test_damage_is_a_dataset_error_or_an_image(extension, tmp_path):
    """Whatever bytes are wrong, a reader gets pixels or the error that names the file."""
    path = tmp_path / f"a.{extension}"
    write_picture(path)
    complete = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        data = (
            bytearray(complete[: random.integers(1, len(complete))]) if random.random() < 0.3 else bytearray(complete)
        )
        for position in random.integers(0, len(data), 3):
            data[position] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = decode(path)
        except DatasetError as problem:
            assert str(path) in str(problem)
        else:
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


def write_tiff(path: Path, pixels: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> None:
    """Write a grey TIFF of one strip; pixels are stored as they are, those of 12 bits packed."""
    data = pixels.tobytes()
    if bits == 12:
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pixels.reshape(-1, 2).tolist())
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags[339] = sample_format
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, tags[tag]) for tag in sorted(tags))
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data) + len(data) % 2)
    path.write_bytes(header + data + b"\0" * (len(data) % 2) + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(
    ("bits", "photometric", "expected"),
    [
        (16, 1, [[0, 1, 15], [128, 156, 255]]),
        (16, 0, [[255, 254, 240], [127, 99, 0]]),  # WhiteIsZero
        (12, 1, [[0, 15], [255, 1], [2, 160]]),
    ],
)
def test_the_whole_range_of_wide_integers_is_mapped(bits, photometric, expected, tmp_path):
    wide = np.array([[0, 256, 4095], [32768, 40000, 65535]], "<u2")
    wide = np.array([[0, 255], [4095, 16], [32, 2560]]) if bits == 12 else wide
    write_tiff(tmp_path / "a.tif", wide, bits, photometric)
    assert decode(tmp_path / "a.tif")[:, :, 0].tolist() == expected


def test_a_pgm_of_16_bits(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 255, 40000))
    assert decode(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, 156]
    (tmp_path / "b.pgm").write_bytes(b"P5 2 1 4095\n" + struct.pack(">2H", 255, 4095))
    assert decode(tmp_path / "b.pgm")[0, :, 0].tolist() == [15, 255]


@pytest.mark.parametrize(("dtype", "sample_format"), [("<i1", 2), ("<i2", 2), ("<i4", 2), ("<u4", 1), ("<f4", 3)])
def test_a_type_without_an_agreed_range_is_refused(dtype, sample_format, tmp_path):
    write_tiff(tmp_path / "a.tif", np.ones((2, 4), dtype), np.dtype(dtype).itemsize * 8, 1, sample_format)
    for function in (decode, check_header):
        with pytest.raises(DatasetError) as problem:
            function(tmp_path / "a.tif")
        assert str(problem.value) == f"{tmp_path}/a.tif cannot be decoded: {NO_RANGE}."


def test_fits_of_16_bits_is_signed(tmp_path):
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 3, "NAXIS2": 2}
    header = "".join(f"{name:<8}= {value:>20}".ljust(80) for name, value in cards.items()) + "END"
    (tmp_path / "a.fits").write_bytes(header.ljust(2880).encode() + np.arange(6, dtype=">i2").tobytes().ljust(2880))
    with pytest.raises(DatasetError) as problem:
        decode(tmp_path / "a.fits")
    assert str(problem.value) == f"{tmp_path}/a.fits cannot be decoded: {NO_RANGE}."


def test_a_nearly_black_image_is_remarked_on_once_for_each_dataset(tmp_path, capsys):
    dark, bright = np.full((2, 3), 4095, np.uint16), np.full((2, 3), 7000, np.uint16)
    for name, pixels in (("a.png", bright), ("b.png", dark), ("c.png", dark), ("other.png", dark)):
        Image.fromarray(pixels).save(tmp_path / name)
    for name in ("a.png", "b.png", "c.png"):
        decode(tmp_path / name, str(tmp_path))
    decode(tmp_path / "other.png", f"{tmp_path}/other")
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/{name} is nearly black: its largest value is 4,095 of 65,535. If its pixels have fewer than 16 "
        "bits, scale those of the dataset to 16."
        for name in ("b.png", "other.png")
    ]


def test_a_nearly_black_image_of_16_bits_in_colour_is_remarked_on(tmp_path, capsys):
    for name, value in (("bright.png", 7000), ("dark.png", 4095)):
        write_rgb16(tmp_path / name, value)
        assert decode(tmp_path / name, str(tmp_path)).max() == value >> 8
    Image.new("RGB", (3, 2), (9, 9, 9)).save(tmp_path / "8bits.png")
    decode(tmp_path / "8bits.png", f"{tmp_path}/8")
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/dark.png is nearly black: its largest value is 15 of 255. If its pixels have fewer than 16 bits, "
        "scale those of the dataset to 16."
    ]


def write_rgb16(path: Path, value: int) -> None:
    """Write a PNG of one value with 16 bits a channel, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + struct.pack(">9H", *[value] * 9) for _ in range(2))
    header = chunk(b"IHDR", struct.pack(">2I5B", 3, 2, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_damaged_exif_on_sound_pixels(extension, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # orientation, x resolution
    data = exif.tobytes()
    wrong_type = data.replace(bytes.fromhex("011a0005"), bytes.fromhex("011a0007"))
    no_header = data.replace(b"MM\0*", b"MM\0-")
    assert len({data, wrong_type, no_header}) == 3
    image = Image.fromarray(np.tile(np.arange(0, 240, 20, np.uint8), (8, 1))).convert("RGB")
    image.save(tmp_path / f"plain.{extension}")
    plain = decode(tmp_path / f"plain.{extension}")
    for exif_data, expected in ((data, np.rot90(plain, -1)), (wrong_type, np.rot90(plain, -1)), (no_header, plain)):
        image.save(tmp_path / f"a.{extension}", exif=exif_data)
        np.testing.assert_array_equal(decode(tmp_path / f"a.{extension}"), expected)


def test_the_pixel_limit_can_be_set(tmp_path, monkeypatch):
    write_picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    set_pixel_limit("96")
    assert decode(tmp_path / "a.png").shape == (8, 12, 3)
    set_pixel_limit("0")
    assert decode(tmp_path / "a.png").shape == (8, 12, 3)
    with pytest.raises(DatasetError) as problem:
        set_pixel_limit("-1")
    assert str(problem.value) == "TSPIPE_MAX_PIXELS is '-1'. Give it a number of pixels, or 0 for no limit."


@pytest.mark.parametrize("function", [decode, check_header])
def test_a_pipe_is_refused_without_waiting_for_its_other_end(function, tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DatasetError) as problem:
        function(tmp_path / "a.png")
    assert str(problem.value) == f"{tmp_path}/a.png is not a regular file."


def test_postscript_is_not_run(tmp_path):
    """Pillow would give it to Ghostscript, whatever its name."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(DatasetError) as problem:
        decode(tmp_path / "a.jpg")
    assert str(problem.value) == f"{tmp_path}/a.jpg is not an image that Pillow knows."


def test_a_loader_for_torchvision_yields_the_same_pixels(tmp_path):
    write_picture(tmp_path / "a.jpg", orientation=6)
    np.testing.assert_array_equal(np.asarray(load_image(f"{tmp_path}/a.jpg")), decode(tmp_path / "a.jpg"))
