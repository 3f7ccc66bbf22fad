"""Times the loading of a batch of cached features, in random order.

    python benchmarks/rows.py cache/cifar10.h5

Rows held in memory are compared with `index_select`, rows read from the file with h5py's indexing.
"""

import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import torch

from tspipe.cache import open_cache
from tspipe.experiments.baselines import as_way
from tspipe.experiments.turns import Timer
from tspipe.training.batches import shuffled_batches
from tspipe.training.targets import TargetLoader, row_labels

BATCH_SIZE, SECONDS = 128, 4


def main(path: Path) -> None:
    cache, device = open_cache(path), torch.device("cpu")
    column, labels, timer = cache.train.features, row_labels(cache), Timer(device, SECONDS)
    order = shuffled_batches(0, 0, len(column), BATCH_SIZE)

    def load(memory: int) -> Iterator[object]:
        targets = TargetLoader({"features": column}, labels, frozenset({"features"}), memory, device)
        return (target for _ in itertools.count() for target in targets.batches(order))

    held = torch.from_numpy(column.load()).float()
    select = ((held.index_select(0, rows), labels.index_select(0, rows)) for rows in itertools.cycle(order))
    compare("held / index_select", timer, load(2**62), select)
    with h5py.File(path, "r", locking=False) as file:
        dataset = file["train_features"]

        def index() -> Iterator[object]:
            for rows in itertools.cycle(order):
                ascending, inverse = rows.unique(return_inverse=True)  # h5py requires ascending indices
                yield torch.from_numpy(dataset[ascending.numpy()]).float()[inverse]

        compare("read / h5py", timer, load(0), index())


def compare(what: str, timer: Timer, ours: Iterator[object], floor: Iterator[object]) -> None:
    times = timer.turns({"ours": as_way(ours), "floor": as_way(floor)})
    ratios = [a / b for a, b in zip(times["ours"], times["floor"], strict=True)]
    medians = (statistics.median(times[way]) * 1e6 for way in ("ours", "floor"))
    print("{}: {:.3g} µs / {:.3g} µs = {:.3g}, n {}".format(what, *medians, statistics.median(ratios), len(ratios)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
