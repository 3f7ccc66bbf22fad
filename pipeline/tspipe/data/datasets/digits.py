"""Handwritten digits of 13 people, 8×8 grey, from the scikit-learn package: real data that needs no download.

They are the 1,797 images of the test part of the UCI dataset; the first 1,000 are used for training, 797 for testing.
"""

import importlib.util
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
    """Return images (8, 8, 1) uint8; `root` is not used."""
    array, labels = _all()
    part = slice(None, TRAIN) if split == "train" else slice(TRAIN, None)
    return from_array(array[part], labels[part], [str(digit) for digit in range(10)])


@cache
def _all() -> tuple[np.ndarray, np.ndarray]:
    spec = importlib.util.find_spec("sklearn")  # the file without the package, whose import takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise DatasetError("The digits come with scikit-learn: pip install 'tspipe[digits]'")
    file = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    rows = np.loadtxt(file, delimiter=",", dtype=np.int64)  # 64 pixels and the label
    # Published values are 0 to 16; pixels are 0 to 255.
    return np.round(rows[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1), rows[:, 64]
