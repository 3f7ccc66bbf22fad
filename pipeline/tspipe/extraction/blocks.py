"""The images of a cache, block by block."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.cache import Manifest
from tspipe.cache.layout import digest
from tspipe.data.datasets import Dataset, Images
from tspipe.data.image_loader import check_sizes, read, read_ahead
from tspipe.data.preprocess import Preprocess
from tspipe.data.views import block_views
from tspipe.errors import DatasetError

SEED = 0  # of the teacher's own random numbers: a cache is made once


@dataclass(frozen=True)
class Replayed:
    """The views of a block's images, made batch by batch: all at once would take V times the memory of the images."""

    pixels: NDArray[np.uint8] | NDArray[np.float32]  # (n, H, W, C), before the crop
    views: NDArray[np.int16]  # (n·V, 3)

    def __len__(self) -> int:
        return len(self.views)

    def batch(self, preprocess: Preprocess, part: slice, device: torch.device) -> Tensor:
        """Return some of the views, (m, C, H, W) uint8, cropped; each image is copied to the device once."""
        views = torch.from_numpy(self.views[part]).to(device)
        images = torch.arange(part.start, part.start + len(views)) // (len(self.views) // len(self.pixels))
        first, last = int(images[0]), int(images[-1])
        pixels = torch.from_numpy(self.pixels[first : last + 1]).to(device).permute(0, 3, 1, 2)
        return preprocess.replay(pixels[(images - first).to(device)], views)


TeacherInput = NDArray[np.uint8] | NDArray[np.float32] | Replayed  # (n, H, W, C) pixels, or views


class Block(NamedTuple):
    """The images of a block. Those of the random pool have neither digests nor labels."""

    indices: range
    pixels: NDArray[np.uint8] | NDArray[np.float32]  # (n, H, W, C), preprocessed, before normalisation
    digests: NDArray[np.uint8]  # (n, 8), of the images before preprocessing
    labels: NDArray[np.int64]  # (n,)
    keys: NDArray[np.bytes_]  # (n,)
    views: NDArray[np.int16] | None = None  # (n·V, 3): dy, dx, flip; the pixels are then not cropped yet
    candidates: NDArray[np.int64] | None = None  # (n,), of the random pool: their numbers in the stream of the block
    broken: Sequence[str] = ()  # why images cannot be decoded; the block then has no pixels

    @property
    def teacher_input(self) -> TeacherInput:
        """The images or views that the teacher runs on."""
        return self.pixels if self.views is None else Replayed(self.pixels, self.views)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that need no teacher."""
        columns = {"labels": self.labels, "keys": self.keys, "digests": self.digests}
        return {**columns, "views": self.views, "images": self.pixels, "candidates": self.candidates}


def split_blocks(
    section: str, dataset: Dataset, preprocess: Preprocess, manifest: Manifest, ranges: list[range]
) -> Iterator[Block]:
    """Yield these blocks of a split."""
    if section == "train" and (views := manifest["views"]):
        blocks = decode_blocks(dataset.train, preprocess.before_views, ranges)
        return (block._replace(views=block_views(views, block.indices, manifest["block_rows"])) for block in blocks)
    return decode_blocks(dataset.split(section), preprocess, ranges)


def decode_blocks(images: Images, preprocess: Preprocess, ranges: list[range]) -> Iterator[Block]:
    """Yield blocks of a split; threads decode ahead of the teacher."""

    def decode(index: int) -> tuple[NDArray[np.uint8], bytes] | DatasetError:
        try:
            original, pixels = read(images, preprocess, index)
        except DatasetError as problem:
            return problem
        return pixels, digest(original)

    for indices, results in zip(ranges, read_ahead(decode, ranges), strict=True):
        keys, labels = [images.keys[i] for i in indices], images.labels[indices.start : indices.stop]
        names = np.array([key.encode() for key in keys])
        decoded = [result for result in results if not isinstance(result, DatasetError)]
        if len(decoded) < len(results):
            broken = [str(result) for result in results if isinstance(result, DatasetError)]
            yield Block(indices, np.empty(0, np.uint8), np.empty((0, 8), np.uint8), labels, names, broken=broken)
            continue
        pixels, digests = zip(*decoded, strict=True)
        check_sizes([image.shape[:2] for image in pixels], keys)
        digest_rows = np.frombuffer(b"".join(digests), np.uint8).reshape(len(indices), -1)
        yield Block(indices, np.stack(pixels), digest_rows, labels, names)
