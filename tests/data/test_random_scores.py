"""Scores of random images, from the teacher's logits alone."""

import numpy as np
import pytest

from tspipe.data.random_images.score import label_counts, label_shares, score


def test_the_deviation_is_that_of_repeated_means() -> None:
    """The code of arXiv 2012.02909 takes means over 640 images again and again, and the deviation of these means."""
    logits = np.random.default_rng(0).normal(0, 3, (640 * 400, 5))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    repeated = probabilities.reshape(400, 640, 5).mean(1).std(0, ddof=1).mean()
    assert score(logits[:20_000]).deviation == pytest.approx(repeated, rel=0.05)


def test_labels_and_entropy() -> None:
    even = score(np.tile(100.0 * np.eye(4), (10, 1)))
    assert (even.images, even.share) == (40, 0.25)
    assert even.classes == pytest.approx(4)
    assert even.entropy == pytest.approx(0, abs=1e-6)
    constant = score(np.tile([0.0, 1000.0, 1000.0], (10, 1)).astype(np.float32))
    assert (constant.classes, constant.largest, constant.share, constant.deviation) == (1, 1, 1, 0)
    assert constant.entropy == pytest.approx(np.log(2))


def test_shares_are_listed_from_the_largest() -> None:
    counts = label_counts(np.array([2, 0, 2, 2]), ["a", "b", "c"])
    assert list(counts.items()) == [("c", 3), ("a", 1)]
    assert label_shares(counts) == "The teacher's labels for random images: c (75%), a (25%)"
