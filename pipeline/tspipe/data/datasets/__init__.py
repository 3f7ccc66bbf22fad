"""Datasets: one file each, the file name is the name on the command line.

A dataset's file defines `load(root, split) -> Images` for the splits `train` and `test`, and as constants where
it comes from: `SOURCE`, `LICENSE`, `CITATION`. It may define `download(root)`; nothing downloads unless asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tspipe.errors import DatasetError
from tspipe.utils import plugins

Pixels = NDArray[np.uint8]


class Whole(Protocol):
    """What numpy makes one array of."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __array__(self) -> Pixels: ...


@dataclass(frozen=True)
class Images:
    """One split of a dataset.

    Attributes:
        labels: (N,) int64, indices into `classes`.
        keys: a stable id per image: the path relative to the split's folder, or the index in the published file.
        classes: the class names.
        read: `read(i)` gives image i as (H, W, C) uint8, after EXIF rotation and conversion to RGB (grey
            datasets keep C = 1). Safe to call from several threads.
        array: all images as (N, H, W, C) uint8, in memory or in one piece of a file; None where sizes differ.
    """

    labels: NDArray[np.int64]
    keys: Sequence[str]
    classes: Sequence[str]
    read: Callable[[int], Pixels]
    array: Whole | None = None

    def __len__(self) -> int:
        return len(self.labels)


def from_array(array: Pixels, labels: NDArray[np.integer], classes: Sequence[str]) -> Images:
    """A split that is one array, its keys the indices."""
    keys = [str(i) for i in range(len(array))]
    return Images(labels.astype(np.int64), keys, classes, lambda i: array[i], array)


@dataclass(frozen=True)
class Dataset:
    """A dataset that has been found: its name as the cache states it, and its two splits."""

    name: str
    licence: str
    train: Images
    test: Images

    def split(self, name: str) -> Images:
        """`train` or `test` by name."""
        return self.train if name == "train" else self.test


def names() -> list[str]:
    """The datasets there are."""
    return plugins.names("data.datasets")


def parse(spec: str, data: Path | None = None) -> tuple[ModuleType, str, Path | None]:
    """What the command line's `--dataset` means: the module, the name a cache states, the folder if it names one.

    `spec` is a name, `folder:PATH` (or `folder`, and then `data` is the path), or the path of a Python file.
    """
    kind, _, folder = spec.partition(":")
    module = plugins.load("data.datasets", kind, "load", DatasetError)
    if kind == "folder" and (path := Path(folder) if folder else data):
        return module, f"folder:{plugins.plain(path.absolute().name)}", path
    if folder:
        raise DatasetError(f"{kind} is a dataset of its own and takes no path; use --data {folder}.")
    return module, plugins.recorded_name("data.datasets", kind), None


def stem(name: str) -> str:
    """The file name stem a dataset's cache and checkpoints begin with: `folder:birds` gives `birds`."""
    return name.removeprefix("folder:")


def open_dataset(spec: str, data: Path | None = None, *, download: bool = False) -> Dataset:
    """Load both splits of a dataset. Its images lie in `data`, else where `spec` says, else in `data/<name>`.

    Raises DatasetError: unknown name, missing folder (where it was looked for, how to get it), unsound files.
    """
    module, name, folder = parse(spec, data)
    root = data or folder or Path("data") / stem(name)
    if download and hasattr(module, "download"):  # where it has none, `load` says what is missing and where to get it
        module.download(root)
    train, test = module.load(root, "train"), module.load(root, "test")
    if list(train.classes) != list(test.classes):
        raise DatasetError(f"{root}: train and test do not have the same classes.")
    return Dataset(name, getattr(module, "LICENSE", ""), train, test)
