"""Views: shifted and flipped training images. Stage one stores them with the teacher's targets, stage two replays them.

A target belongs to exactly the pixels that the teacher saw. So stage one records the shift and flip of each view, and
students replay them. Views that are drawn anew are for students alone, or for a teacher that labels them in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tspipe.errors import CacheMismatch
from tspipe.utils.rng import stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tspipe.cache import Cache, Manifest

_SEED = 0  # of the views in a cache: a cache is made once


class Views(BaseModel):
    """The settings of views."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(
        0, ge=0, le=2**16, description="The number of views of an image, with the plain one; 0 for none."
    )
    shift: int = Field(4, ge=0, le=2**14, description="Views are shifted by up to this many pixels in each direction.")
    flip: bool = Field(True, description="Views are mirrored at random.")

    @model_validator(mode="after")
    def _check_random(self) -> Self:
        if self.count == 1 or (self.count and not self.shift and not self.flip):
            raise ValueError(
                "there is nothing to draw, since the first view is the plain image. Give a count of 2 or more "
                "(0: no views), and a shift, or flip=true"
            )
        return self


def draw(generator: np.random.Generator, count: int, shift: int, flip: bool) -> NDArray[np.int16]:
    """Draw `count` views (count, 3): dy, dx and flip, from three words of the generator each (see cache/README.md)."""
    sizes, offsets = (2 * shift + 1, 2 * shift + 1, 1 + flip), (shift, shift, 0)
    return (_words(generator, 3 * count).reshape(count, 3) % sizes - offsets).astype(np.int16)


def block_views(views: Manifest, images: range, block_rows: int) -> NDArray[np.int16]:
    """Return the views (n·V, 3) of a block's images that a manifest describes; the first of each image is unchanged."""
    count, block = views["count"], images.start // block_rows
    block_of_views = np.zeros((len(images), count, 3), np.int16)
    generator = stream(views["seed"], "cached views", 0, block)
    shifted = draw(generator, len(images) * (count - 1), views["shift"], views["flip"])
    block_of_views[:, 1:] = shifted.reshape(len(images), count - 1, 3)
    return block_of_views.reshape(-1, 3)


def manifest_section(views: Views) -> Manifest | None:
    """Return the section `views` of the manifest of a cache with these views; None without views."""
    return {**views.model_dump(), "seed": _SEED} if views.count else None


def facts(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return the recipe section `views` of a cache, if it has views."""
    stated = manifest["views"]
    return {"views": {name: stated[name] for name in Views.model_fields}} if stated else {}


class EpochViews:
    """The view of each training image in an epoch, and the row of its targets.

    It is one of the cache's views, a different one in each of V epochs, or else one that is drawn anew.

    Args:
        stored: (N·V, 3), the cache's views; None to draw new ones.
    """

    def __init__(self, images: int, views: Views, stored: Tensor | None, device: torch.device):
        self._images, self._views, self._stored, self._device = images, views, stored, device

    @classmethod
    def of_cache(cls, cache: Cache, views: Views, taught: bool, device: torch.device) -> EpochViews | None:
        """Return the views of a run, or None if it has none; `taught` says whether any arm learns from cached targets.

        Raises CacheMismatch if the cache's targets belong to other views.
        """
        import torch

        if (stored := cache.manifest["views"]) is None and views.count and taught:
            raise CacheMismatch(
                f"{cache.path.name} has no views: its targets belong to unchanged images, so a taught student that "
                "sees shifted or flipped ones would learn the wrong targets. Make the cache again with views "
                f"(tspipe cache --views {views.count} --force), have the teacher label new ones (--set "
                "view_source=live), or train without (--set views.count=0)."
            )
        for field, value in views.model_dump().items() if stored else ():
            if stored[field] != value:
                raise CacheMismatch(
                    f"{cache.path.name} was made with views.{field} = {stored[field]}, not {value}: its targets belong "
                    "to those views. Leave the setting out, or make another cache with it."
                )
        rows = None if cache.train.views is None else torch.from_numpy(cache.train.views.load())
        return cls(len(cache.train), views, rows, device) if stored or views.count else None

    def batches(self, seed: int, epoch: int, order: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return, for each batch of images (n,), their target rows (n,) int64, and their views (n, 3) on the device."""
        import torch

        from tspipe.utils.device import batches_to_device

        if self._stored is None:
            generator = stream(seed, "views", epoch)
            views = torch.from_numpy(draw(generator, self._images, self._views.shift, self._views.flip))
            return order, batches_to_device([views[images] for images in order], self._device)
        count = self._views.count
        first = _words(stream(seed, "views", epoch // count), self._images)  # then the others in order, each once
        selected = torch.from_numpy(np.arange(self._images) * count + (first + epoch) % count)
        rows = [selected[images] for images in order]
        return rows, batches_to_device([self._stored[batch] for batch in rows], self._device)


def _words(generator: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Return the generator's next words (count,). `integers` is avoided: numpy may change how it uses words."""
    return generator.bit_generator.random_raw(count).astype(np.int64)
