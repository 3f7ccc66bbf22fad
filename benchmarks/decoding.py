"""Times the decoding of images: python benchmarks/decoding.py FOLDER [IMAGES]

FOLDER holds CUB-200-2011, or the synthetic copy that tests/cub200_archive.py writes. Prints images per second of
decoding, resizing to 600×600 and cropping to 448×448 in batches of 10, in random order: in one thread, in threads (as
tspipe does), in worker processes (PyTorch's DataLoader), and from a cache with pixels (`tspipe cache --images`).
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pets import plan
from tspipe.cache import SPLITS, CacheWriter, Dimensions, open_cache
from tspipe.data.datasets import Images, open_dataset
from tspipe.data.image_loader import ImageLoader, open_images, read
from tspipe.data.preprocess import Preprocess
from tspipe.recipes.load import load
from tspipe.utils.threads import available_cores

BATCH, REPEATS = 10, 5
CPU = torch.device("cpu")


class Decoded(Dataset[torch.Tensor]):
    """The images, decoded by PyTorch's worker processes."""

    def __init__(self, images: Images, preprocess: Preprocess):
        self.images, self.preprocess = images, preprocess

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(read(self.images, self.preprocess, index)[1]).permute(2, 0, 1)


def with_pixels(folder: Path, images: Images, preprocess: Preprocess, count: int) -> Path:
    """Write a cache with the pixels of the first `count` images; its other columns are zero."""
    pixels = [read(images, preprocess, i)[1] for i in range(count)]
    rows = dict.fromkeys(SPLITS, count)
    sizes = Dimensions(rows, 4, 2, "<f2", count, 4, dict.fromkeys(SPLITS, 12), image_shape=pixels[0].shape)
    with CacheWriter(folder / "images.h5", plan(rows, width=4, block_rows=count), sizes, ["a", "b"]) as writer:
        columns = {
            "features": np.zeros((count, 4), np.float32),
            "logits": np.zeros((count, 2), np.float32),
            "labels": np.zeros(count, np.int64),
            "keys": np.array([f"{i}".encode() for i in range(count)]),
            "digests": np.zeros((count, 8), np.uint8),
            "images": np.stack(pixels),
        }
        for split in SPLITS:
            writer.write_block(split, 0, columns)
        writer.finish()
    return folder / "images.h5"


def main(root: Path, count: int = 400) -> None:
    """Print the table."""
    preprocess, train = load("cub200").preprocess, open_dataset("cub200", root).train
    with tempfile.TemporaryDirectory() as folder:
        cache = open_cache(with_pixels(Path(folder), train, preprocess, count))
        held, steps = open_images(cache, lambda: None)[0].train, replace(preprocess, resize=None, crop=None)
        order = [torch.randperm(count).split(BATCH) for _ in range(REPEATS + 1)]
        decoded = Decoded(train, preprocess)

        def one_thread(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
            return (torch.stack([decoded[i] for i in batch.tolist()]) for batch in batches)

        sampler: list[list[int]] = []  # refilled for each epoch, so that the workers stay, as in training
        workers = DataLoader(
            decoded, batch_sampler=sampler, num_workers=available_cores(), prefetch_factor=4, persistent_workers=True
        )

        def processes(batches: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
            sampler[:] = [batch.tolist() for batch in batches]
            return workers

        ways: dict[str, Callable[..., Iterable[torch.Tensor]]] = {
            "one thread": one_thread,
            f"{available_cores()} threads": ImageLoader(train, preprocess, "", 0, CPU).batches,
            f"{available_cores()} processes": processes,
            "from the cache": ImageLoader(held, steps, "", 0, CPU).batches,
        }
        print(f"{count} images, median of {REPEATS} (largest - smallest)")
        first = 0.0
        for name, batches in ways.items():
            rates = []
            for batch_order in order:
                start = time.perf_counter()
                assert sum(len(batch) for batch in batches(batch_order)) == count
                rates.append(count / (time.perf_counter() - start))
            median = statistics.median(rates[1:])  # the first warms up
            first = first or median
            spread = max(rates[1:]) - min(rates[1:])
            print(f"{name:<16}{median:8.1f} ({spread:.1f}) images/s {median / first:6.2f} × one thread")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
