"""Reads targets larger than memory: python benchmarks/large.py FOLDER [ROWS [WIDTH]]

Writes a cache of random rows into FOLDER (1.2 million of 2,048: 4.9 GB), drops it from the page cache, and reads an
epoch of its targets in random batches with 256 MiB of memory allowed. Prints rows per second, with and without
prefetching by the system, and the peak of resident memory.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pets import CLASSES, plan
from tspipe.cache import SPLITS, CacheWriter, Column, Dimensions, open_cache
from tspipe.training import targets
from tspipe.training.batches import shuffled_batches

BOUND, BATCH, BLOCK, MOST = 2**28, 128, 4096, 2000


def make(path: Path, count: int, width: int) -> None:
    rows = {"train": count, "test": BLOCK}
    sizes = Dimensions(rows, width, 2, "<f2", BLOCK, 4, dict.fromkeys(SPLITS, 12))
    draw = np.random.default_rng(0)
    with CacheWriter(path, plan(rows, width=width, block_rows=BLOCK), sizes, CLASSES) as writer:
        for split in SPLITS:
            for block in writer.missing(split):
                images = sizes.block(split, block)
                columns = {
                    "features": draw.random((len(images), width), np.float32),
                    "logits": draw.random((len(images), 2), np.float32),
                    "labels": draw.integers(0, 2, len(images)),
                    "keys": np.array([f"{i}".encode() for i in images]),
                    "digests": draw.integers(0, 256, (len(images), 8), np.uint8),
                }
                writer.write_block(split, block, columns)
        writer.finish()


def read(path: Path, batches: int) -> None:
    """Read this many batches, or an epoch if 0, and print the rate and the peak memory of this process."""
    cache = open_cache(path)
    before = resident()
    needs = frozenset({"features", "labels"})
    columns = {"features": cache.train.features}
    loader = targets.TargetLoader(columns, torch.from_numpy(cache.train.labels), needs, BOUND, torch.device("cpu"))
    order = shuffled_batches(0, 0, len(cache.train), BATCH)[: batches or None]
    start, rows = time.perf_counter(), 0
    for target in loader.batches(order):
        rows += len(target.features)
    seconds = time.perf_counter() - start
    peak = resident()
    print(
        f"{rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f}/s; {(peak - before) / 1024:.0f} MiB more resident "
        f"than after opening ({before / 1024:.0f} MiB)"
    )


def resident() -> int:
    """Return the peak of this process's resident memory in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def drop_from_page_cache(path: Path) -> None:
    """Drop the file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main() -> None:
    folder, count, width = Path(sys.argv[1]), *map(int, [*sys.argv[2:], *("1200000", "2048")[len(sys.argv) - 2 :]])
    path = folder / f"large-{count}-{width}.h5"
    if not path.exists():
        start = time.perf_counter()
        make(path, count, width)
        print(f"{path.stat().st_size / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s")
    print(f"An epoch of {count:,} × {width} float16, batches of {BATCH}, {BOUND / 2**20:.0f} MiB allowed")
    for ahead, batches in ((0, MOST // 10), (targets.READ_AHEAD, MOST), (targets.READ_AHEAD, 0)):
        drop_from_page_cache(path)
        print(f"prefetching {ahead} batches ahead, {batches or 'all'} batches: ", end="", flush=True)
        subprocess.run([sys.executable, __file__, "read", path, str(ahead), str(batches)], check=True)


if __name__ == "__main__":
    if sys.argv[1] == "read":
        targets.READ_AHEAD = int(sys.argv[3])
        if not targets.READ_AHEAD:
            Column.advise = lambda self, rows: None  # type: ignore[method-assign]
        read(Path(sys.argv[2]), int(sys.argv[4]))
    else:
        main()
