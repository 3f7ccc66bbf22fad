"""The limit `memory` holds for images and targets, with what is decoded ahead and what loading takes."""

import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tspipe.cache import Cache
from tspipe.data.datasets import Images
from tspipe.data.image_loader import ImageLoader
from tspipe.data.preprocess import Preprocess
from tspipe.training.evaluation import count_correct
from tspipe.training.targets import TargetLoader

SIDE, COUNT, LIMIT, SLACK = 64, 1500, 4_000_000, 400_000  # an image takes 12 KB, all of them 18 MB
CPU = torch.device("cpu")


@contextmanager
def peak() -> Iterator[list[int]]:
    """Append the peak of numpy's and Python's memory within the block, in bytes above what was held before."""
    result: list[int] = []
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    yield result
    result.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()


def images() -> Images:
    def read(i: int) -> np.ndarray:
        return np.full((SIDE, SIDE, 3), i % 256, np.uint8)

    return Images(np.zeros(COUNT, np.int64), [str(i) for i in range(COUNT)], ["a"], read)


def test_images_decoded_ahead_stay_below_the_limit() -> None:
    loader = ImageLoader(images(), Preprocess((0.5,) * 3, (0.5,) * 3), "train", LIMIT, CPU)
    order = [torch.arange(i, i + 100) for i in range(0, COUNT, 100)]
    with peak() as bytes_held:
        for rows, batch in zip(order, loader.batches(order), strict=True):
            assert batch[:, 0, 0, 0].tolist() == [i % 256 for i in rows.tolist()]
    batch_bytes = 100 * 3 * SIDE**2
    assert batch_bytes < bytes_held[0] < LIMIT + SLACK


def test_batches_without_images_are_empty() -> None:
    loader = ImageLoader(images(), Preprocess((0.5,) * 3, (0.5,) * 3), "train", LIMIT, CPU)
    parts = [torch.arange(0), torch.arange(3), torch.arange(0), torch.arange(2), torch.arange(0)]
    assert [tuple(batch.shape) for batch in loader.batches(parts)] == [(len(part), 3, SIDE, SIDE) for part in parts]


@pytest.mark.parametrize("share", [1, 2])
def test_targets_are_loaded_without_a_second_copy(digits: Cache, share: int, tmp_path: Path) -> None:
    """In float32 if that fits, else as stored."""

    class Repeated:
        shape, dtype, nbytes = (40_000, 84), np.dtype(np.float16), 40_000 * 168

        def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
            rows = digits.train.features.load()
            return ((first, rows) for first in range(0, 40_000, 1000))

    columns, limit = {"features": Repeated()}, share * Repeated.nbytes
    with peak() as bytes_held:
        loader = TargetLoader(columns, torch.zeros(40_000, dtype=torch.int64), frozenset({"features"}), limit, CPU)
    assert 0.9 * limit < bytes_held[0] < limit + SLACK
    (target,) = loader.batches([torch.tensor([1001])])
    assert target.features[0].equal(torch.from_numpy(digits.train.features.load()[1]).float())


def test_a_batch_is_released_before_the_networks_run() -> None:
    """Else the next batch is put between the memory of activations, which then no longer fit where they were."""
    made: list[weakref.ref[torch.Tensor]] = []

    def batch(_: int) -> torch.Tensor:
        result = torch.zeros((2, 1, 4, 4), dtype=torch.uint8)
        made.append(weakref.ref(result))
        return result

    def network(images: torch.Tensor) -> torch.Tensor:
        assert made[-1]() is None
        return images.flatten(1)

    labels = [torch.zeros(2, dtype=torch.int64)] * 3
    assert count_correct([network], map(batch, range(3)), labels, Preprocess((0.5,), (0.5,))) == [6]
