"""Merges the part files of several processes into one.

Rank 0 writes `NAME.h5.part`; every other rank writes its share of blocks into a `NAME.h5.part-<rank>` beside it,
because writing one file from several machines is not safe on a network disk. These files may come from an earlier,
killed job of any number of processes, so only complete blocks of the same plan with correct checksums are used.
"""

import glob
import time
from pathlib import Path

import numpy as np

from tspipe.cache.checksums import block_checksums
from tspipe.cache.inspect import inspect
from tspipe.cache.manifest import as_plan
from tspipe.cache.write import CacheWriter
from tspipe.errors import NotACache

_PATIENCE = 120.0  # seconds; blocks in files that do not appear by then are computed again


def absorb(writer: CacheWriter, ranks: int = 1) -> None:
    """Copy the blocks of other ranks' part files into rank 0's, and delete these files.

    Invalid files and those of another plan are deleted unused; their rows are computed again. If this job has several
    `ranks`, each has closed its file, which may become visible on this machine some time later.
    """
    beginning = writer.part.name + "-"
    _wait_for([writer.part.with_name(f"{beginning}{rank}") for rank in range(1, ranks)])
    for path in sorted(writer.part.parent.glob(f"{glob.escape(beginning)}*")):
        if path.name.removeprefix(beginning).isdigit():
            _take(writer, path)
            writer.sync()
            path.unlink(missing_ok=True)


def _wait_for(paths: list[Path]) -> None:
    """Wait until files exist: a network disk may show those of another machine a minute late."""
    end = time.monotonic() + _PATIENCE
    while not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(1)


def _take(writer: CacheWriter, path: Path) -> None:
    """Copy the blocks with correct checksums from a part file of the same plan."""
    try:
        structure = inspect(path, finished=False)
    except NotACache:
        return
    if (as_plan(structure.manifest), structure.dimensions) != (writer.plan, writer.dimensions):
        return
    columns, sizes = structure.columns, structure.dimensions
    for split in sizes.sections:
        stored = columns[f"{split}_checksums"].load()
        for block in np.flatnonzero(stored.any(axis=(1, 2))).tolist():
            if stored[block].tobytes() == block_checksums(columns, sizes, split, block):
                images = sizes.block(split, block)
                names = sizes.columns(split)
                rows = {name: columns[f"{split}_{name}"][sizes.column_rows(split, name, images)] for name in names}
                writer.write_block(split, block, rows)
