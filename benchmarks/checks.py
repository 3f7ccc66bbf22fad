"""Times the checks of a cache beside a plain read of its bytes: python benchmarks/checks.py FOLDER [GIGABYTES]

Writes a cache of random rows, as wide as CUB-200's, into FOLDER and times, with the file in the page cache: opening,
`find_damage`, a sequential read, and SHA-256 of the bytes, which is the floor of any verification.
"""

import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pets import CLASSES, plan
from tspipe.cache import SPLITS, CacheWriter, Dimensions, open_cache
from tspipe.cache.verify import find_damage
from tspipe.utils.threads import available_cores

WIDTH, REPEATS = 10240, 5


def make(path: Path, gigabytes: float) -> None:
    """Write a cache with about this many GB of features."""
    rows = {"train": int(gigabytes * 2.5e8 / WIDTH), "test": int(gigabytes * 2.5e8 / WIDTH)}
    manifest = plan(rows, width=WIDTH, block_rows=256)
    sizes = Dimensions(rows, WIDTH, 2, "<f2", 256, 4, dict.fromkeys(SPLITS, 12))
    draw = np.random.default_rng(0)
    with CacheWriter(path, manifest, sizes, CLASSES) as writer:
        for split in SPLITS:
            for block in writer.missing(split):
                images = sizes.block(split, block)
                n = len(images)
                columns = {
                    "features": draw.random((n, WIDTH), np.float32),
                    "logits": draw.random((n, 2), np.float32),
                    "labels": draw.integers(0, 2, n),
                    "keys": np.array([f"{i}".encode() for i in images]),
                    "digests": draw.integers(0, 256, (n, 8), np.uint8),
                }
                writer.write_block(split, block, columns)
        writer.finish()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the median and the spread (largest − smallest) of repetitions, after one to warm up."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), max(times) - min(times)


def read(path: Path) -> None:
    buffer = bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def digest(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def main() -> None:
    folder, gigabytes = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 2.0
    path = folder / "bench.h5"
    make(path, gigabytes)
    size = path.stat().st_size
    assert find_damage(path) == []
    print(
        f"{size / 1e9:.2f} GB, {available_cores()} cores, median of {REPEATS} (largest − smallest), the file in memory"
    )
    median, spread = seconds(lambda: open_cache(path))
    print(f"open        {median * 1e3:8.1f} ms ({spread * 1e3:.1f})")
    floor, _ = seconds(lambda: read(path))
    for name, work in (("read", read), ("SHA-256", digest), ("verify", find_damage)):
        median, spread = seconds(lambda work=work: work(path))
        print(
            f"{name:11} {median:8.3f} s  ({spread:.3f})  {size / 1e9 / median:6.2f} GB/s  {median / floor:5.1f} × read"
        )
    path.unlink()


if __name__ == "__main__":
    main()
