"""What every dataset keeps to. A new file in tspipe/datasets is tested here without being named."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tspipe.data import datasets
from tspipe.data.datasets import Images, open_dataset

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
    module, stated, root = datasets.parse(name)
    assert all(isinstance(getattr(module, constant), str) for constant in ["SOURCE", "LICENSE", "CITATION"])
    assert module.SOURCE and module.LICENSE
    assert (stated, root) == (name, None)


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
    module, root = datasets.parse(name)[0], archive(name)
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
    assert dataset.name == datasets.parse(name, root)[1]
    assert list(dataset.train.classes) == list(dataset.test.classes)
    assert dataset.split("train") is dataset.train and dataset.split("test") is dataset.test


def load(name: str, split: str, archive) -> Images:
    images: Images = datasets.parse(name)[0].load(archive(name), split)
    return images
