"""Published archives of datasets: locating, checking against published checksums, and downloading."""

import gzip
import hashlib
import io
import shlex
import zlib
from collections.abc import Iterable
from pathlib import Path

from tspipe.errors import DatasetError
from tspipe.utils.reading import read_file

_LARGEST = 256 << 20  # no published file is larger, so a .gz that would be is not unpacked to its end
FETCH = "Give its folder (--data FOLDER) or fetch it (--download)."


def find(title: str, root: Path, files: Iterable[str], instructions: str, archive: str = "") -> Path:
    """Return the folder of the first of `files` (paths relative to `root`) that exists.

    Args:
        title: the dataset's name in prose.
        instructions: the sentence that says how to get the dataset.
        archive: the published tar.gz; if `root` contains only that, the error says how to unpack it.

    Raises DatasetError: none of them exists.
    """
    files = list(files)
    for file in files:
        if (root / file).exists():
            return (root / file).parent
    if archive and (root / archive).exists():
        # Not unpacked here: a user may not want another gigabyte on this disk.
        command = f"tar -xzf {shlex.quote(str(root / archive))} -C {shlex.quote(str(root))}"
        raise DatasetError(f"{root / archive} is not unpacked. Unpack it: {command}")
    raise DatasetError(f"There is no {title} in {root}: looked for {', '.join(files)}. {instructions}")


def read(path: Path, md5: str | None = None) -> bytes:
    """Return the bytes of a file, or those that a .gz contains.

    Raises DatasetError if it cannot be read, or if its MD5 is not `md5`. Publishers state MD5; it suffices, since a
    forgery needs a second preimage, not a collision.
    """
    try:
        data = read_file(path)
        data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(_LARGEST) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as problem:
        raise DatasetError(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}.") from problem
    if md5 and (actual_md5 := hashlib.md5(data).hexdigest()) != md5:
        raise DatasetError(
            f"{path} is not the published file: its MD5 is {actual_md5}, that of the published one {md5}. "
            "Remove it and fetch it again (--download)."
        )
    return data


def fetch(title: str, name: str, root: Path) -> None:
    """Download torchvision's dataset `name` into `root`, in the published layout; existing files are kept.

    Raises DatasetError: no network, no space, or not the published files.
    """
    from torchvision import datasets

    try:
        getattr(datasets, name)(str(root), download=True)
    except (OSError, RuntimeError) as problem:
        raise DatasetError(f"{title} could not be fetched into {root}: {problem}") from problem
