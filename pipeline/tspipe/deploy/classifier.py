"""Classifying images with a student or an export."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.data.decode import has_image_extension
from tspipe.data.image_loader import read_ahead
from tspipe.deploy.facts import Facts
from tspipe.deploy.images import Picture, prepare
from tspipe.errors import DatasetError


class Classifier(Protocol):
    """A student or an export."""

    @property
    def facts(self) -> Facts: ...

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path: ...

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return the probabilities (n, c) of images (n, C, H, W) uint8 after resize and crop."""


class Prediction(NamedTuple):
    """Labels (n,) int64, indices into the class names, and probabilities (n, c) float32 of n images."""

    labels: Tensor
    probabilities: Tensor


def predict(classifier: Classifier, pictures: Sequence[Picture], batch_size: int) -> Prediction:
    """Classify pictures. Raises DatasetError for the first one that cannot be classified."""
    rows: list[Tensor] = []
    for row in predict_each(classifier, pictures, batch_size):
        if isinstance(row, DatasetError):
            raise row
        rows.append(row)
    probabilities = torch.stack(rows) if rows else torch.empty(0, len(classifier.facts.classes))
    return Prediction(probabilities.argmax(1), probabilities)


def predict_each(
    classifier: Classifier, pictures: Sequence[Picture], batch_size: int
) -> Iterator[Tensor | DatasetError]:
    """Yield the probabilities (c,) of each picture, or why it cannot be classified. Threads decode the next batches."""
    facts = classifier.facts

    def work(index: int) -> NDArray[np.uint8] | DatasetError:
        try:
            return prepare(pictures[index], facts.preprocess, facts.input_shape)
        except DatasetError as error:
            return error

    ranges = (range(i, min(i + batch_size, len(pictures))) for i in range(0, len(pictures), batch_size))
    for results in read_ahead(work, ranges):
        images = [result for result in results if isinstance(result, np.ndarray)]
        rows: Iterator[Tensor] = iter(
            classifier.probabilities(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)) if images else []
        )
        yield from (next(rows) if isinstance(result, np.ndarray) else result for result in results)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files among the paths and, in the order of names, the image files in and below the folders.

    Hidden files and folders are left out. Raises DatasetError if a folder has no images.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = [file for file in path.rglob("*") if has_image_extension(file.name) and file.is_file()]
        visible = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not visible:
            raise DatasetError(f"{path} has no images that Pillow decodes.")
        files += sorted(visible)
    return files
