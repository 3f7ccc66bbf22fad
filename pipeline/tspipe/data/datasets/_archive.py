"""Datasets as their publishers pack them: found in a folder, checked against the published checksums, fetched."""

import hashlib
import shlex
from collections.abc import Iterable
from pathlib import Path

from tspipe.errors import DatasetError

FETCH = "Give its folder (--data FOLDER) or fetch it (--download)."


def find(title: str, root: Path, files: Iterable[str], how: str, archive: str = "") -> Path:
    """The folder of the first of `files` (paths relative to `root`) that exists.

    Args:
        title: the dataset's name in prose.
        how: the sentence that says how to get the dataset.
        archive: the published tar.gz; where only that lies in `root`, the error says how to unpack it.

    Raises DatasetError: none of them exists.
    """
    files = list(files)
    for file in files:
        if (root / file).exists():
            return (root / file).parent
    if archive and (root / archive).exists():
        # Left to tar: a gigabyte unpacked without being asked for is no favour.
        command = f"tar -xzf {shlex.quote(str(root / archive))} -C {shlex.quote(str(root))}"
        raise DatasetError(f"{root / archive} is not unpacked. Unpack it: {command}")
    raise DatasetError(f"There is no {title} in {root}: looked for {', '.join(files)}. {how}")


def read(path: Path) -> bytes:
    """A file's bytes. Raises DatasetError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as problem:
        raise DatasetError(f"{path} cannot be read: {problem.strerror}.") from problem


def check(path: Path, data: bytes, md5: str) -> bytes:
    """`data`, read from `path`, if its MD5 is `md5`; else raises DatasetError.

    MD5 is what the publishers state. It is enough here: a forgery needs a second preimage, not a collision.
    """
    found = hashlib.md5(data).hexdigest()
    if found != md5:
        raise DatasetError(
            f"{path} is not the published file: its MD5 is {found}, that of the published one {md5}. "
            "Remove it and fetch it again (--download)."
        )
    return data


def fetch(title: str, name: str, root: Path) -> None:
    """Have torchvision fetch its dataset `name` into `root`, in the published layout; what is there is kept.

    Raises DatasetError: no network, no space, or not the published files.
    """
    from torchvision import datasets

    try:
        getattr(datasets, name)(str(root), download=True)
    except (OSError, RuntimeError) as problem:
        raise DatasetError(f"{title} could not be fetched into {root}: {problem}") from problem
