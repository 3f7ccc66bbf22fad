"""Datasets: one file each, the file name is the name on the command line.

A dataset's file defines `load(root, split) -> Images` for the splits `train` and `test`, and as constants where
it comes from: `SOURCE`, `LICENSE`, `CITATION`. It may define `download(root)`; nothing downloads unless asked. It may
define `load_unsplit(root) -> Images`, all images of a dataset that has no splits, for `--split`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from tspipe.data.hold_out import HoldOut, split_images
from tspipe.errors import DatasetError, TspipeError
from tspipe.utils import plugins

Pixels = NDArray[np.uint8]
_SAMPLE = 16  # images of an array that are compared with `read`


class ArrayLike(Protocol):
    """An object that numpy converts to one array."""

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
        read: `read(i)` returns image i as (H, W, C) uint8, after EXIF rotation and conversion to RGB (grey
            datasets keep C = 1). Safe to call from several threads.
        array: all images as (N, H, W, C) uint8, in memory or in one piece of a file; None where sizes differ. `read`
            of a dataset that has been opened takes them from it.
        check_header: `check_header(i)` raises DatasetError if the header of image i shows that `read(i)` would; None if
            that takes as long as `read(i)`.
    """

    labels: NDArray[np.int64]
    keys: Sequence[str]
    classes: Sequence[str]
    read: Callable[[int], Pixels]
    array: ArrayLike | None = None
    check_header: Callable[[int], object] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def without(self, indices: Collection[int]) -> Images:
        """Return the split without some images."""
        if not indices:
            return self
        kept = np.delete(np.arange(len(self)), list(indices)).tolist()
        check = self.check_header
        return Images(
            self.labels[kept],
            [self.keys[i] for i in kept],
            self.classes,
            lambda i: self.read(kept[i]),
            check_header=check and (lambda i: check(kept[i])),
        )


def from_array(array: Pixels, labels: NDArray[Any], classes: Sequence[str]) -> Images:
    """Return a split that is one array; labels are integers of any type, keys are the indices."""
    labels = labels.astype(np.int64) if np.issubdtype(labels.dtype, np.integer) else labels
    return Images(labels, [str(i) for i in range(len(array))], classes, lambda i: array[i], array)


@dataclass(frozen=True)
class Dataset:
    """A dataset that has been opened: its name as the cache states it, its licence, its splits, unlabelled images."""

    name: str
    licence: str
    train: Images
    test: Images
    unlabelled: Images | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of its splits: `train`, `test` and, if it has images without labels, `unlabelled`."""
        return ("train", "test", *(["unlabelled"] if self.unlabelled else []))

    def split(self, name: str) -> Images:
        """Return a split by its name."""
        images: Images = getattr(self, name)
        return images

    def without(self, indices: Mapping[str, Collection[int]]) -> Dataset:
        """Return the dataset without some images of each split."""
        kept: dict[str, Any] = {split: self.split(split).without(indices.get(split, ())) for split in self.splits}
        return replace(self, **kept)


@dataclass(frozen=True)
class DatasetReference:
    """A dataset that has not been opened yet.

    Attributes:
        module: the Python file that defines it.
        name: its name as a cache states it.
        folder: the folder of its images, if the name on the command line includes one.
    """

    module: ModuleType
    name: str
    folder: Path | None = None


def names() -> list[str]:
    """Return the names of the datasets in this folder."""
    return plugins.names("data.datasets")


def parse(spec: str, data: Path | None = None) -> DatasetReference:
    """Return the dataset that the command line's `--dataset` refers to.

    `spec` is a name, `folder:PATH` (or `folder`, and then `data` is the path), or the path of a Python file.
    """
    kind, _, folder = spec.partition(":")
    module = plugins.load("data.datasets", kind, "load", DatasetError)
    if kind == "folder" and (path := _expand(folder) if folder else data):
        return DatasetReference(module, f"folder:{plugins.plain(path.absolute().name)}", path)
    if folder:
        raise DatasetError(f"{kind} is a dataset of its own and takes no path; use --data {folder}.")
    return DatasetReference(module, plugins.recorded_name("data.datasets", kind))


def _expand(folder: str) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError as problem:  # no such user, or no home folder
        raise DatasetError(f"{folder} cannot be expanded: {problem} Give the full path.") from problem


def stem(name: str) -> str:
    """Return the stem of a dataset's cache and checkpoints: `birds` for `folder:birds`."""
    return name.removeprefix("folder:")


def default_folder(name: str) -> Path:
    """Return where a dataset's images are sought: `data/<name>`, or `NAME` for `folder:NAME` if only that exists."""
    folder, local = Path("data") / stem(name), Path(stem(name))
    return local if name.startswith("folder:") and local.is_dir() and not folder.is_dir() else folder


def open_dataset(
    spec: str, data: Path | None = None, *, download: bool = False, split: HoldOut | None = None
) -> Dataset:
    """Load both splits of a dataset. Its images lie in `data`, else where `spec` says, else in `data/<name>`.

    A `split` with a fraction above 0 holds back test images, of a dataset that has no splits.

    Raises DatasetError: unknown name, missing folder (with where it was looked for and how to get it), unsound files,
    or splits that break the contract of `Images`.
    """
    reference = parse(spec, data)
    module, root = reference.module, data or reference.folder or default_folder(reference.name)
    if download and hasattr(module, "download"):  # without one, `load` says where to get what is missing
        module.download(root)
    if split and split.fraction:
        return _open_unsplit(reference, root, split)
    train, test = (
        _load(partial(module.load, root, name), f"{reference.name}, split {name}") for name in ("train", "test")
    )
    if train.classes != test.classes:
        raise DatasetError(f"{root}: train and test do not have the same classes.")
    return Dataset(reference.name, getattr(module, "LICENSE", ""), train, test)


