"""The part files of several processes as one.

Rank 0 writes `NAME.h5.part`; every other rank writes the blocks of its share into a `NAME.h5.part-<rank>` beside it,
since one file written from several machines is not safe on a network disk. They may be of an earlier job, killed,
of more processes or fewer; so nothing is taken from them but whole blocks of the same plan whose checksums are right.
"""

import glob
import time
from pathlib import Path

import numpy as np

from tspipe.cache.inspect import inspect
from tspipe.cache.layout import as_plan
from tspipe.cache.read import Column
from tspipe.cache.write import CacheWriter, block_checksums
from tspipe.errors import NotACache

_PATIENCE = 120.0  # seconds; what is not there by then is computed again by the next start


def absorb(writer: CacheWriter, ranks: int = 1) -> None:
    """Take into rank 0's part file the blocks that other ranks' part files hold, and delete these files.

    Files of another plan, and those that are not sound, are deleted unused: their rows are computed again. Where this
    job has several `ranks`, each has closed its file, which may be seen here only some time later.
    """
    beginning = writer.part.name + "-"
    _wait_for([writer.part.with_name(f"{beginning}{rank}") for rank in range(1, ranks)])
    for path in sorted(writer.part.parent.glob(f"{glob.escape(beginning)}*")):
        rank, _, rest = path.name.removeprefix(beginning).partition(".")
        if rank.isdigit() and rest in ("", "skeleton"):
            if not rest:
                _take(writer, path)
                writer.sync()
            path.unlink(missing_ok=True)


def _wait_for(paths: list[Path]) -> None:
    """Wait until files are there: a network disk shows those of another machine up to a minute late."""
    end = time.monotonic() + _PATIENCE
    while not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(1)


def _take(writer: CacheWriter, path: Path) -> None:
    """Copy the blocks with right checksums out of a part file of the same plan."""
    try:
        found = inspect(path, finished=False)
    except NotACache:
        return
    if (as_plan(found.manifest), found.dimensions) != (writer.plan, writer.dimensions):
        return
    columns = {name: Column(path, region) for name, region in found.regions.items()}
    for split in found.dimensions.sections:
        stored = columns[f"{split}_checksums"].load()
        for block in np.flatnonzero(stored.any(axis=(1, 2))).tolist():
            if stored[block].tobytes() == block_checksums(columns, found.dimensions, split, block):
                images = found.dimensions.block(split, block)
                rows = {
                    name: columns[f"{split}_{name}"][found.dimensions.column_rows(split, name, images)]
                    for name in found.dimensions.columns(split)
                }
                writer.write_block(split, block, rows)
