"""The random pool of a cache: images that are drawn again from what its manifest says, as cache/README.md defines.

Each block of `block_rows` images has a Mersenne Twister, which draws them in order. Its state is kept, so that
consecutive batches draw no number twice and only one batch is in memory. MINSTD has one stream for all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from tspipe.cache.layout import FROM_PHOTOS
from tspipe.data.random_images import minstd
from tspipe.data.random_images.base import KINDS, Generator, Kind, Photos, make
from tspipe.errors import CacheDamaged, CacheMismatch
from tspipe.utils.rng import stream

if TYPE_CHECKING:
    from tspipe.cache import Manifest

_PURPOSE = "random pool"
_USE_LIVE = "Install a newer tspipe, or have the teacher label random images live: --set random_source=live"


def facts(manifest: Manifest) -> dict[str, Any]:
    """Return the settings that a cache's pool, if it has one, determines in stage two."""
    random = manifest["random"] or {}
    settings = {"random_kind": random.get("kind", "uniform"), "random_balanced": "rounds" in random}
    return settings if random else {}


def kind_of(manifest: Manifest, photos: Photos) -> Kind:
    """Return the kind of a pool's images.

    Args:
        manifest: of a cache with a pool; the caller has checked its teacher's input shape.
        photos: the training images; the manifest says how they are shifted and flipped.

    Raises CacheMismatch for a generator or a kind that this version does not know.
    """
    random, shape = manifest["random"], tuple(manifest["teacher"]["options"]["input_shape"])
    name = random.get("kind", "uniform")
    for what, value, known in (("generator", random["generator"], get_args(Generator)), ("kind", name, KINDS)):
        if value not in known:
            raise CacheMismatch(
                f"The cache's random pool has the {what} {value!r}, and this tspipe knows "
                f"{', '.join(known[:-1])} and {known[-1]} only. {_USE_LIVE}"
            )
    if name in FROM_PHOTOS:
        photos = replace(photos, shift=random["shift"], flip=random["flip"])
    return make(name, shape, photos)


class PoolImages:
    """The random images of a pool, drawn again. Not thread-safe.

    Args:
        kind: the kind of its images.
        random: the section of the manifest that describes the pool.
        block_rows: images per block; the last may have fewer.
        candidates: (P,) int64, the number of each image in the stream of its block; None if they are consecutive.
    """

    def __init__(self, kind: Kind, random: Manifest, block_rows: int, candidates: NDArray[np.int64] | None = None):
        self.kind, self._random, self.block_rows, self._candidates = kind, random, block_rows, candidates
        if candidates is not None and not self._are_candidates(candidates, random["rounds"]):
            raise CacheDamaged("random_candidates holds numbers that no pool has. Get the file again.")
        self._block = -1
        self._drawn = 0  # images of the block that its generator has drawn

    def _are_candidates(self, numbers: NDArray[np.int64], rounds: int) -> bool:
        """Return whether the numbers increase within each block and lie within its candidates."""
        starts = np.arange(0, self._random["rows"], self.block_rows)
        sizes = np.diff([*starts, self._random["rows"]])
        limits = rounds * sizes.repeat(sizes)
        increases = np.diff(numbers, prepend=-1) > 0
        increases[starts] = True
        return bool(((numbers >= 0) & (numbers < limits) & increases).all())

    def take(self, start: int, count: int) -> NDArray[Any]:
        """Return images `start` to `start + count − 1`, modulo P; count ≥ 1.

        They are (count, C, H, W) uint8, or float32 in [0, 1).
        """
        return self.kind.images(self.numbers(start, count))

    def numbers(self, start: int, count: int) -> NDArray[Any]:
        """Return the random numbers (count, draws) of these images."""
        numbers, done, rows = list[NDArray[Any]](), 0, self._random["rows"]
        while done < count:
            row = (start + done) % rows
            block, first = divmod(row, self.block_rows)
            size = min(count - done, self.block_rows - first, rows - row)
            stored = self._candidates
            chosen = first + np.arange(size) if stored is None else stored[row : row + size]
            numbers += self._numbers(block, chosen)
            done += size
        return np.concatenate(numbers)

    def draw(self, block: int, images: NDArray[np.int64]) -> NDArray[Any]:
        """Return images of a block's stream by their numbers, which increase and may go beyond the block's rows."""
        return self.kind.images(np.concatenate(list(self._numbers(block, images))))

    def _numbers(self, block: int, images: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """Yield the random numbers of these images of a block, one part for each run of consecutive ones."""
        for run in np.split(images, np.flatnonzero(np.diff(images) != 1) + 1):
            yield self._block_numbers(block, int(run[0]), len(run))

    def _block_numbers(self, block: int, first: int, count: int) -> NDArray[Any]:
        draws = self.kind.draws
        if self._random["generator"] == "minstd":
            skipped = (block * self.block_rows + first) * draws
            return minstd.numbers(self._random["seed"], _PURPOSE, skipped, count * draws).reshape(count, draws)
        if block != self._block or first < self._drawn:
            self._block, self._drawn = block, 0
            self._generator = stream(self._random["seed"], _PURPOSE, 0, block)
        if skipped := first - self._drawn:  # a number is one word
            self._generator.bit_generator.random_raw(skipped * draws, output=False)
        self._drawn = first + count
        return self.kind.numbers(self._generator, count)
