"""A user's images in folders: train/CLASS/… and test/CLASS/…, or CLASS/… to be split."""

import errno
import itertools
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from unicodedata import normalize

import numpy as np

from tspipe.cache.layout import NO_LABEL
from tspipe.data import decode
from tspipe.data.datasets import Images, Pixels
from tspipe.errors import DatasetError
from tspipe.utils.progress import remark_once

SOURCE = "a folder of your own"
LICENSE = "not stated"
CITATION = ""

LAYOUT = "The layout is train/CLASS/IMAGE and test/CLASS/IMAGE."


def load(root: Path, split: str) -> Images:
    """Return images (H, W, 3) uint8 of any size from `root`/train or `root`/test (else `root`/val).

    Classes are the sorted folders in train; an image belongs to the class folder that contains it, at any depth. Images
    are sorted by class, then by path; keys are paths relative to the split's folder. Hidden files are ignored. Files
    that do not end like an image that Pillow decodes, and links to folders of other classes, are left out and counted
    on standard error.

    Raises DatasetError: no folder of that split, no classes, a class of train without images, or one that train does
    not have.
    """
    return _images(root, _split(root, split), _split(root, "train"))


def load_unsplit(root: Path) -> Images:
    """Return the images of a folder CLASS/IMAGE, as `load` does; if `root` holds nothing but train/, those in it.

    Raises DatasetError if there is a test split.
    """
    folders = {entry.name for entry in _subfolders(root)} if root.is_dir() else set()
    if not folders:
        raise DatasetError(f"{root} has no class folders to split. Name the folder that has them with --data FOLDER.")
    if "train" not in folders:
        return _images(root, root, root)
    if others := sorted(folders - {"train"}):
        raise DatasetError(
            f"{root} has {others[0]}/ beside train/. Leave out --split if that is the test split; else give the folder "
            "that has only class folders: --data FOLDER"
        )
    return _images(root, root / "train", root / "train")


def _images(root: Path, folder: Path, train: Path) -> Images:
    """Return the images in `folder`, whose classes are the folders in `train`."""
    number = {name: i for i, name in enumerate(_classes(train))}
    left_out: Counter[str] = Counter()
    files: list[str] = []
    labels: list[int] = []
    class_folders = _classes(folder)
    resolved = {name: (folder / class_folder).resolve() for name, class_folder in class_folders.items()}
    for name, class_folder in class_folders.items():
        if name not in number:
            raise DatasetError(f"{folder / class_folder}: there is no class {name!r} in {train}.")
        class_files, others = _files(folder, class_folder, [path for other, path in resolved.items() if other != name])
        left_out += others
        if not class_files:
            empty = f"{folder / class_folder} holds no images that Pillow decodes{_list(others)}."
            if folder == train:
                raise DatasetError(empty)
            remark_once(empty, empty)
        files += class_files
        labels += [number[name]] * len(class_files)
    if not files:
        raise DatasetError(f"{folder} holds no images that Pillow decodes{_list(left_out)}.")
    stray = sum(decode.has_image_extension(entry.name) for entry in os.scandir(folder) if entry.is_file())
    left_out.update({"image outside the class folders": stray} if stray else {})
    if left_out:
        remark_once(f"left out {folder}", f"{folder}: files are left out{_list(left_out)}.")

    return Images(
        np.array(labels, np.int64),
        [_utf8(file) for file in files],
        list(number),
        lambda i: decode.decode(folder / files[i], str(root)),
        check_header=lambda i: decode.check_header(folder / files[i]),
    )


def load_unlabelled(root: Path, channels: int) -> Images:
    """Return all images below a folder, sorted by path; keys are relative paths, and labels are `NO_LABEL`.

    Args:
        channels: 1 for a dataset of grey images, for which images without colour keep one channel.

    Raises DatasetError: no folder, or no images in it.
    """
    if not root.is_dir():
        raise DatasetError(f"There is no folder {root} of images without labels. Name one that exists: --unlabelled")
    files, left_out = _files(root, ".", [])
    if not files:
        raise DatasetError(f"{root} holds no images that Pillow decodes{_list(left_out)}.")

    def read(index: int) -> Pixels:
        pixels = decode.decode(root / files[index], str(root))
        return pixels[:, :, :1] if channels == 1 and (pixels == pixels[:, :, :1]).all() else pixels

    return Images(
        np.full(len(files), NO_LABEL),
        [normalize("NFC", _utf8(file.removeprefix("./"))) for file in files],
        [],
        read,
        check_header=lambda i: decode.check_header(root / files[i]),
    )


