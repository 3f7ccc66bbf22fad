import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unicodedata import normalize

import pytest
from PIL import Image

from tspipe.data.datasets import default_folder, folder, open_dataset
from tspipe.data.hold_out import HoldOut
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


def test_hidden_files_are_ignored_and_others_counted(root, picture, capsys):
    picture(root / "train/cat/.hidden.png")
    picture(root / "train/cat/.cache/x.png")
    picture(root / "train/.git/x.png")
    picture(root / "train/stray.png")
    for name in ("cat/notes.txt", "dog/deep.TXT", "dog/README", "dog/video.mpg", "dog/a.eps"):
        (root / "train" / name).touch()
    for _ in range(2):
        assert folder.load(root, "train").keys == ["cat/b.png", "cat/deep/a.jpg", "dog/1.jpg"]
    assert capsys.readouterr().err == (
        f"{root}/train: files are left out: 2 × .txt, 1 × without an extension, 1 × .eps, 1 × .mpg, "
        "1 × image outside the class folders.\n"
    )


@pytest.mark.parametrize(
    "extension", ["jpg", "jfif", "avif", "jp2", "png", "bmp", "webp", "gif", "pgm", "ppm", "tif", "tga", "ico", "JPG"]
)
def test_extensions(extension, root, picture):
    picture(root / f"train/cat/a.{extension}")
    images = folder.load(root, "train")
    assert images.keys[0] == f"cat/a.{extension}"
    assert images.read(0).shape == (8, 12, 3)


def test_formats_of_plugins_of_pillow(root, picture, monkeypatch):
    monkeypatch.setitem(Image.registered_extensions(), ".heic", "PNG")
    picture(root / "train/cat/a.png")
    (root / "train/cat/a.png").rename(root / "train/cat/a.HEIC")
    images = folder.load(root, "train")
    assert images.keys[0] == "cat/a.HEIC"
    assert images.read(0).shape == (8, 12, 3)


def test_linked_folders(root, tmp_path):
    shutil.move(root / "train", tmp_path / "elsewhere")
    (root / "train").mkdir()
    (root / "train/cat").symlink_to(tmp_path / "elsewhere/cat")
    (root / "train/dog").symlink_to(tmp_path / "elsewhere/dog")
    assert folder.load(root, "train").keys == ["cat/b.png", "cat/deep/a.jpg", "dog/1.jpg"]


