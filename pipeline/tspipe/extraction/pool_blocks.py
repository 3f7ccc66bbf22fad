"""The blocks of the random pool: drawn, and in a balanced pool chosen by the teacher's labels."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.cache import Manifest
from tspipe.cache.layout import FROM_PHOTOS
from tspipe.data.datasets import Images
from tspipe.data.image_loader import read, read_ahead
from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import Photos
from tspipe.data.random_images.balanced import choose
from tspipe.data.random_images.pool import PoolImages, kind_of
from tspipe.data.random_images.score import balance_report
from tspipe.extraction import forward
from tspipe.extraction.blocks import Block
from tspipe.models.feature_net import FeatureNet
from tspipe.recipes.schema import Recipe

_SEED = 0  # of a pool: a cache is made once


def pool_section(rows: int, recipe: Recipe) -> Manifest | None:
    """Return the section `random` of the manifest of a cache with a pool of `rows` random images; None without one."""
    if not rows:
        return None
    section: Manifest = {"generator": recipe.random_generator, "rows": rows, "seed": _SEED}
    if recipe.random_kind != "uniform":
        section["kind"] = recipe.random_kind
    if recipe.random_kind in FROM_PHOTOS:
        section |= {"flip": recipe.views.flip, "shift": recipe.views.shift}
    if recipe.random_balanced:
        section["rounds"] = recipe.random_rounds
    return section


def reader(images: Images, preprocess: Preprocess) -> Callable[[Tensor], Tensor]:
    """Return a function from indices (n,) int64 to preprocessed images (n, C, H, W) uint8."""

    def read_images(rows: Tensor) -> Tensor:
        [pixels] = read_ahead(lambda index: read(images, preprocess, index)[1], [rows.tolist()])
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    return read_images


@dataclass
class PoolBlocks:
    """Draws the blocks of the random pool that a manifest describes.

    Attributes:
        images: the training images, which some kinds are made from.
        teacher: labels the candidates of a balanced pool; None if `candidates` has them all.
        candidates: (P,) int64, the numbers of the chosen candidates, where a finished file has them.
        before: how often the teacher gave each label to the candidates so far.
        after: how often to those that were chosen.
    """

    manifest: Manifest
    images: Images
    preprocess: Preprocess
    teacher: FeatureNet | None = None
    candidates: NDArray[np.int64] | None = None
    before: Counter[int] = field(default_factory=Counter)
    after: Counter[int] = field(default_factory=Counter)

    def blocks(self, ranges: list[range]) -> Iterator[Block]:
        """Yield these blocks. They have no keys, so error messages state the numbers of images."""
        pool = self.open()
        for indices in ranges:
            chosen = self._choose(pool, indices) if "rounds" in self.manifest["random"] else np.arange(len(indices))
            pixels = pool.draw(indices.start // pool.block_rows, chosen)
            yield Block(
                indices,
                pixels.transpose(0, 2, 3, 1),
                np.empty((0, 8), np.uint8),
                np.empty(0, np.int64),
                np.array([f"random image {i}".encode() for i in indices]),
                candidates=chosen,
            )

    def open(self) -> PoolImages:
        """Return the images of the pool."""
        kind = kind_of(self.manifest, Photos(len(self.images), reader(self.images, self.preprocess)))
        return PoolImages(kind, self.manifest["random"], self.manifest["block_rows"], self.candidates)

    def balance_report(self) -> list[str]:
        """Say how the teacher labels the candidates and the chosen images, and what choosing cost, if it did."""
        if not self.before:
            return []
        classes, passes = self.images.classes, self.before.total() / self.after.total() + 1
        before, after = ({classes[i]: n for i, n in labels.most_common()} for labels in (self.before, self.after))
        return balance_report(before, after, passes)

    def _choose(self, pool: PoolImages, indices: range) -> NDArray[np.int64]:
        if self.candidates is not None:
            return self.candidates[indices.start : indices.stop]
        assert self.teacher is not None
        teacher, count, block = self.teacher, len(indices), indices.start // pool.block_rows
        batch_size, classes = self.manifest["compute"]["batch_size"], self.manifest["dataset"]["classes"]

        def label(number: int) -> NDArray[np.int64]:
            pixels = pool.draw(block, np.arange(number * count, (number + 1) * count)).transpose(0, 2, 3, 1)
            outputs = forward.run_teacher_on_blocks(
                teacher, self.preprocess, batch_size, pixels, "random candidates", block
            )
            labels: NDArray[np.int64] = outputs[1].argmax(1)
            return labels

        chosen, labels = choose(label, count, classes, self.manifest["random"]["rounds"])
        self.before.update(labels.tolist())
        self.after.update(labels[chosen].tolist())
        return chosen
