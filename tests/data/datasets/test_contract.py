"""The contract of every dataset. A new file in data/datasets is tested without being named."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tspipe.data import datasets
from tspipe.data.datasets import Images, check_images, from_array, open_dataset
from tspipe.errors import DatasetError

NAMES = datasets.names()
SPLITS = ["train", "test"]


def test_there_are_datasets():
    assert {"cifar10", "cifar100", "cub200", "digits", "fashion_mnist", "folder"} <= set(NAMES)


def test_a_new_dataset_needs_a_tiny_archive(archive):
    with pytest.raises(pytest.fail.Exception) as problem:
        archive("mine")
    assert str(problem.value) == (
        "datasets/mine.py has no tiny archive to be tested on: add a maker of one to MAKERS in "
        "tests/datasets/conftest.py."
    )


@pytest.mark.parametrize("name", NAMES)
def test_module_says_where_it_comes_from(name):
    reference = datasets.parse(name)
    module = reference.module
    assert all(isinstance(getattr(module, constant), str) for constant in ["SOURCE", "LICENSE", "CITATION"])
    assert module.SOURCE and module.LICENSE
    assert (reference.name, reference.folder) == (name, None)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_images(name, split, archive):
    images = load(name, split, archive)
    n = len(images)
    assert n > 0
    assert images.labels.dtype == np.int64 and images.labels.shape == (n,)
    assert images.labels.min() >= 0 and images.labels.max() < len(images.classes)
    assert len(images.keys) == len(set(images.keys)) == n
    assert all(type(text) is str and text.encode() for text in [*images.keys, *images.classes])
    assert len(set(images.classes)) == len(images.classes)
    for i in range(n):
        pixels = images.read(i)
        assert isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
        assert pixels.ndim == 3 and pixels.shape[2] in (1, 3)
        if images.array is not None:
            np.testing.assert_array_equal(images.array[i], pixels)
    if images.array is not None:
        assert images.array.dtype == np.uint8 and len(images.array) == n
        assert images.array.flags.writeable, "torch warns of arrays that are read-only"


@pytest.mark.parametrize("name", NAMES)
def test_loads_the_same_again(name, archive):
    module, root = datasets.parse(name).module, archive(name)
    first, second = module.load(root, "train"), module.load(root, "train")
    assert list(first.keys) == list(second.keys)
    np.testing.assert_array_equal(first.labels, second.labels)
    for i in range(len(first)):
        np.testing.assert_array_equal(first.read(i), second.read(i))


@pytest.mark.parametrize("name", NAMES)
def test_reads_from_threads(name, archive):
    images = load(name, "train", archive)
    order = [i % len(images) for i in range(100)]
    expected = [images.read(i) for i in order]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(pool.map(images.read, order), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_opens_with_both_splits(name, archive):
    root = archive(name)
    dataset = open_dataset(name, root)
    assert dataset.name == datasets.parse(name, root).name
    assert list(dataset.train.classes) == list(dataset.test.classes)
    assert dataset.split("train") is dataset.train and dataset.split("test") is dataset.test


def load(name: str, split: str, archive) -> Images:
    images: Images = datasets.parse(name).module.load(archive(name), split)
    return images


SOUND = Images(np.array([0, 1]), ["a", "b"], ["cat", "dog"], lambda _: np.zeros((4, 5, 3), np.uint8))


def test_a_sound_split_is_unchanged():
    checked = check_images(SOUND, "mine, split train")
    assert (checked.labels is SOUND.labels, checked.keys, checked.classes) == (True, SOUND.keys, SOUND.classes)
    np.testing.assert_array_equal(checked.read(1), SOUND.read(1))


INT64 = "Return an int64 array of shape (N,), N > 0, of indices into the classes."
STR = "Return a sequence of str."
ARRAY = "Return a uint8 array of shape (2, H, W, C), or None."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0.0, 1.0])}, f"labels are float64 of shape (2,). {INT64}"),
        ({"labels": np.array([0, 1], np.int32)}, f"labels are int32 of shape (2,). {INT64}"),
        ({"labels": [0, 1]}, f"labels are list. {INT64}"),
        ({"labels": torch.tensor([0, 1])}, f"labels are Tensor. {INT64}"),
        ({"labels": np.eye(2, dtype=np.int64)}, f"labels are int64 of shape (2, 2). {INT64}"),  # one-hot rows
        ({"labels": np.array([1, 2])}, "label 2 of image 1 is no index into 2 classes. Return labels from 0 to 1."),
        ({"labels": np.array([-1, 0])}, "label -1 of image 0 is no index into 2 classes. Return labels from 0 to 1."),
        ({"keys": ["a"]}, "1 keys for 2 labels. Return one key per image."),
        ({"keys": ["a", 7]}, f"keys[1] is 7. {STR}"),
        ({"keys": ["a", "a"]}, "'a' occurs 2 times in keys. Return each once."),
        ({"keys": ["\u00e9", "e\u0301"]}, "'é' occurs 2 times in keys. Return each once."),
        ({"keys": ["a", "b\0"]}, "keys[1] is 'b\\x00'. Return names that are UTF-8, without NUL."),
        ({"keys": ["\udcff", "b"]}, "keys[0] is '\\udcff'. Return names that are UTF-8, without NUL."),
        ({"keys": None}, f"keys is NoneType. {STR}"),
        ({"keys": "ab"}, f"keys is str. {STR}"),
        ({"classes": []}, "there are no classes. Return at least one."),
        ({"classes": ["cat", "cat"]}, "'cat' occurs 2 times in classes. Return each once."),
        ({"classes": ["cat", None]}, f"classes[1] is None. {STR}"),
        ({"array": np.zeros((2, 4, 5, 3), np.float32)}, f"array is float32 of shape (2, 4, 5, 3). {ARRAY}"),
        ({"array": np.zeros((2, 4, 5), np.uint8)}, f"array is uint8 of shape (2, 4, 5). {ARRAY}"),
        ({"array": np.zeros((3, 4, 5, 3), np.uint8)}, f"array is uint8 of shape (3, 4, 5, 3). {ARRAY}"),
        ({"array": [np.zeros((4, 5, 3), np.uint8)] * 2}, f"array is list. {ARRAY}"),
    ],
)
def test_a_split_that_breaks_the_contract(changes, message):
    with pytest.raises(DatasetError) as refused:
        check_images(replace(SOUND, **changes), "mine, split test")
    assert str(refused.value) == f"mine, split test: {message}"


@pytest.mark.parametrize(
    ("image", "description"),
    [
        (np.zeros((4, 5), np.uint8), "uint8 of shape (4, 5)"),
        (np.zeros((4, 5, 3), np.float32), "float32 of shape (4, 5, 3)"),
        (np.zeros((3, 4, 5), np.uint8), "uint8 of shape (3, 4, 5)"),
        (np.zeros((0, 5, 3), np.uint8), "uint8 of shape (0, 5, 3)"),
        (Image.new("RGB", (5, 4)), "Image"),
        (torch.zeros((4, 5, 3), dtype=torch.uint8), "Tensor"),
        ([[0, 0]], "list"),
        (b"JFIF", "bytes"),
    ],
)
def test_an_image_that_breaks_the_contract(image, description):
    with pytest.raises(DatasetError) as refused:
        check_images(replace(SOUND, read=lambda _: image), "mine, split train").read(1)
    assert str(refused.value) == (
        f"mine, split train: read(1) returns {description}. Return a uint8 array of shape (H, W, C), with values from "
        "0 to 255 and C 1 or 3."
    )


def test_an_array_has_the_images_that_are_read():
    array = np.zeros((2, 4, 5, 3), np.uint8)
    array[1, 0, 0, 0] = 9
    with pytest.raises(DatasetError) as refused:
        check_images(replace(SOUND, array=array), "mine, split train")
    assert str(refused.value) == (
        "mine, split train: array[1] and read(1) differ. Return the same pixels, or None as array."
    )
    count = 1000
    many = Images(np.zeros(count, np.int64), [*map(str, range(count))], ["cat"], SOUND.read)
    array = np.zeros((count, 4, 5, 3), np.uint8)
    array[7] = 9  # not compared, and the same for every reader
    assert check_images(replace(many, array=array), "mine, split train").read(7)[0, 0, 0] == 9


def test_a_header_that_cannot_be_checked():
    with pytest.raises(DatasetError) as refused:
        check_images(replace(SOUND, check_header=5), "mine, split train")
    assert str(refused.value) == "mine, split train: check_header is int. Return a function, or None."
    images = check_images(replace(SOUND, check_header=lambda i: {}[i]), "mine, split train")
    with pytest.raises(DatasetError) as refused:
        images.check_header(1)
    assert str(refused.value) == "mine, split train: check_header(1), 'b', fails: KeyError: 1."


def test_a_plug_in_that_ends_the_process_is_an_error(tmp_path):
    with pytest.raises(DatasetError) as refused:
        check_images(replace(SOUND, read=lambda _: sys.exit(0)), "mine, split train").read(1)
    assert str(refused.value) == "mine, split train: read(1), 'b', fails: SystemExit: 0."
    for number, body in enumerate(("raise SystemExit(0)", "def load(root, split):\n    raise SystemExit(0)")):
        file = tmp_path / f"mine{number}.py"
        file.write_text(body)
        with pytest.raises(DatasetError, match=r"fails.*: SystemExit: 0"):
            open_dataset(str(file))


def test_an_image_that_cannot_be_read_is_named():
    with pytest.raises(DatasetError) as refused:
        check_images(replace(SOUND, read=lambda i: [][i]), "mine, split train").read(1)
    assert str(refused.value) == "mine, split train: read(1), 'b', fails: IndexError: list index out of range."


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{}['x']", "mine, split train: load fails: KeyError: 'x'."),
        ("(root / 'a').read_text()", "data/mine/a cannot be read: No such file or directory."),
    ],
)
def test_a_dataset_file_that_fails(body, message, tmp_path):
    (tmp_path / "mine.py").write_text(f"def load(root, split):\n    return {body}\n")
    with pytest.raises(DatasetError) as refused:
        open_dataset(str(tmp_path / "mine.py"))
    assert str(refused.value) == message


def test_labels_of_an_array_are_not_truncated():
    array = np.zeros((2, 4, 5, 3), np.uint8)
    assert from_array(array, np.array([0, 1], np.uint8), ["cat", "dog"]).labels.dtype == np.int64
    with pytest.raises(DatasetError) as refused:
        check_images(from_array(array, np.array([0.2, 0.9]), ["cat", "dog"]), "mine, split train")
    assert str(refused.value) == f"mine, split train: labels are float64 of shape (2,). {INT64}"


def test_keys_and_classes_are_in_one_unicode_form():
    decomposed = replace(SOUND, keys=["e\u0301", "b"], classes=["cafe\u0301", "dog"])
    images = check_images(decomposed, "mine, split train")
    assert (images.keys, images.classes) == (["\u00e9", "b"], ["caf\u00e9", "dog"])


def test_a_dataset_file_is_checked_when_it_is_opened(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def load(root, split):\n    return [split]\n")
    with pytest.raises(DatasetError) as refused:
        open_dataset(str(file))
    assert str(refused.value) == "mine, split train: load returns list. Return tspipe.data.datasets.Images."
