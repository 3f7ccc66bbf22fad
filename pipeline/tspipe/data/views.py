"""Views: training images moved and mirrored, which stage one stores with the teacher's targets and stage two replays.

A target belongs to the very pixels that the teacher saw. So stage one writes down how each view was made, and the
students get what is written; only students that learn nothing from the teacher may have views drawn afresh.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from tspipe.cache import Cache, Manifest
from tspipe.errors import CacheMismatch
from tspipe.utils.device import batches_to_device
from tspipe.utils.rng import stream

_SEED = 0  # of the views in a cache: a cache is made once


class Views(BaseModel):
    """Views of the training images, moved and mirrored: stored by stage one, replayed by stage two."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(
        0, ge=0, le=2**16, description="The number of views of an image, with the plain one; 0 for none."
    )
    shift: int = Field(4, ge=0, le=2**14, description="Views are shifted by up to this many pixels in each direction.")
    flip: bool = Field(True, description="Views are mirrored at random.")

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        if self.count == 1 or (self.count and not self.shift and not self.flip):
            raise ValueError(
                "there is nothing to draw, since the first view is the plain image. Give a count of 2 or more "
                "(0: no views), and a shift, or flip=true"
            )
        return self


def drawn(generator: np.random.Generator, count: int, shift: int, flip: bool) -> NDArray[np.int16]:
    """`count` views (count, 3): dy, dx and flip, from three words of the generator each; cache/README.md says how."""
    sizes, least = (2 * shift + 1, 2 * shift + 1, 1 + flip), (shift, shift, 0)
    return (_words(generator, 3 * count).reshape(count, 3) % sizes - least).astype(np.int16)


def block_views(views: Manifest, images: range, block_rows: int) -> NDArray[np.int16]:
    """The views (n·V, 3) of a block's images, as a manifest describes them; each image's first is the plain one."""
    count, block = views["count"], images.start // block_rows
    found = np.zeros((len(images), count, 3), np.int16)
    generator = stream(views["seed"], "cached views", 0, block)
    drawn_ones = drawn(generator, len(images) * (count - 1), views["shift"], views["flip"])
    found[:, 1:] = drawn_ones.reshape(len(images), count - 1, 3)
    return found.reshape(-1, 3)


def described(wanted: Views) -> Manifest | None:
    """What a cache's manifest says of its views, if stage one makes them now."""
    return {**wanted.model_dump(), "seed": _SEED} if wanted.count else None


def facts(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What a cache's manifest says for the recipe: its views, where it has any."""
    stated = manifest["views"]
    return {"views": {name: stated[name] for name in Views.model_fields}} if stated else {}


def views_identity(cache: Cache, wanted: Views) -> dict[str, Any]:
    """What a run's numbers follow from, of the views it shows, if any."""
    if cache.manifest["views"]:
        return {"views": wanted.model_dump()}
    return {"views": wanted.model_dump(exclude={"count"})} if wanted.count else {}


class EpochViews:
    """Which view of each training image an epoch shows, and which row of the targets is of it.

    Each image shows one of the cache's views; of a cache without views one that is drawn afresh.
    """

    def __init__(self, cache: Cache, wanted: Views, device: torch.device):
        self._images, self._wanted, self._device = len(cache.train), wanted, device
        self._stored = None if cache.train.views is None else torch.from_numpy(cache.train.views.load())

    @classmethod
    def of_run(cls, cache: Cache, wanted: Views, taught: bool, device: torch.device) -> "EpochViews | None":
        """Those of a run, `taught` if any of its arms learns from the targets; None where it shows the plain images.

        Raises CacheMismatch where other views are asked for than the cache's targets belong to.
        """
        if (there := cache.manifest["views"]) is None and wanted.count and taught:
            raise CacheMismatch(
                f"{cache.path.name} has no views: its targets are of the images as they are, and a taught student that "
                "sees them moved or mirrored would learn what the teacher says of others. Make the cache again with "
                f"views (tspipe cache --views {wanted.count} --force), or train without: --set views.count=0"
            )
        for field, here in wanted.model_dump().items() if there else ():
            if there[field] != here:
                raise CacheMismatch(
                    f"{cache.path.name} was made with views.{field} = {there[field]}, not {here}: its targets belong "
                    "to those views. Leave the setting out, or make another cache with it."
                )
        return cls(cache, wanted, device) if there or wanted.count else None

    def batches(self, seed: int, epoch: int, order: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """For each batch of images (n,) the rows of their targets (n,) int64, and on the device their views (n, 3)."""
        generator = stream(seed, "views", epoch)
        if self._stored is None:
            views = torch.from_numpy(drawn(generator, self._images, self._wanted.shift, self._wanted.flip))
            return order, batches_to_device([views[images] for images in order], self._device)
        count = self._wanted.count
        shown = torch.from_numpy(np.arange(self._images) * count + _words(generator, self._images) % count)
        rows = [shown[images] for images in order]
        return rows, batches_to_device([self._stored[some] for some in rows], self._device)


def _words(generator: np.random.Generator, count: int) -> NDArray[np.int64]:
    """The generator's next words, (count,); not `integers`, whose way from words another numpy may change."""
    return generator.bit_generator.random_raw(count).astype(np.int64)
