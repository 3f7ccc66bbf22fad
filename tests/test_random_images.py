"""Random images and every other draw follow from (seed, purpose, epoch, batch) alone."""

import numpy as np
import torch

from tspipe.random_images import uniform
from tspipe.randomness import seed_torch, stream


def test_the_same_batch_is_the_same_and_no_other_is() -> None:
    shape = (3, 4, 4)
    first = uniform(0, 1, 2, 5, shape)
    assert first.equal(uniform(0, 1, 2, 5, shape))
    for other in [(1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)]:
        assert not first.equal(uniform(*other, 5, shape))


def test_they_are_uniform_and_independent() -> None:
    images = uniform(0, 0, 0, 2000, (3, 4, 4)).double()
    assert images.dtype == torch.float64
    assert 0 <= images.min() < 1e-3
    assert 1 - 1e-3 < images.max() < 1
    flat = images.flatten(1)
    # Standard errors: 1/√(12·2000) = 0.0065 of a pixel's mean, about 1/√2000 = 0.022 of a correlation.
    assert (flat.mean(0) - 0.5).abs().max() < 5 * 0.0065
    correlation = torch.corrcoef(flat.T) - torch.eye(48)
    assert correlation.abs().max() < 5.5 * 0.022


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
