"""What views cost, said before stage one computes them."""

import time
from datetime import timedelta

import numpy as np

from tspipe.cache import Dimensions
from tspipe.data.preprocess import Preprocess
from tspipe.extraction import forward
from tspipe.models.feature_net import FeatureNet
from tspipe.utils.console import format_bytes

_TIMED = 8  # images in a batch that is timed


def describe(sizes: Dimensions, teacher: FeatureNet, preprocess: Preprocess, shape: tuple[int, int, int]) -> str:
    """Say how many rows and bytes the views of the training images take, and how long the teacher takes for them.

    Args:
        shape: (C, H, W) of the teacher's input.
    """
    columns = {name: sizes.datasets()[f"train_{name}"] for name in ("features", "logits", "views")}
    stored = sum(dtype.itemsize * int(np.prod(size)) for dtype, size in columns.values())
    images, views = sizes.images("train"), sizes.views_of("train")
    channels, height, width = shape
    pixels = np.zeros((_TIMED, height, width, channels), np.uint8)
    for _ in range(2):  # the first call also warms up
        start = time.perf_counter()
        forward.run_teacher_on_blocks(teacher, preprocess, _TIMED, pixels, "timed", 0)
        seconds = (time.perf_counter() - start) / _TIMED
    duration = timedelta(seconds=round(seconds * images * views))
    return (
        f"{views} views of {images:,} images are {images * views:,} rows: {format_bytes(stored)}, and about {duration} "
        f"of the teacher in one process, {views} times that of the images alone."
    )
