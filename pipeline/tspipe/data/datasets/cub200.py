"""CUB-200-2011: 11,788 photographs of 200 species of birds, 5,994 for training and 5,794 for testing."""

from pathlib import Path, PurePosixPath

import numpy as np

from tspipe.data import decode
from tspipe.data.datasets import Images, _archive
from tspipe.errors import DatasetError

SOURCE = "https://data.caltech.edu/records/65de6-vp158"
LICENSE = "not stated"
CITATION = (
    "Wah, C., Branson, S., Welinder, P., Perona, P. and Belongie, S. (2011). "
    "The Caltech-UCSD Birds-200-2011 Dataset. California Institute of Technology, CNS-TR-2011-001."
)

FOLDER = "CUB_200_2011"
ARCHIVE = "CUB_200_2011.tgz"
ARCHIVE_MD5 = "97eceeb196236b17998738112f37df78"

Table = dict[str, tuple[int, str]]  # id -> (line number, value)


def load(root: Path, split: str) -> Images:
    """Return images (H, W, 3) uint8 of many sizes, decoded when read, from `root`/CUB_200_2011 or from `root` itself.

    Class 1 of the published files is label 0. Keys are the paths in images.txt, which gives their order. The few
    grey images become RGB. An archive with fewer images than published is accepted.

    Raises DatasetError: missing, not unpacked, or text files that do not agree (file and line are named).
    """
    instructions = f"Give its folder (--data FOLDER). It is {ARCHIVE} (MD5 {ARCHIVE_MD5}) from {SOURCE}"
    folder = _archive.find("CUB-200-2011", root, [f"{FOLDER}/images.txt", "images.txt"], instructions, ARCHIVE)
    classes = _classes(folder / "classes.txt")
    paths = _paths(folder / "images.txt")
    labels = _choices(folder / "image_class_labels.txt", paths, [str(i + 1) for i in range(len(classes))])
    training = _choices(folder / "train_test_split.txt", paths, ["0", "1"])
    chosen = [image for image in paths if training[image] == (split == "train")]
    if not chosen:
        raise DatasetError(f"{folder / 'train_test_split.txt'} has no image in the {split} split.")
    keys = [paths[image][1] for image in chosen]

    return Images(
        np.array([labels[image] for image in chosen], np.int64),
        keys,
        classes,
        lambda i: decode.decode(folder / "images" / keys[i], str(folder)),
        check_header=lambda i: decode.check_header(folder / "images" / keys[i]),
    )


def _classes(path: Path) -> list[str]:
    table = _table(path)
    for number, (image, (line, _)) in enumerate(table.items(), 1):
        if image != str(number):
            raise DatasetError(f"{path}, line {line}: the class is {image}, not {number}; they count from 1.")
    return [name for _, name in table.values()]


def _paths(path: Path) -> Table:
    table = _table(path)
    lines: dict[str, int] = {}
    for line, name in table.values():
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise DatasetError(f"{path}, line {line}: {name!r} leads out of the images folder.")
        if name in lines:
            raise DatasetError(f"{path}, line {line}: {name!r} is on line {lines[name]} too.")
        lines[name] = line
    return table


def _choices(path: Path, images: Table, choices: list[str]) -> dict[str, int]:
    """Return for every image the index of its value in `choices`."""
    table, index = _table(path), {choice: i for i, choice in enumerate(choices)}
    for image, (line, value) in table.items():
        if image not in images:
            raise DatasetError(f"{path}, line {line}: images.txt has no image {image}.")
        if value not in index:
            raise DatasetError(f"{path}, line {line}: {value!r} is not one of {choices[0]} to {choices[-1]}.")
    for image, (line, _) in images.items():
        if image not in table:
            raise DatasetError(f"{path} has no line for image {image} (images.txt, line {line}).")
    return {image: index[value] for image, (_, value) in table.items()}


def _table(path: Path) -> Table:
    """Read a file of lines `id value`, each id once."""
    table: Table = {}
    try:
        lines = _archive.read(path).decode().splitlines()
    except UnicodeDecodeError as problem:
        raise DatasetError(f"{path} is not text in UTF-8: {problem.reason} at byte {problem.start}.") from problem
    for number, line in enumerate(lines, 1):
        fields = line.split(maxsplit=1)
        if len(fields) != 2:
            raise DatasetError(f"{path}, line {number}: {line!r} is not an id and a value.")
        if fields[0] in table:
            raise DatasetError(f"{path}, line {number}: the id {fields[0]} is on line {table[fields[0]][0]} too.")
        table[fields[0]] = number, fields[1].strip()
    if not table:
        raise DatasetError(f"{path} is empty.")
    return table
