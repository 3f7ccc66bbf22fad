import numpy as np
import pytest

from tspipe.data.datasets import cub200, open_dataset
from tspipe.errors import DatasetError


@pytest.fixture
def root(archive):
    return archive("cub200")


def test_split_and_labels(root):
    train, test = cub200.load(root, "train"), cub200.load(root, "test")
    assert train.keys == [
        "001.Bird_1/Bird_1_0000.jpg",
        "001.Bird_1/Bird_1_0002.jpg",
        "002.Bird_2/Bird_2_0000.jpg",
        "002.Bird_2/Bird_2_0002.jpg",
    ]
    assert test.keys == ["001.Bird_1/Bird_1_0001.jpg", "002.Bird_2/Bird_2_0001.jpg"]
    assert train.labels.tolist() == [0, 0, 1, 1]  # classes 1 and 2
    assert test.labels.tolist() == [0, 1]
    assert train.classes == ["001.Bird_1", "002.Bird_2"]
    assert train.array is None


def test_root_may_be_the_folder_itself(root):
    assert cub200.load(root / "CUB_200_2011", "test").keys == cub200.load(root, "test").keys


def test_order_is_that_of_images_txt(root):
    for name in ["images.txt", "image_class_labels.txt"]:
        path = root / "CUB_200_2011" / name
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert cub200.load(root, "test").keys == ["002.Bird_2/Bird_2_0001.jpg", "001.Bird_1/Bird_1_0001.jpg"]
    assert cub200.load(root, "test").labels.tolist() == [1, 0]


def test_grey_image_becomes_rgb(root):
    image = cub200.load(root, "train").read(0)
    assert image.shape == (8, 12, 3)
    np.testing.assert_array_equal(image[:, :, 0], image[:, :, 1])
    np.testing.assert_array_equal(image[:, :, 0], image[:, :, 2])


def test_exif_rotation(root, picture):
    path = root / "CUB_200_2011/images/001.Bird_1/Bird_1_0001.jpg"
    picture(path, orientation=6)  # 12 wide, 8 high, to be shown turned by a right angle
    image = cub200.load(root, "test").read(0)
    assert image.shape == (12, 8, 3)
    assert image[0].mean() < 30 and image[-1].mean() > 225  # what was left is on top


def test_truncated_jpeg_is_named(root):
    path = root / "CUB_200_2011/images/002.Bird_2/Bird_2_0001.jpg"
    path.write_bytes(path.read_bytes()[:-20])
    images = cub200.load(root, "test")
    images.read(0)
    with pytest.raises(DatasetError) as problem:
        images.read(1)
    start = f"{path} cannot be decoded: image file is truncated ("
    assert str(problem.value).startswith(start)
    assert images.keys[1] in str(problem.value)


def test_missing_image(root):
    path = root / "CUB_200_2011/images/002.Bird_2/Bird_2_0001.jpg"
    path.unlink()
    with pytest.raises(DatasetError) as problem:
        cub200.load(root, "test").read(1)
    assert str(problem.value) == f"{path} does not exist."


GET = (
    "Give its folder (--data FOLDER). It is CUB_200_2011.tgz (MD5 97eceeb196236b17998738112f37df78) from "
    "https://data.caltech.edu/records/65de6-vp158"
)


def test_nothing_there(tmp_path):
    with pytest.raises(DatasetError) as problem:
        cub200.load(tmp_path, "train")
    assert str(problem.value) == (
        f"There is no CUB-200-2011 in {tmp_path}: looked for CUB_200_2011/images.txt, images.txt. {GET}"
    )


def test_only_the_archive_there(tmp_path):
    archive = tmp_path / "CUB_200_2011.tgz"
    archive.touch()
    with pytest.raises(DatasetError) as problem:
        cub200.load(tmp_path, "train")
    assert str(problem.value) == f"{archive} is not unpacked. Unpack it: tar -xzf {archive} -C {tmp_path}"


def test_no_download(root, tmp_path):
    """There is nothing to fetch it with; what is there is taken, and what is not is named with its source."""
    assert len(open_dataset("cub200", root, download=True).train) == 4
    with pytest.raises(DatasetError) as problem:
        open_dataset("cub200", tmp_path / "none", download=True)
    assert str(problem.value).endswith(GET)


IMAGES = "".join(f"{i} {i}.jpg\n" for i in range(1, 7))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("images.txt", "1 a.jpg\n2\n", "{path}, line 2: '2' is not an id and a value."),
        ("images.txt", "1 a.jpg\n\n2 b.jpg\n", "{path}, line 2: '' is not an id and a value."),
        ("images.txt", "1 a.jpg\n1 b.jpg\n", "{path}, line 2: the id 1 is on line 1 too."),
        ("images.txt", "1 a.jpg\n2 a.jpg\n", "{path}, line 2: 'a.jpg' is on line 1 too."),
        ("images.txt", "1 ../../a.jpg\n", "{path}, line 1: '../../a.jpg' leads out of the images folder."),
        ("images.txt", "1 /etc/a.jpg\n", "{path}, line 1: '/etc/a.jpg' leads out of the images folder."),
        ("images.txt", "", "{path} is empty."),
        ("images.txt", b"1 \xff.jpg\n", "{path} is not text in UTF-8: invalid start byte at byte 2."),
        (
            "images.txt",
            IMAGES + "7 g.jpg\n",
            "{folder}/image_class_labels.txt has no line for image 7 (images.txt, line 7).",
        ),
        (
            "images.txt",
            IMAGES.replace("6 6.jpg\n", ""),
            "{folder}/image_class_labels.txt, line 6: images.txt has no image 6.",
        ),
        ("classes.txt", "1 a\n3 b\n", "{path}, line 2: the class is 3, not 2; they count from 1."),
        ("classes.txt", "0 a\n1 b\n", "{path}, line 1: the class is 0, not 1; they count from 1."),
        ("classes.txt", "1 a\n", "{folder}/image_class_labels.txt, line 4: '2' is not one of 1 to 1."),
        ("image_class_labels.txt", "1 0\n", "{path}, line 1: '0' is not one of 1 to 2."),
        ("image_class_labels.txt", "1 1\n2 3\n", "{path}, line 2: '3' is not one of 1 to 2."),
        ("image_class_labels.txt", "1 1\n9 1\n", "{path}, line 2: images.txt has no image 9."),
        ("image_class_labels.txt", "1 1\n2 1\n", "{path} has no line for image 3 (images.txt, line 3)."),
        ("train_test_split.txt", "1 1\n2 0\n3 2\n", "{path}, line 3: '2' is not one of 0 to 1."),
        ("train_test_split.txt", "1 1\n2 0\n", "{path} has no line for image 3 (images.txt, line 3)."),
        (
            "train_test_split.txt",
            "".join(f"{i} 0\n" for i in range(1, 7)),
            "{path} has no image in the train split.",
        ),
    ],
)
def test_text_files_must_agree(name, content, message, root):
    folder = root / "CUB_200_2011"
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError) as problem:
        cub200.load(root, "train")
    message = message.replace("{path}", str(path)).replace("{folder}", str(folder))
    assert str(problem.value) == message


@pytest.mark.parametrize("name", ["classes.txt", "image_class_labels.txt", "train_test_split.txt"])
def test_missing_text_file(name, root):
    path = root / "CUB_200_2011" / name
    path.unlink()
    with pytest.raises(DatasetError) as problem:
        cub200.load(root, "train")
    assert str(problem.value) == f"{path} cannot be read: No such file or directory."
