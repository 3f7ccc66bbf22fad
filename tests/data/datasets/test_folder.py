import shutil
from pathlib import Path

import pytest

from tspipe.data.datasets import folder, open_dataset
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


def test_class_without_images(root, capsys):
    for split in ("train", "test"):
        shutil.rmtree(root / split / "dog")
        (root / split / "dog").mkdir()
        (root / split / "dog/1.heic").touch()
    with pytest.raises(DatasetError) as problem:
        folder.load(root, "train")
    assert str(problem.value) == f"{root}/train/dog holds no images that Pillow decodes: 1 × .heic."
    assert capsys.readouterr().err == ""
    assert folder.load(root, "test").keys == ["cat/c.jpg"]
    folder.load(root, "test")
    remarks = [
        f"{root}/test/dog holds no images that Pillow decodes: 1 × .heic.",
        f"{root}/test: files are left out: 1 × .heic.",
    ]
    assert capsys.readouterr().err.splitlines() == remarks, "each remark is made once"
    shutil.rmtree(root / "test/cat")
    with pytest.raises(DatasetError) as problem:
        folder.load(root, "test")
    assert str(problem.value) == f"{root}/test holds no images that Pillow decodes: 1 × .heic."


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
