import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tspipe.data.datasets import folder, open_dataset
from tspipe.data.decode import decode
from tspipe.errors import DatasetError

LAYOUT = "The layout is train/CLASS/IMAGE and test/CLASS/IMAGE."


@pytest.fixture
def root(archive) -> Path:
    return archive("folder")


def test_splits(root):
    train, test = folder.load(root, "train"), folder.load(root, "test")
    assert train.keys == ["cat/b.png", "cat/deep/a.jpg", "dog/1.jpg"]
    assert train.labels.tolist() == [0, 0, 1]
    assert test.keys == ["cat/c.jpg", "dog/2.PNG"]
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.array is None
    assert [train.read(i).shape for i in range(3)] == [(8, 12, 3)] * 3


def test_named_by_path(root):
    dataset = open_dataset(f"folder:{root}")
    assert (dataset.name, len(dataset.train), len(dataset.test)) == ("folder:folder", 3, 2)


def test_val_in_place_of_test(root):
    (root / "test").rename(root / "val")
    assert folder.load(root, "test").keys == ["cat/c.jpg", "dog/2.PNG"]


def test_test_goes_before_val(root, picture):
    picture(root / "val/cat/v.jpg")
    assert folder.load(root, "test").keys == ["cat/c.jpg", "dog/2.PNG"]


def test_sorted_by_class_then_path(root, picture):
    for name in ["cat-2/z.jpg", "cat/B.jpg", "cat/é.jpg", "cat/deep-2/a.jpg", "Ape/x.webp"]:
        picture(root / "train" / name)
    images = folder.load(root, "train")
    assert images.classes == ["Ape", "cat", "cat-2", "dog"]
    assert images.keys == [
        "Ape/x.webp",
        "cat/B.jpg",
        "cat/b.png",
        "cat/deep-2/a.jpg",
        "cat/deep/a.jpg",
        "cat/é.jpg",
        "cat-2/z.jpg",
        "dog/1.jpg",
    ]
    assert images.labels.tolist() == [0, 1, 1, 1, 1, 1, 2, 3]


def test_hidden_and_other_files_are_left_out(root, picture):
    picture(root / "train/cat/.hidden.png")
    picture(root / "train/cat/.cache/x.png")
    picture(root / "train/.git/x.png")
    picture(root / "train/stray.png")
    (root / "train/cat/notes.txt").touch()
    assert folder.load(root, "train").keys == ["cat/b.png", "cat/deep/a.jpg", "dog/1.jpg"]


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "bmp", "webp", "gif", "ppm", "tif", "tiff", "JPG", "TiF"])
def test_extensions(extension, root, picture):
    picture(root / f"train/cat/a.{extension}")
    images = folder.load(root, "train")
    assert images.keys[0] == f"cat/a.{extension}"
    assert images.read(0).shape == (8, 12, 3)


def test_linked_folders(root, tmp_path):
    shutil.move(root / "train", tmp_path / "elsewhere")
    (root / "train").mkdir()
    (root / "train/cat").symlink_to(tmp_path / "elsewhere/cat")
    (root / "train/dog").symlink_to(tmp_path / "elsewhere/dog")
    assert folder.load(root, "train").keys == ["cat/b.png", "cat/deep/a.jpg", "dog/1.jpg"]


def test_links_that_go_round(root):
    (root / "train/cat/deep/up").symlink_to(root / "train/cat")
    (root / "train/cat/other").symlink_to(root / "train/dog")
    (root / "train/dog/back").symlink_to(root / "train/cat")
    assert folder.load(root, "train").keys == [
        "cat/b.png",
        "cat/deep/a.jpg",
        "cat/other/1.jpg",
        "dog/1.jpg",
        "dog/back/b.png",
        "dog/back/deep/a.jpg",
    ]


def test_test_may_lack_a_class(root):
    shutil.rmtree(root / "test/cat")
    images = folder.load(root, "test")
    assert images.classes == ["cat", "dog"]
    assert images.labels.tolist() == [1]


@pytest.mark.parametrize("missing, looked", [("train", "{0}/train"), ("test", "{0}/test and {0}/val")])
def test_missing_split(missing, looked, root):
    shutil.rmtree(root / missing)
    with pytest.raises(DatasetError) as problem:
        open_dataset("folder", root)
    assert str(problem.value) == (
        f"There is no {missing} split in {root}: looked for {looked.format(root)}. {LAYOUT} Name it with --data FOLDER."
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_classes(split, root, picture):
    shutil.rmtree(root / split)
    picture(root / split / "stray.jpg")
    with pytest.raises(DatasetError) as problem:
        folder.load(root, split)
    assert str(problem.value) == f"{root}/{split} has no class folders. {LAYOUT}"


def test_class_that_train_does_not_have(root, picture):
    picture(root / "test/cow/1.jpg")
    with pytest.raises(DatasetError) as problem:
        folder.load(root, "test")
    assert str(problem.value) == f"{root}/test/cow: there is no class 'cow' in {root}/train."


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_without_images(split, root):
    shutil.rmtree(root / split / "dog")
    (root / split / "dog").mkdir()
    (root / split / "dog/1.heic").touch()
    with pytest.raises(DatasetError) as problem:
        folder.load(root, split)
    assert str(problem.value) == (
        f"{root}/{split}/dog holds no images. These are looked for: bmp, gif, jpeg, jpg, png, ppm, tif, tiff, webp."
    )


def test_name_that_is_not_utf8(root):
    try:
        (root / "train/dog/\udcff.jpg").touch()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    with pytest.raises(DatasetError) as problem:
        folder.load(root, "train")
    assert str(problem.value) == f"'{root}/train/dog' holds a name that is not UTF-8. Rename it."


def test_broken_link_is_named(root):
    (root / "train/cat/a.jpg").symlink_to(root / "gone.jpg")
    with pytest.raises(DatasetError) as problem:
        folder.load(root, "train").read(0)
    assert str(problem.value) == f"{root}/train/cat/a.jpg does not exist."


# What decode makes of an image file.


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


@pytest.mark.parametrize("dtype, extension", [("<u2", "png"), ("<u2", "tif"), (">u2", "tif"), ("<i4", "tif")])
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
def test_decompression_bomb(limit, tmp_path, picture, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DatasetError) as problem:
        decode(tmp_path / "a.png")
    assert str(problem.value) == f"{tmp_path}/a.png has more than {limit} pixels."


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_where_warnings_are_errors(tmp_path, picture, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 95)
    with pytest.raises(DatasetError) as problem:
        decode(tmp_path / "a.png")
    assert str(problem.value) == f"{tmp_path}/a.png has more than 95 pixels."


def test_just_within_the_limit(tmp_path, picture, monkeypatch):
    picture(tmp_path / "a.png")
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
    assert str(problem.value) == f"{path} cannot be decoded: floating-point pixels have no agreed range."


def test_a_folder_named_like_an_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.mkdir()
    with pytest.raises(DatasetError) as problem:
        decode(path)
    assert str(problem.value) == f"{path} cannot be decoded: Is a directory."


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp", "bmp", "tif"])
def test_damage_is_a_dataset_error_or_an_image(extension, tmp_path, picture):
    """Whatever bytes are wrong, a reader gets pixels or the error that names the file."""
    path = tmp_path / f"a.{extension}"
    picture(path)
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