def test_links_that_go_round(root, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    shutil.copy(root / "train/dog/1.jpg", tmp_path / "more")
    (tmp_path / "more/up").symlink_to(root)
    (root / "train/cat/more").symlink_to(tmp_path / "more")
    (root / "train/cat/deep/up").symlink_to(root / "train/cat")
    (root / "train/cat/other").symlink_to(root / "train/dog")
    (root / "train/dog/back").symlink_to(root / "train/cat/deep")
    (root / "train/dog/all").symlink_to("..")
    images = folder.load(root, "train")
    assert images.keys == ["cat/b.png", "cat/deep/a.jpg", "cat/more/1.jpg", "dog/1.jpg"]
    assert images.labels.tolist() == [0, 0, 0, 1]
    assert capsys.readouterr().err == (f"{root}/train: files are left out: 4 × link to a folder of other classes.\n")


def test_cross_links_are_followed_once(root):
    """Each folder has two links to the next, which makes 2^30 paths to the last."""
    for level in range(30):
        (root / f"train/cat/level{level}").mkdir()
        for link in "ab":
            (root / f"train/cat/level{level}/{link}").symlink_to(root / f"train/cat/level{level + 1}")
    assert folder.load(root, "train").keys == ["cat/b.png", "cat/deep/a.jpg", "dog/1.jpg"]


def test_folders_of_any_depth(root, monkeypatch):
    monkeypatch.chdir(root / "train/dog")
    for _ in range(1500):
        Path("d").mkdir()
        os.chdir("d")
    shutil.copy(root / "train/dog/1.jpg", "1.jpg")
    try:
        images = folder.load(root, "train")
        assert images.keys[2:] == ["dog/1.jpg", "dog/" + 1500 * "d/" + "1.jpg"]
        assert images.read(3).shape == (8, 12, 3)
    finally:  # pytest would remove it with a recursive function
        Path("1.jpg").unlink()
        for _ in range(1500):
            os.chdir("..")
            Path("d").rmdir()


def test_a_link_to_itself(root):
    (root / "train/dog/0.png").symlink_to("0.png")
    train = open_dataset("folder", root).train
    assert train.keys == ["cat/b.png", "cat/deep/a.jpg", "dog/0.png", "dog/1.jpg"]
    with pytest.raises(DatasetError) as refused:
        train.read(2)
    assert str(refused.value) == f"{root}/train/dog/0.png cannot be decoded: Too many levels of symbolic links."


def test_a_folder_and_a_file_without_permission(root):
    """As an ordinary user: for root, nothing is without permission."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as public:  # pytest's own folders are closed to other users
        Path(public).chmod(0o755)
        root = shutil.copytree(root, Path(public, "folder"))
        (root / "train/dog").chmod(0)
        (root / "test/dog/2.PNG").chmod(0)
        os.seteuid(user or 65534)
        try:
            with pytest.raises(DatasetError) as refused:
                open_dataset("folder", root)
            unreadable = folder.load(root, "test")
            with pytest.raises(DatasetError) as broken:
                unreadable.read(1)
        finally:
            os.seteuid(user)
    assert str(refused.value) == f"{root}/train/dog cannot be read: Permission denied."
    assert str(broken.value) == f"{root}/test/dog/2.PNG cannot be decoded: Permission denied."


def test_names_in_the_unicode_form_of_macos(tmp_path, picture):
    """The same folder on two systems: NFD names have the keys, classes and order of NFC ones."""
    names = {
        split: [f"{split}/caf\u00e9/{name}.png" for name in ("e", "\u00e9", "z", "\u00fc")]
        for split in ("train", "test")
    }
    for form in ("NFC", "NFD"):
        for name in (*names["train"], *names["test"]):
            picture(tmp_path / form / normalize(form, name))
    composed, decomposed = (open_dataset("folder", tmp_path / form) for form in ("NFC", "NFD"))
    assert decomposed.train.classes == composed.train.classes == ["caf\u00e9"]
    assert (
        decomposed.train.keys
        == composed.train.keys
        == [f"caf\u00e9/{name}.png" for name in ("e", "z", "\u00e9", "\u00fc")]
    )
    assert decomposed.test.read(2).shape == (8, 12, 3)
    picture(tmp_path / "NFC/train/caf\u00e9" / normalize("NFD", "\u00fc.png"))
    with pytest.raises(DatasetError) as refused:
        open_dataset("folder", tmp_path / "NFC")
    assert normalize("NFC", str(refused.value)) == (
        f"{tmp_path}/NFC/train has two files caf\u00e9/\u00fc.png, in different Unicode forms. Rename one."
    )
    picture(tmp_path / "NFC/train" / normalize("NFD", "caf\u00e9") / "a.png")
    with pytest.raises(DatasetError) as refused:
        open_dataset("folder", tmp_path / "NFC")
    assert str(refused.value) == (
        f"{tmp_path}/NFC/train has two class folders of one name, in different Unicode forms. Merge them."
    )


def test_photos_of_a_cache_are_sought_in_data_then_in_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("photos", "data/photos"):
        (tmp_path / path).mkdir(parents=True)
        assert default_folder("folder:photos") == Path(path)
    (tmp_path / "digits").mkdir()
    assert default_folder("digits") == Path("data/digits")


def test_a_home_folder_is_expanded(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(open_dataset(f"folder:~/{root.name}").train) == 3
    with pytest.raises(DatasetError) as refused:
        open_dataset("folder:~no-such-user/photos")
    assert str(refused.value) == (
        "~no-such-user/photos cannot be expanded: Could not determine home directory. Give the full path."
    )


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
        f"There is no {missing} split in {root}: looked for {looked.format(root)}. {LAYOUT} Name it with --data FOLDER"
        + {"train": ".", "test": ", or hold back a fifth of the images in train/ for testing: --split 0.2"}[missing]
    )


def test_a_folder_of_classes_is_split_only_where_that_is_asked_for(root, picture):
    for name in ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "c/1.png"):
        picture(root.parent / "photos" / name)
    with pytest.raises(DatasetError, match=r"hold back a fifth of the images in a/, b/, c/ for testing: --split 0\.2$"):
        open_dataset("folder", root.parent / "photos")
    split = HoldOut(fraction=0.2)
    dataset = open_dataset("folder", root.parent / "photos", split=split)
    assert sorted([*dataset.train.keys, *dataset.test.keys]) == [
        *("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "c/1.png")
    ]
    assert dataset.test.labels.tolist() == [0, 1]
    shutil.rmtree(root / "test")
    assert len(open_dataset("folder", root, split=split).test) == 1  # of the images in train/
    picture(root / "other" / "a.png")
    with pytest.raises(DatasetError, match="has other/ beside train/"):
        open_dataset("folder", root, split=split)
    with pytest.raises(DatasetError, match="nowhere has no class folders to split"):
        open_dataset("folder", root / "nowhere", split=split)
    with pytest.raises(DatasetError, match="digits has a test split of its own"):
        open_dataset("digits", split=split)


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
        for name in ("dog/1.heic", "cat/2.heic"):
            (root / split / name).touch()
    with pytest.raises(DatasetError) as problem:
        folder.load(root, "train")
    assert str(problem.value) == f"{root}/train/dog holds no images that Pillow decodes: 1 × .heic."
    assert capsys.readouterr().err == ""
    assert folder.load(root, "test").keys == ["cat/c.jpg"]
    folder.load(root, "test")
    remarks = [
        f"{root}/test/dog holds no images that Pillow decodes: 1 × .heic.",
        f"{root}/test: files are left out: 2 × .heic.",
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


def test_keys_do_not_depend_on_the_locale(root):
    """File names that the locale cannot decode have the keys and classes of a UTF-8 locale."""
    (root / "train" / "dog").rename(root / "train" / "dög")
    (root / "test" / "dog").rename(root / "test" / "dög")
    program = (
        "import sys; from pathlib import Path; from tspipe.data.datasets.folder import load\n"
        "images = load(Path(sys.argv[1]), 'test'); print(ascii([images.classes, images.keys, images.read(1).shape]))"
    )
    outputs = set()
    for variables in ({"PYTHONUTF8": "1"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}):
        environment = {**os.environ, **variables}
        command = [sys.executable, "-c", program, root]
        outputs.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    (output,) = outputs
    assert "d\\xf6g" in output
