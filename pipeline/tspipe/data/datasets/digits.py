"""Handwritten digits, 8×8 grey, from scikit-learn's own package: real data that needs no download.

1,797 images of 13 people (the test part of the UCI set). The first 1,000 are the training split, the other 797 the
test split.
"""

from functools import cache
from pathlib import Path

import numpy as np

from tspipe.data.datasets import Images, from_array
from tspipe.errors import DatasetError

SOURCE = "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits"
LICENSE = "CC BY 4.0"
CITATION = (
    "Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. UCI Machine Learning Repository."
)
TRAIN = 1000


def load(root: Path, split: str) -> Images:
    """Both splits come with scikit-learn; `root` is not used. Images are (8, 8, 1) uint8."""
    array, labels = _all()
    part = slice(None, TRAIN) if split == "train" else slice(TRAIN, None)
    return from_array(array[part], labels[part], [str(digit) for digit in range(10)])


@cache
def _all() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as problem:
        raise DatasetError("The digits come with scikit-learn: pip install 'tspipe[digits]'") from problem
    bunch = load_digits()
    # Published values are 0 to 16; spread over 0 to 255 so that they are pixels like any other.
    return np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None], bunch.target
