"""A cache of other data is refused, and the first image that differs is named."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tspipe.cache.layout import digest
from tspipe.cache.match import match_classes, match_split
from tspipe.errors import CacheMismatch

REMEDY = "Give the data that the cache was made from (--data), or make the cache again (tspipe cache --force)."


class Rows:
    """Rows in memory, read as those of a file are."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    def load(self) -> np.ndarray:
        return self.rows

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.rows[rows]


@dataclass(frozen=True)
class Stored:
    labels: np.ndarray
    keys: Rows
    digests: Rows


@dataclass(frozen=True)
class Local:
    images: list[np.ndarray]
    labels: np.ndarray
    keys: list[str]

    def read(self, i: int) -> np.ndarray:
        return self.images[i]


@pytest.fixture
def local() -> Local:
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (4, 5, 3), dtype=np.uint8) for _ in range(6)]
    return Local(images, np.array([0, 1, 2, 0, 1, 2]), [f"img{i}.png" for i in range(6)])


@pytest.fixture
def stored(local: Local) -> Stored:
    digests = np.frombuffer(b"".join(digest(image) for image in local.images), np.uint8).reshape(6, 8)
    return Stored(local.labels.copy(), Rows(np.array([key.encode() for key in local.keys])), Rows(digests))


def refused(stored: Stored, local: Local, **options: object) -> str:
    with pytest.raises(CacheMismatch) as problem:
        match_split("x.h5", "train", stored, local, **options)
    return str(problem.value)


def test_the_same_data_matches(stored: Stored, local: Local) -> None:
    for sample in (None, 0, 3, 100):
        match_split("x.h5", "train", stored, local, sample=sample)


def test_shuffled(stored: Stored, local: Local) -> None:
    order = [0, 1, 3, 2, 4, 5]
    other = Local([local.images[i] for i in order], local.labels[order], [local.keys[i] for i in order])
    assert refused(stored, other) == (
        f"x.h5 is not of these data: at train index 2, the cache has 'img2.png', the dataset 'img3.png'. {REMEDY}"
    )


def test_an_image_less(stored: Stored, local: Local) -> None:
    other = Local(local.images[:3] + local.images[4:], np.delete(local.labels, 3), local.keys[:3] + local.keys[4:])
    assert refused(stored, other) == (
        "x.h5 is not of these data (6 images cached, 5 in the dataset): at train index 3, the cache has 'img3.png', "
        f"the dataset 'img4.png'. {REMEDY}"
    )


def test_an_image_more(stored: Stored, local: Local) -> None:
    other = Local([*local.images, local.images[0]], np.append(local.labels, 0), [*local.keys, "new.png"])
    assert refused(stored, other) == (
        "x.h5 is not of these data (6 images cached, 7 in the dataset): at train index 6, the cache has nothing, the "
        f"dataset 'new.png'. {REMEDY}"
    )


def test_another_label(stored: Stored, local: Local) -> None:
    other = replace(local, labels=np.array([0, 1, 2, 0, 2, 2]))
    assert refused(stored, other) == (
        "x.h5 is not of these data: at train index 4, 'img4.png' has label 1 in the cache and 2 in the dataset. "
        f"{REMEDY}"
    )


def test_one_changed_pixel(stored: Stored, local: Local) -> None:
    changed = local.images[5].copy()
    changed[3, 4, 2] ^= 1
    expected, actual = digest(local.images[5]).hex(), digest(changed).hex()
    message = refused(stored, replace(local, images=[*local.images[:5], changed]))
    assert message == (
        "x.h5 is not of these data: at train index 5, the pixels of 'img5.png' differ: digest "
        f"{expected} in the cache, {actual} in the dataset. {REMEDY}"
    )


def test_the_same_pixels_in_another_shape_are_another_image(local: Local) -> None:
    assert digest(local.images[0]) != digest(local.images[0].reshape(5, 4, 3))


def test_only_the_rows_asked_for(stored: Stored, local: Local) -> None:
    """Of a file that is not finished, only what is written counts."""
    other = replace(local, labels=np.array([0, 1, 2, 0, 2, 2]))
    match_split("x.h5", "train", stored, other, rows=np.array([0, 1, 2]))
    assert "at train index 4, " in refused(stored, other, rows=np.array([3, 4]))


def test_classes() -> None:
    match_classes("x.h5", ["cat", "dog"], ["cat", "dog"])
    with pytest.raises(CacheMismatch) as problem:
        match_classes("x.h5", ["cat", "dog"], ["cat", "cow"])
    assert str(problem.value) == f"x.h5: class 1 is 'dog' in the cache, 'cow' in the dataset. {REMEDY}"
    with pytest.raises(CacheMismatch) as problem:
        match_classes("x.h5", ["cat", "dog"], ["cat"])
    assert str(problem.value) == f"x.h5 has 2 classes, the dataset 1. {REMEDY}"


def test_names_in_another_unicode_form_are_the_same(stored: Stored, local: Local) -> None:
    """A cache that was made on a system whose file names are decomposed."""
    composed = replace(local, keys=[f"\u00e9{i}" for i in range(6)])
    decomposed = replace(stored, keys=Rows(np.array([f"e\u0301{i}".encode() for i in range(6)])))
    match_split("x.h5", "train", decomposed, composed)
    match_classes("x.h5", ["cafe\u0301"], ["caf\u00e9"])
