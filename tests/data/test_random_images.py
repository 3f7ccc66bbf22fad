"""Random images and every other draw follow from (seed, purpose, epoch, batch) alone."""

import zlib

import numpy as np
import torch

from tspipe.data.random_images import make
from tspipe.data.random_images.minstd import minstd, minstd_start, numbers, period_warning
from tspipe.data.random_images.pool import PoolImages
from tspipe.utils.rng import seed_torch, seed_torch_with, stream, torch_seeds


def uniform(seed: int, epoch: int, batch: int, count: int, shape: tuple[int, int, int]) -> np.ndarray:
    kind = make("uniform", shape)
    return kind.images(kind.numbers(stream(seed, "random images", epoch, batch), count))


def test_the_same_batch_is_the_same_and_no_other_is() -> None:
    shape = (3, 4, 4)
    first = uniform(0, 1, 2, 5, shape)
    assert (first == uniform(0, 1, 2, 5, shape)).all()
    for other in [(1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)]:
        assert (first != uniform(*other, 5, shape)).any()


def test_they_are_uniform_and_independent() -> None:
    images = uniform(0, 0, 0, 2000, (3, 4, 4))
    assert images.dtype == np.float32
    assert 0 <= images.min() < 1e-3
    assert 1 - 1e-3 < images.max() < 1
    flat = images.reshape(2000, 48).astype(np.float64)
    # Standard errors: 1/√(12·2000) = 0.0065 of a pixel's mean, about 1/√2000 = 0.022 of a correlation.
    assert np.abs(flat.mean(0) - 0.5).max() < 5 * 0.0065
    correlation = np.corrcoef(flat.T) - np.eye(48)
    assert np.abs(correlation).max() < 5.5 * 0.022


def test_a_pixel_is_the_top_24_bits_of_a_mersenne_twister_word() -> None:
    """The draw is defined by MT19937's words, which numpy keeps for ever, not by a method that may change."""
    words = stream(7, "random images", 3, 11).bit_generator.random_raw(2 * 4)
    expected = (words.astype(np.uint32) >> 8).astype(np.float32) / np.float32(2**24)
    np.testing.assert_array_equal(uniform(7, 3, 11, 2, (1, 2, 2)).flatten(), expected)


def test_purposes_do_not_share_a_stream() -> None:
    draws = {stream(0, purpose).random() for purpose in ("order", "weights", "dropout", "random images", "views")}
    assert len(draws) == 5


def test_torch_is_seeded_from_the_stream() -> None:
    seed_torch(3, "weights")
    first = torch.rand(4)
    torch.rand(9)
    seed_torch(3, "weights")
    assert first.equal(torch.rand(4))


def test_minstd_is_park_and_millers() -> None:
    """Communications of the ACM 31, 1988, p. 1195: from 1, the 10,000th number after it is 1,043,618,065."""
    assert minstd(1, 10_000, 1).tolist() == [1_043_618_065]
    assert minstd(1, 0, 3).tolist() == [1, 16807, 282475249]
    plain, x = [], 123
    for _ in range(1000):
        plain.append(x)
        x = 16807 * x % (2**31 - 1)
    assert minstd(123, 0, 1000).tolist() == plain
    assert minstd(123, 990, 10).tolist() == plain[990:]
    assert minstd(123, 2**31 - 2, 5).tolist() == plain[:5], "the period"


def test_batches_of_minstd_are_one_stream() -> None:
    size = 5 * 3 * 4 * 4
    words = minstd(minstd_start(7, "random images"), 0, 3 * size)
    expected = (words >> 7).astype(np.float32) / np.float32(2**24)
    drawn = np.concatenate([numbers(7, "random images", batch * size, size) for batch in range(3)])
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn, expected)
    assert not np.array_equal(numbers(8, "random images", 0, size), drawn[:size])


def test_a_pool_of_minstd_is_one_stream() -> None:
    images = PoolImages(make("uniform", (1, 2, 2)), {"generator": "minstd", "rows": 20, "seed": 3}, 8)
    drawn = np.random.MT19937(np.random.SeedSequence([3, zlib.crc32(b"random pool"), 0, 0])).random_raw()
    words = minstd(1 + int(drawn) % (2**31 - 2), 0, 20 * 4)
    every = ((words >> 7).astype(np.float32) / np.float32(2**24)).reshape(20, 1, 2, 2)
    np.testing.assert_array_equal(images.take(0, 20), every)
    np.testing.assert_array_equal(images.take(17, 6), np.concatenate([every[17:], every[:3]]))


def test_the_warning_of_the_period() -> None:
    shape = (3, 32, 32)
    assert period_warning("mt19937", 10**9, "A seed", shape) is None
    assert (2**31 - 2) // (178 * 3072) == 3927, "batches of 178 CIFAR images"
    assert period_warning("minstd", 178 * 391 * 200, "A seed", shape) == (
        "The period of minstd is spent after 699,050 images of 3×32×32. A seed draws 13,919,600, more than that: then "
        "the same numbers come again."
    )
    assert period_warning("minstd", 5000, "The pool", shape) == (
        "The period of minstd is spent after 699,050 images of 3×32×32. The pool draws 5,000, no more than that."
    )


def test_an_epochs_seeds_are_those_of_its_batches() -> None:
    for batch, seed in zip(range(60, 190), torch_seeds(1, "dropout", 2, 60), strict=False):
        seed_torch_with(seed)
        drawn = torch.rand(3)
        seed_torch(1, "dropout", 2, batch)
        assert torch.equal(torch.rand(3), drawn)
