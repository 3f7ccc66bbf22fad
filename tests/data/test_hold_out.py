import hashlib

import numpy as np
import pytest

from tspipe.data.datasets import Images
from tspipe.data.hold_out import HoldOut, split_images
from tspipe.errors import DatasetError

CLASSES = ["a", "b", "c"]


def images(*keys: str) -> Images:
    """Images whose class is the first letter of their key."""
    labels = np.array([CLASSES.index(key[0]) for key in keys], np.int64)
    return Images(labels, keys, CLASSES, lambda i: np.full((1, 1, 1), i, np.uint8))


ALL = images(*(f"a/{i}" for i in range(10)), *(f"b/{i}" for i in range(4)), "c/0")


@pytest.mark.parametrize("fraction, counts", [(0.01, [1, 1]), (0.25, [3, 1]), (0.5, [5, 2]), (0.99, [9, 3])])
def test_every_class_is_split(fraction: float, counts: list[int]) -> None:
    train, test = split_images(ALL, HoldOut(fraction=fraction), "photos")
    assert np.bincount(test.labels, minlength=3).tolist() == [*counts, 0]
    assert sorted([*train.keys, *test.keys]) == sorted(ALL.keys)
    for part in (train, test):
        assert list(part.keys) == sorted(part.keys)
        assert [ALL.keys[int(part.read(i)[0, 0, 0])] for i in range(len(part))] == list(part.keys)


def test_the_split_is_the_one_that_is_specified() -> None:
    _, test = split_images(ALL, HoldOut(fraction=0.3, seed=7), "photos")
    by_digest = sorted((f"a/{i}" for i in range(10)), key=lambda key: hashlib.sha256(f"7/{key}".encode()).hexdigest())
    assert sorted(by_digest[:3]) == [key for key in test.keys if key[0] == "a"]
    assert test.keys != split_images(ALL, HoldOut(fraction=0.3), "photos")[1].keys


def test_an_added_image_moves_at_most_one_other() -> None:
    for new in range(10, 30):
        before, after = (
            set(split_images(part, HoldOut(fraction=0.3), "photos")[1].keys)
            for part in (ALL, images(*ALL.keys, f"a/{new}"))
        )
        assert len((before ^ after) - {f"a/{new}"}) <= 1


def test_a_class_with_one_image_is_remarked_on(capsys: pytest.CaptureFixture[str]) -> None:
    split_images(ALL, HoldOut(fraction=0.2), "single")
    assert capsys.readouterr().err == "single: the test split lacks classes that have a single image: c.\n"
    with pytest.raises(DatasetError, match="photos cannot be split: no class has two images"):
        split_images(images("a/0", "b/0"), HoldOut(fraction=0.2), "photos")
