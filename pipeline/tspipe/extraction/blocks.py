"""What a cache's rows are made of: images decoded block by block, and what the teacher says of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.cache import Manifest
from tspipe.cache.layout import digest
from tspipe.data.datasets import Dataset, Images
from tspipe.data.decode import read
from tspipe.data.image_loader import check_sizes, read_ahead
from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import PoolImages
from tspipe.data.views import of_block

_SEED = 0  # a cache is made once


@dataclass(frozen=True)
class Replayed:
    """The views of a block's images, made batch by batch: all at once would take V times the memory of the images."""

    pixels: NDArray[np.uint8] | NDArray[np.float32]  # (n, H, W, C), before the crop
    views: NDArray[np.int16]  # (n·V, 3)

    def __len__(self) -> int:
        return len(self.views)

    def batch(self, preprocess: Preprocess, part: slice, device: torch.device) -> Tensor:
        """Some of the views, (m, C, H, W) uint8, cropped; each image goes to the device once."""
        views = torch.from_numpy(self.views[part]).to(device)
        images = torch.arange(part.start, part.start + len(views)) // (len(self.views) // len(self.pixels))
        first, last = int(images[0]), int(images[-1])
        pixels = torch.from_numpy(self.pixels[first : last + 1]).to(device).permute(0, 3, 1, 2)
        return preprocess.replay(pixels[(images - first).to(device)], views)


Given = NDArray[np.uint8] | NDArray[np.float32] | Replayed  # what the teacher gets: (n, H, W, C) pixels, or views


class Block(NamedTuple):
    """The images of a block: decoded, or drawn for the random pool, whose images have neither digests nor labels."""

    indices: range
    pixels: NDArray[np.uint8] | NDArray[np.float32]  # (n, H, W, C), preprocessed, before normalisation
    digests: NDArray[np.uint8]  # (n, 8), of the images as the dataset has them
    labels: NDArray[np.int64]  # (n,)
    keys: NDArray[np.bytes_]  # (n,)
    views: NDArray[np.int16] | None = None  # (n·V, 3): dy, dx, flip; the pixels are then not cropped yet

    @property
    def given(self) -> Given:
        """What the teacher gets."""
        return self.pixels if self.views is None else Replayed(self.pixels, self.views)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that need no teacher."""
        columns = {"labels": self.labels, "keys": self.keys, "digests": self.digests}
        return {**columns, "views": self.views, "images": self.pixels}


def of_section(
    section: str, dataset: Dataset, preprocess: Preprocess, manifest: Manifest, blocks: list[range]
) -> Iterator[Block]:
    """The images of these blocks of a split, or of the `random` pool as the manifest describes it."""
    if section == "random":
        return drawn(PoolImages.of(manifest), blocks)
    if section == "train" and (views := manifest["views"]):
        found = decoded(dataset.train, preprocess.before_views, blocks)
        return (block._replace(views=of_block(views, block.indices, manifest["block_rows"])) for block in found)
    return decoded(dataset.split(section), preprocess, blocks)


def drawn(pool: PoolImages, blocks: list[range]) -> Iterator[Block]:
    """Each block's random images, float32 in [0, 1); for want of keys they are called by their number."""
    for indices in blocks:
        yield Block(
            indices,
            pool.take(indices.start, len(indices)).transpose(0, 2, 3, 1),
            np.empty((0, 8), np.uint8),
            np.empty(0, np.int64),
            np.array([f"random image {i}".encode() for i in indices]),
        )


def decoded(images: Images, preprocess: Preprocess, blocks: list[range]) -> Iterator[Block]:
    """Each block's images, decoded in threads ahead of the teacher."""

    def work(index: int) -> tuple[NDArray[np.uint8], bytes]:
        original, pixels = read(images, preprocess, index)
        return pixels, digest(original)

    for indices, results in zip(blocks, read_ahead(work, blocks), strict=True):
        pixels, digests = zip(*results, strict=True)
        keys = [images.keys[i] for i in indices]
        check_sizes([image.shape[:2] for image in pixels], keys)
        yield Block(
            indices,
            np.stack(pixels),
            np.frombuffer(b"".join(digests), np.uint8).reshape(len(indices), -1),
            images.labels[indices.start : indices.stop],
            np.array([key.encode() for key in keys]),
        )
