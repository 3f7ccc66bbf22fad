"""Images of a folder, without labels, to check an export on and to take the scales of an int8 one from."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tspipe.deploy.classifier import find_images
from tspipe.deploy.facts import Facts
from tspipe.deploy.images import prepare

_MOST = 1000


class FolderImages:
    """The images in and below a folder, at most 1,000 of them, evenly spaced in the order of their names."""

    labels = None

    def __init__(self, folder: Path, facts: Facts):
        self.images, self._facts = _evenly_spaced(find_images([folder]), _MOST), facts

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, None]]:
        """Yield images (n, C, H, W) uint8. Raises DatasetError, which names the file, if one cannot be decoded."""
        for start in range(0, len(self.images), batch_size):
            yield self._read(self.images[start : start + batch_size]), None

    def training_sample(self, count: int) -> Tensor:
        """Return at most so many of the images (n, C, H, W) uint8, evenly spaced."""
        return self._read(_evenly_spaced(self.images, count))

    def _read(self, files: Sequence[Path]) -> Tensor:
        pixels = [prepare(file, self._facts.preprocess, self._facts.input_shape) for file in files]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def _evenly_spaced(files: Sequence[Path], count: int) -> list[Path]:
    indices = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
    return [files[i] for i in indices]