def _split(root: Path, split: str) -> Path:
    folders = [root / "train"] if split == "train" else [root / "test", root / "val"]
    for folder in folders:
        if folder.is_dir():
            return folder
    looked = " and ".join(map(str, folders))
    remedy = "Name it with --data FOLDER."
    classes = sorted(f"{entry.name}/" for entry in _subfolders(root)) if root.is_dir() else []
    if classes and {"test/", "val/"}.isdisjoint(classes):
        names = "train/" if split == "test" else ", ".join(classes[:3])
        remedy = f"Name it with --data FOLDER, or hold back a fifth of the images in {names} for testing: --split 0.2"
    raise DatasetError(f"There is no {split} split in {root}: looked for {looked}. {LAYOUT} {remedy}")


def _subfolders(folder: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]


def _classes(folder: Path) -> dict[str, str]:
    """Return the folder of each class, sorted by the class's name in Unicode NFC."""
    folders = [entry.name for entry in _subfolders(folder)]
    try:
        classes = {normalize("NFC", _utf8(name)): name for name in folders}
    except UnicodeDecodeError:
        raise DatasetError(f"{str(folder)!a} holds a name that is not UTF-8. Rename it.") from None
    if not classes:
        raise DatasetError(f"{folder} has no class folders. {LAYOUT}")
    if len(classes) < len(folders):
        raise DatasetError(f"{folder} has two class folders of one name, in different Unicode forms. Merge them.")
    return dict(sorted(classes.items()))


def _files(folder: Path, class_folder: str, other_classes: Sequence[Path]) -> tuple[list[str], Counter[str]]:
    """Return a class's image files, relative to the split's folder, sorted by Unicode NFC, and the counts of others."""
    files, others = [], Counter[str]()
    for path in _walk(folder / class_folder, other_classes):
        if path.endswith("/"):
            others["link to a folder of other classes"] += 1
        elif decode.has_image_extension(path):
            files.append(f"{class_folder}/{path}")
        else:
            others[PurePath(path).suffix.lower() or "without an extension"] += 1
    try:
        _utf8("\n".join(files))
    except UnicodeDecodeError:
        raise DatasetError(f"{str(folder / class_folder)!a} holds a name that is not UTF-8. Rename it.") from None
    files.sort(key=lambda path: normalize("NFC", path))
    for first, second in itertools.pairwise(files):
        if normalize("NFC", first) == normalize("NFC", second):
            raise DatasetError(f"{folder} has two files {first}, in different Unicode forms. Rename one.")
    return files, others


def _utf8(name: str) -> str:
    """Return a file name as UTF-8, in which keys and classes are stored, whatever the encoding of the locale."""
    return os.fsencode(name).decode("utf-8")


def _walk(folder: Path, other_classes: Sequence[Path]) -> Iterator[str]:
    """Yield the relative paths of the files below a class's folder, with / on every system.

    Each folder is visited once. One that several links lead to has the same path each time: links are followed last, in
    the order of names. Those into another class's folder, or to a folder that contains that of the class, are not
    followed: their paths are yielded with / at the end.
    """
    visited = set()
    folders, links = deque([("", folder.stat())]), deque[tuple[str, os.stat_result]]()
    while folders or links:
        path, status = (folders or links).popleft()
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(f"{folder}/{path}".rstrip("/")), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError as problem:
                if problem.errno != errno.ELOOP:
                    raise
                is_folder = False  # a link to itself is a broken file
            if not is_folder:
                yield path + entry.name
            elif not entry.is_symlink():
                folders.append((f"{path}{entry.name}/", entry.stat()))
            elif _leads_out(Path(entry.path).resolve(), folder.resolve(), other_classes):
                yield f"{path}{entry.name}/"
            else:
                links.append((f"{path}{entry.name}/", entry.stat()))


def _leads_out(target: Path, folder: Path, other_classes: Sequence[Path]) -> bool:
    """Return whether a link's target contains a class's folder, or lies in that of another class than `folder`'s."""
    if target.is_relative_to(folder):
        return False
    return folder.is_relative_to(target) or any(
        target.is_relative_to(other) or other.is_relative_to(target) for other in other_classes
    )


def _list(counts: Counter[str]) -> str:
    """Return `: 3 × .txt, 1 × .heic`; nothing if there are no counts."""
    return ": " + ", ".join(f"{count:,} × {what}" for what, count in counts.most_common()) if counts else ""
