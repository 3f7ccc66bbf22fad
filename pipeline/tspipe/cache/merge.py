"""Merges the part files of several processes into one.

Rank 0 writes `NAME.h5.part`; every other rank writes its share of blocks into a `NAME.h5.part-<rank>` beside it,
because writing one file from several machines is not safe on a network disk. These files may come from an earlier,
killed job of any number of processes, so only complete blocks of the same plan with correct checksums are used.
`NAME.h5.part-0` is a part file that was begun with more or fewer images: its blocks of the same images are used.
"""

import glob
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from tspipe.cache.checksums import block_checksums
from tspipe.cache.column import Column
from tspipe.cache.inspect import inspect
from tspipe.cache.manifest import as_plan, without_rows
from tspipe.cache.match import LocalSplit
from tspipe.cache.write import CacheWriter
from tspipe.errors import NotACache

_PATIENCE = 120.0  # seconds; blocks in files that do not appear by then are computed again


def absorb(writer: CacheWriter, ranks: int = 1, local: Callable[[str], LocalSplit] | None = None) -> None:
    """Copy the blocks of other part files into rank 0's, and delete these files.

    Invalid files and those of another plan are deleted unused; their rows are computed again. `local` returns a split's
    local images; with it, blocks of a file with other rows are used if their images are the local ones. If this job has
    several `ranks`, each has closed its file, which may become visible on this machine some time later.
    """
    beginning = writer.part.name + "-"
    _wait_for([writer.part.with_name(f"{beginning}{rank}") for rank in range(1, ranks)])
    for path in sorted(writer.part.parent.glob(f"{glob.escape(beginning)}*")):
        if path.name.removeprefix(beginning).isdigit():
            _take(writer, path, local)
            writer.sync()
            path.unlink(missing_ok=True)


def _wait_for(paths: list[Path]) -> None:
    """Wait until files exist: a network disk may show those of another machine a minute late."""
    end = time.monotonic() + _PATIENCE
    while not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(1)


def _take(writer: CacheWriter, path: Path, local: Callable[[str], LocalSplit] | None) -> None:
    """Copy the blocks with correct checksums from a part file of the same plan, which may have other rows."""
    try:
        structure = inspect(path, finished=False)
    except NotACache:
        return
    columns, sizes = structure.columns, structure.dimensions
    if local is not None:
        sizes = replace(sizes, rows=writer.dimensions.rows, key_bytes=writer.dimensions.key_bytes)
    if without_rows(as_plan(structure.manifest)) != without_rows(writer.plan) or sizes != writer.dimensions:
        return
    sizes = structure.dimensions
    for split in sizes.sections:
        stored = columns[f"{split}_checksums"].load()
        for block in np.flatnonzero(stored.any(axis=(1, 2))).tolist():
            images, names = sizes.block(split, block), sizes.columns(split)
            if images != writer.dimensions.block(split, block):
                continue
            if local and split != "random" and not _same_images(columns, split, images, local(split)):
                continue
            if stored[block].tobytes() == block_checksums(columns, sizes, split, block):
                rows = {name: columns[f"{split}_{name}"][sizes.column_rows(split, name, images)] for name in names}
                writer.write_block(split, block, rows)


def _same_images(columns: Mapping[str, Column], split: str, images: range, local: LocalSplit) -> bool:
    """Return whether these rows have the keys and labels of the local images of the same indices."""
    rows = slice(images.start, images.stop)
    labels = columns.get(f"{split}_labels")  # a split without labels has no such column
    same_labels = labels is None or bool((labels[rows] == local.labels[rows]).all())
    return same_labels and columns[f"{split}_keys"][rows].tolist() == [key.encode() for key in local.keys[rows]]
