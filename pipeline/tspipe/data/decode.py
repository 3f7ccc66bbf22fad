"""One image: decoded and preprocessed."""

import numpy as np
from numpy.typing import NDArray

from tspipe.data.datasets import Images
from tspipe.data.preprocess import Preprocess
from tspipe.errors import DatasetError


def read(images: Images, preprocess: Preprocess, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image `index` as the dataset provides it, and preprocessed; an error names the image."""
    original = images.read(index)
    try:
        return original, preprocess.apply(original)
    except DatasetError as error:
        raise DatasetError(f"{images.keys[index]}: {error}") from error
