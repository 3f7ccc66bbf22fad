"""Every kind of random images follows from its numbers alone, and can be balanced by the teacher's labels."""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tspipe.data.random_images import KINDS, Kind, Photos, make
from tspipe.data.random_images.balanced import choose, select
from tspipe.data.random_images.pool import PoolImages
from tspipe.errors import CacheDamaged
from tspipe.utils.rng import stream

SHAPE = (3, 8, 6)
LABELS = np.arange(20) % 7
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 6, 3), dtype=np.uint8)


def photos(shift: int = 2, flip: bool = True) -> Photos:
    return Photos(len(PIXELS), lambda rows: torch.from_numpy(PIXELS[rows]).permute(0, 3, 1, 2), shift, flip, LABELS, 7)


def kind_of(name: str) -> Kind:
    return make(name, SHAPE, photos())


def words(seed: int, count: int, draws: int) -> np.ndarray:
    entropy = np.random.SeedSequence([seed, zlib.crc32(b"random images"), 0, 0])
    return np.random.MT19937(entropy).random_raw(count * draws).astype(np.int64).reshape(count, draws)


def drawn(kind: Kind, seed: int, count: int) -> np.ndarray:
    return kind.images(kind.numbers(stream(seed, "random images"), count))


def view(index: int, dy: int, dx: int, flip: int, shift: int = 2) -> np.ndarray:
    """Return a training image as cache/README.md shifts and mirrors it, pixel by pixel, channels first."""
    out, source = np.zeros(SHAPE, np.int64), PIXELS[index % len(PIXELS)]
    down, right = dy % (2 * shift + 1) - shift, dx % (2 * shift + 1) - shift
    for y in range(SHAPE[1]):
        for x in range(SHAPE[2]):
            row, column = y - down, (SHAPE[2] - 1 - x if flip % 2 else x) - right
            if 0 <= row < SHAPE[1] and 0 <= column < SHAPE[2]:
                out[:, y, x] = source[row, column]
    return out


@pytest.mark.parametrize("name", KINDS)
def test_an_image_depends_on_its_own_numbers_alone(name: str) -> None:
    kind = kind_of(name)
    numbers = kind.numbers(stream(3, "random images"), 30)
    images = kind.images(numbers)
    assert images.shape == (30, *SHAPE)
    assert images.dtype == (np.float32 if name == "uniform" else np.uint8)
    assert len(np.unique(images.reshape(30, -1), axis=0)) == 30
    for part in (slice(4, 5), slice(10, 30), slice(0, 0)):
        np.testing.assert_array_equal(kind.images(numbers[part]), images[part])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("block_rows", [4, 16])
def test_a_pool_draws_each_kind_from_any_row(name: str, block_rows: int) -> None:
    random = {"generator": "mt19937", "rows": 10, "seed": 0}
    every = PoolImages(kind_of(name), random, block_rows).take(0, 10)
    pool = PoolImages(kind_of(name), random, block_rows)
    for start, count in ((3, 4), (8, 5), (0, 1)):
        np.testing.assert_array_equal(pool.take(start, count), every[(start + np.arange(count)) % 10])


def test_mixed_is_what_its_words_say() -> None:
    for w, image in zip(words(5, 12, 9), drawn(kind_of("mixed"), 5, 12), strict=True):
        share = (w[8] >> 24) / 256
        expected = np.floor(share * view(*w[:4]) + (1 - share) * view(*w[4:8]) + 0.5)
        np.testing.assert_array_equal(image, expected)


def mixed_label(w: np.ndarray, share: float) -> np.ndarray:
    one_hot = np.eye(7)
    return share * one_hot[LABELS[w[0] % 20]] + (1 - share) * one_hot[LABELS[w[4] % 20]]


@pytest.mark.parametrize("name", ["mixed", "cutmix"])
def test_labels_are_mixed_as_the_pixels_are(name: str) -> None:
    """CutMix counts the pixels of each image, because a part of the rectangle may lie outside."""
    kind, pasted = make(name, SHAPE, photos(shift=0, flip=False)), Photos(20, _index_images, 0, False, LABELS, 7)
    numbers = words(5, 40, kind.draws)
    shares = (numbers[:, 8] >> 24) / 256
    if name == "cutmix":
        images = make(name, SHAPE, pasted).images(numbers)
        shares = (images[:, 0] == (numbers[:, 0] % 20)[:, None, None]).mean((1, 2))
    for w, share, label in zip(numbers, shares, kind.labels(numbers), strict=True):
        np.testing.assert_allclose(label, mixed_label(w, share), atol=1e-6)
    assert make("structured", SHAPE).labels(numbers).shape == (40, 0)


