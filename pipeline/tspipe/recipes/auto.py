"""What `auto` in a recipe stands for: settings that follow from the images and from the teacher's weights."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tspipe.data.datasets import Images
from tspipe.errors import DatasetError

_FINE_TUNING_EPOCHS = 10
_SIDE, _SMALL_SIDE = 224, 64  # pixels; MobileNetV3 reduces 32 to one
IMAGENET: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "resize": (256, 256),
    "crop": _SIDE,
    "interpolation": "bilinear",
}
# The settings that may be `auto`, with the values for a recipe that is loaded without images.
DEFAULTS: dict[str, Any] = {
    "batch_size": 32,
    "epochs": 30,
    "student": "torchvision:mobilenet_v3_small",
    "teacher.batch_size": 32,
    "teacher.epochs": _FINE_TUNING_EPOCHS,
    "teacher.pretrained": "imagenet",
    "teacher.shift": 0,
    "views.count": 0,
    "views.shift": 4,
    **{f"preprocess.{name}": value for name, value in IMAGENET.items()},
    "preprocess.resize": None,
    "preprocess.crop": None,
}
_VIEWS = 4
_SAMPLE = 16  # images whose size is read
Choose = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # from the preprocessing that is known to values for `auto`


def batch_size(images: int) -> int:
    """Return 32, or less where an epoch would have fewer than 8 steps."""
    return min(32, max(4, images // 8))


def for_students(images: int, preprocess: Mapping[str, Any], *, pretrained: bool = False) -> dict[str, Any]:
    """Return the values for stage two, for the number of training images and the preprocessing of the cache.

    `pretrained` says whether all students start from weights.
    """
    small = _input_side(preprocess) <= _SMALL_SIDE
    return {
        "batch_size": batch_size(images),
        "epochs": _FINE_TUNING_EPOCHS if pretrained else DEFAULTS["epochs"],
        "student": "resnet20" if small else DEFAULTS["student"],
    }


def settings(images: Images, known: Mapping[str, Any], stated: Mapping[str, Any], pretrained: bool) -> dict[str, Any]:
    """Return the values for a teacher and its cache, for the training images.

    Args:
        known: fields of the preprocessing that the recipe states.
        stated: the preprocessing that the teacher's network is published with; empty for a network that takes images as
            large as they are, up to ImageNet's size.
        pretrained: whether the teacher starts from weights.
    """
    preprocess = {**IMAGENET, **stated}
    side = _SIDE if stated else _median_side(images)
    if side < _SIDE:
        preprocess |= {"resize": (side, side), "crop": None}
    if "resize" in known:
        preprocess["crop"] = None
    elif known.get("crop"):
        preprocess["resize"] = (known["crop"] * 8 // 7,) * 2
    preprocess |= known
    size = _input_side(preprocess, side)
    # A fourteenth is the margin around ImageNet's crop, and two pixels of 28.
    shift, batch = max(1, size // 14), batch_size(len(images))
    return {
        "batch_size": batch,
        "teacher.batch_size": batch,
        "teacher.epochs": _FINE_TUNING_EPOCHS if pretrained else 60,
        "teacher.shift": 0 if preprocess["crop"] else shift,  # the crop moves instead
        "views.count": _VIEWS,
        "views.shift": shift,
        **{f"preprocess.{name}": value for name, value in preprocess.items()},
    }


def _input_side(preprocess: Mapping[str, Any], otherwise: int = _SIDE) -> int:
    """Return the shorter side of the network's input in pixels, `otherwise` if the images keep their size."""
    return int(preprocess["crop"] or min(preprocess["resize"] or (otherwise,)))


def _median_side(images: Images) -> int:
    """Return the median of the shorter sides in pixels, of a sample of the images."""
    sides = []
    for index in np.linspace(0, len(images) - 1, min(_SAMPLE, len(images))).astype(int):
        try:
            sides.append(min(images.read(int(index)).shape[:2]))
        except DatasetError:
            continue  # the stage that reads all images reports it, or leaves it out
    return int(np.median(sides)) if sides else _SIDE