def _open_unsplit(reference: DatasetReference, root: Path, split: HoldOut) -> Dataset:
    if not hasattr(reference.module, "load_unsplit"):
        raise DatasetError(f"{reference.name} has a test split of its own. Leave out --split.")
    images = _load(partial(reference.module.load_unsplit, root), reference.name)
    licence = getattr(reference.module, "LICENSE", "")
    return Dataset(reference.name, licence, *split_images(images, split, str(root)))


def _load(load: Callable[[], Any], where: str) -> Images:
    try:
        return check_images(load(), where)
    except OSError as problem:
        raise DatasetError(f"{problem.filename or where} cannot be read: {problem.strerror or problem}.") from problem
    except (MemoryError, TspipeError):
        raise
    except (Exception, SystemExit) as problem:
        raise DatasetError(f"{where}: load fails: {type(problem).__name__}: {problem}.") from problem


def check_images(images: Any, where: str) -> Images:
    """Return a split whose `read` checks each image, with classes and keys in Unicode NFC.

    Args:
        images: what a dataset's `load` returned.
        where: the dataset and the split, for messages.

    Raises DatasetError if it breaks the contract of `Images`.
    """
    if not isinstance(images, Images):
        raise DatasetError(f"{where}: load returns {_describe(images)}. Return tspipe.data.datasets.Images.")
    classes, keys = _check_names(where, "classes", images.classes), _check_names(where, "keys", images.keys)
    labels, array = images.labels, cast(Pixels | None, images.array)
    _check_labels(where, labels, len(classes))
    if len(keys) != len(labels):
        raise DatasetError(f"{where}: {len(keys)} keys for {len(labels)} labels. Return one key per image.")
    if array is not None and not (_is_array(array, np.uint8, 4) and array.shape[0] == len(labels)):
        raise DatasetError(
            f"{where}: array is {_describe(array)}. Return a uint8 array of shape ({len(labels)}, H, W, C), or None."
        )

    header = images.check_header
    if header is not None and not callable(header):
        raise DatasetError(f"{where}: check_header is {_describe(header)}. Return a function, or None.")

    def call(function: Callable[[int], Any], name: str, index: int) -> Any:
        try:
            return function(index)
        except (MemoryError, TspipeError):
            raise
        except (Exception, SystemExit) as problem:
            reason = f"{type(problem).__name__}: {problem}"
            raise DatasetError(f"{where}: {name}({index}), {keys[index]!r}, fails: {reason}.") from problem

    def read(index: int) -> Pixels:
        pixels: Pixels = call(images.read if array is None else array.__getitem__, "read", index)
        if not (_is_array(pixels, np.uint8, 3) and pixels.size and pixels.shape[2] in (1, 3)):
            raise DatasetError(
                f"{where}: read({index}) returns {_describe(pixels)}. Return a uint8 array of shape (H, W, C), with "
                "values from 0 to 255 and C 1 or 3."
            )
        return pixels

    if array is not None:
        for index in np.linspace(0, len(labels) - 1, _SAMPLE, dtype=np.int64).tolist():
            if not np.array_equal(call(images.read, "read", index), array[index]):
                raise DatasetError(
                    f"{where}: array[{index}] and read({index}) differ. Return the same pixels, or None as array."
                )
    check_header = header and (lambda index: call(header, "check_header", index))
    return replace(images, classes=classes, keys=keys, read=read, check_header=check_header)


def _check_labels(where: str, labels: Any, classes: int) -> None:
    if not (_is_array(labels, np.int64, 1) and labels.size):
        raise DatasetError(
            f"{where}: labels are {_describe(labels)}. Return an int64 array of shape (N,), N > 0, of indices into the "
            "classes."
        )
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        raise DatasetError(
            f"{where}: label {labels[outside[0]]} of image {outside[0]} is no index into {classes} classes. Return "
            f"labels from 0 to {classes - 1}."
        )


def _check_names(where: str, field: str, names: Any) -> list[str]:
    """Return the keys or the classes in Unicode NFC; raise DatasetError unless they are str, and each occurs once."""
    if isinstance(names, str) or not isinstance(names, Sequence | np.ndarray):
        raise DatasetError(f"{where}: {field} is {_describe(names)}. Return a sequence of str.")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise DatasetError(f"{where}: {field}[{index}] is {name!r}. Return a sequence of str.")
        if "\0" in name or name != name.encode(errors="ignore").decode():  # a cache stores UTF-8, padded with NUL
            raise DatasetError(f"{where}: {field}[{index}] is {name!a}. Return names that are UTF-8, without NUL.")
    normalised = [normalize("NFC", name) for name in names]
    if not normalised:
        raise DatasetError(f"{where}: there are no {field}. Return at least one.")
    name, count = Counter(normalised).most_common(1)[0]
    if count > 1:
        raise DatasetError(f"{where}: {name!r} occurs {count} times in {field}. Return each once.")
    return normalised


def _is_array(value: Any, dtype: type, dimensions: int) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == dimensions


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
