"""The digits, beside scikit-learn's own reader."""

import importlib.util

import numpy as np
import pytest

from tspipe.data.datasets import digits
from tspipe.errors import DatasetError


def test_images_and_labels_are_scikit_learns() -> None:
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    array, labels = digits._all()
    assert np.array_equal(array[..., 0], np.round(bunch.images * (255 / 16)).astype(np.uint8))
    assert np.array_equal(labels, bunch.target)


def test_without_scikit_learn_there_is_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match=r"pip install 'tspipe\[digits\]'"):
        digits._all.__wrapped__()
