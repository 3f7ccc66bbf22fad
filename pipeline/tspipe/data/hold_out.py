"""Held-back test images, for a dataset that comes without a test split."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tspipe.errors import DatasetError
from tspipe.utils.progress import remark_once

if TYPE_CHECKING:
    from tspipe.data.datasets import Images


class HoldOut(BaseModel):
    """The settings of the split; a cache made with it records them in its manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(
        0.0, ge=0, lt=1, description="The share of each class that is held back for testing; 0 needs a test split."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Another seed holds back other images.")


def split_images(images: Images, settings: HoldOut, where: str) -> tuple[Images, Images]:
    """Split images into train and test, class by class; both keep the order of the images.

    A class of n images holds back ⌊fraction · n + ½⌋ of them, at least one and at most n − 1: those with the smallest
    SHA-256 of `SEED/KEY`. So an image that is added or removed moves at most one other image of its class.

    Args:
        where: the dataset, for messages.

    Raises DatasetError if no class has two images.
    """
    single, held = [], list[int]()
    for number, name in enumerate(images.classes):
        rows = np.flatnonzero(images.labels == number).tolist()
        rows.sort(key=lambda i: hashlib.sha256(f"{settings.seed}/{images.keys[i]}".encode()).digest())
        count = min(len(rows) - 1, max(1, math.floor(settings.fraction * len(rows) + 0.5)))
        held += rows[: max(0, count)]
        single += [name] if len(rows) == 1 else []
    if not held:
        raise DatasetError(f"{where} cannot be split: no class has two images, one to train and one to test with.")
    if single:
        names = ", ".join(single[:3]) + (f" and {len(single) - 3} more" if len(single) > 3 else "")
        remark_once(f"single {where}", f"{where}: the test split lacks classes that have a single image: {names}.")
    kept = set(range(len(images))).difference(held)
    return images.without(held), images.without(kept)
