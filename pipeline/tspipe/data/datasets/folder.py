"""A user's images in folders: train/CLASS/… and test/CLASS/…"""

from collections.abc import Iterator
from os import scandir
from pathlib import Path, PurePath

import numpy as np

from tspipe.data.datasets import Images, Pixels
from tspipe.data.decode import decode
from tspipe.errors import DatasetError

SOURCE = "a folder of your own"
LICENSE = "not stated"
CITATION = ""

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"}
LAYOUT = "The layout is train/CLASS/IMAGE and test/CLASS/IMAGE."


def load(root: Path, split: str) -> Images:
    """Return images (H, W, 3) uint8 of any size from `root`/train or `root`/test (else `root`/val).

    Classes are the sorted folders in train; an image belongs to the class folder that contains it, at any depth. Images
    are sorted by class, then by path; keys are paths relative to the split's folder. Hidden files and files with other
    extensions than `EXTENSIONS` are ignored.

    Raises DatasetError: no folder of that split, no classes, a class without images, or one that train does not have.
    """
    train, folder = _split(root, "train"), _split(root, split)
    classes = _classes(train)
    number = {name: i for i, name in enumerate(classes)}
    keys: list[str] = []
    labels: list[int] = []
    for name in _classes(folder):
        if name not in number:
            raise DatasetError(f"{folder / name}: there is no class {name!r} in {train}.")
        class_keys = _keys(folder, name)
        if not class_keys:
            known = ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
            raise DatasetError(f"{folder / name} holds no images. These are looked for: {known}.")
        keys += class_keys
        labels += [number[name]] * len(class_keys)

    def read(i: int) -> Pixels:
        return decode(folder / keys[i])

    return Images(np.array(labels, np.int64), keys, classes, read)


def _split(root: Path, split: str) -> Path:
    folders = [root / "train"] if split == "train" else [root / "test", root / "val"]
    for folder in folders:
        if folder.is_dir():
            return folder
    looked = " and ".join(map(str, folders))
    raise DatasetError(
        f"There is no {split} split in {root}: looked for {looked}. {LAYOUT} Name it with --data FOLDER."
    )


def _classes(folder: Path) -> list[str]:
    try:
        classes = sorted(entry.name for entry in scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as problem:
        raise DatasetError(f"{folder} cannot be read: {problem.strerror}.") from problem
    if not classes:
        raise DatasetError(f"{folder} has no class folders. {LAYOUT}")
    return classes


def _keys(folder: Path, name: str) -> list[str]:
    """Return the images of a class as sorted paths relative to the split's folder."""
    try:
        keys = sorted(f"{name}/{path}" for path in _walk(folder / name))
        "\n".join(keys).encode()  # keys are stored as UTF-8
    except OSError as problem:
        raise DatasetError(f"{problem.filename} cannot be read: {problem.strerror}.") from problem
    except UnicodeEncodeError:
        raise DatasetError(f"{str(folder / name)!a} holds a name that is not UTF-8. Rename it.") from None
    return keys


def _walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Yield the relative paths of the images below a folder, in no order, with / on every system."""
    real = folder.resolve()
    if real in above:
        return  # a link to a folder that contains it would never end
    for entry in scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from (f"{entry.name}/{path}" for path in _walk(folder / entry.name, above | {real}))
        elif PurePath(entry.name).suffix.lower() in EXTENSIONS:
            yield entry.name