def _index_images(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.uint8)[:, None, None, None].expand(-1, *SHAPE)


def test_cutmix_is_what_its_words_say() -> None:
    for w, image in zip(words(5, 12, 11), drawn(kind_of("cutmix"), 5, 12), strict=True):
        a, b = view(*w[:4]), view(*w[4:8])
        side = np.sqrt(1 - (w[8] >> 24) / 256)
        height, width = int(8 * side), int(6 * side)
        top, left = w[9] % 8 - height // 2, w[10] % 6 - width // 2
        for y in range(8):
            for x in range(6):
                inside = top <= y < top + height and left <= x < left + width
                np.testing.assert_array_equal(image[:, y, x], (b if inside else a)[:, y, x])


def test_unshifted_mixtures_of_one_image_are_that_image() -> None:
    single = Photos(1, lambda rows: torch.from_numpy(PIXELS[rows]).permute(0, 3, 1, 2))
    for name in ("mixed", "cutmix"):
        assert (drawn(make(name, SHAPE, single), 0, 5) == PIXELS[0].transpose(2, 0, 1)).all()


def test_structured_images_differ_in_colour_contrast_and_scale() -> None:
    images = drawn(make("structured", (3, 32, 32)), 0, 300).astype(np.float64)
    means, contrasts = images.mean((2, 3)), images.std((2, 3)).mean(1)
    assert means.std(0).min() > 20
    assert contrasts.max() > 4 * contrasts.min()
    # Neighbouring pixels are alike, as in photographs; in uniform noise they are independent.
    flat = images - images.mean((2, 3), keepdims=True)
    correlation = (flat[..., 1:] * flat[..., :-1]).mean((1, 2, 3)) / (flat**2).mean((1, 2, 3))
    assert 0.4 < np.median(correlation) < 0.99


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_the_largest_class_is_as_small_as_it_can_be(labels: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels)))
    chosen = select(np.array(labels), count)
    assert (np.diff(chosen) > 0).all()
    assert len(chosen) == count
    counts, available = (np.bincount(part, minlength=6) for part in (np.array(labels)[chosen], np.array(labels)))
    smaller = np.minimum(available, counts.max() - 1)
    assert smaller.sum() < count  # with one fewer of each class, there would be too few
    first = [np.flatnonzero(np.array(labels) == label)[: counts[label]] for label in range(6)]
    assert set(np.concatenate(first)) == set(chosen.tolist())


def test_candidates_are_drawn_until_they_can_be_balanced() -> None:
    rounds = [[0, 0, 0, 0], [0, 1, 0, 0], [1, 2, 2, 0], [1, 1, 1, 1]]
    chosen, labels = choose(lambda number: np.array(rounds[number]), 4, 3, 8)
    assert len(labels) == 12  # the fourth round is not needed
    assert np.bincount(labels[chosen]).tolist() == [1, 2, 1] or np.bincount(labels[chosen]).max() == 2
    chosen, labels = choose(lambda number: np.zeros(4, np.int64), 4, 3, 5)
    assert (len(labels), chosen.tolist()) == (20, [0, 1, 2, 3])


def test_a_balanced_pool_draws_its_candidates() -> None:
    random = {"generator": "mt19937", "rows": 7, "seed": 0, "rounds": 2}
    candidates = np.array([1, 2, 5, 7, 0, 3, 5])  # of blocks of 4 and 3
    pool = PoolImages(kind_of("mixed"), random, 4, candidates)
    blocks = [np.stack([pool.draw(block, np.array([i]))[0] for i in range(8)]) for block in range(2)]
    expected = np.concatenate([blocks[0][candidates[:4]], blocks[1][candidates[4:]]])
    np.testing.assert_array_equal(pool.take(2, 7), expected[(2 + np.arange(7)) % 7])
    for wrong in ([1, 1, 5, 7, 0, 3, 5], [1, 2, 5, 8, 0, 3, 5], [-1, 2, 5, 7, 0, 3, 5], [1, 2, 5, 7, 0, 3, 6]):
        with pytest.raises(CacheDamaged, match="random_candidates"):
            PoolImages(kind_of("mixed"), random, 4, np.array(wrong))
