"""The targets of stage two: rows of the cache, in memory or read ahead."""

import numpy as np
import pytest
import torch

from tspipe.cache import Cache
from tspipe.training import targets as targets_module
from tspipe.training.targets import TargetLoader


@pytest.mark.parametrize("slow", [True, False])
def test_slow_rows_are_announced_ahead(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first slow batch, each row is announced once, a few batches before it is read."""
    monkeypatch.setattr(targets_module, "READ_AHEAD", 3)
    monkeypatch.setattr(targets_module, "SLOW_ROW", -1 if slow else 1)
    monkeypatch.setattr(targets_module, "GATHER_BYTES", 1)
    events: list[tuple[str, list[int]]] = []

    class Rows:
        shape, nbytes = (1000, 2), 4000

        def advise(self, rows: np.ndarray) -> None:
            events.append(("asked", rows.tolist()))

        def take(self, rows: np.ndarray) -> np.ndarray:
            events.append(("read", rows.tolist()))
            return np.zeros((len(rows), 2), np.float16)

    labels, needs = torch.arange(1000), frozenset({"features"})
    targets = TargetLoader({"features": Rows()}, labels, needs, memory=3999, device=torch.device("cpu"))
    order = list(torch.randperm(1000).split(100))
    result = list(targets.batches(order))
    rows = [batch.tolist() for batch in order]
    assert [batch for what, batch in events if what == "asked"] == (rows[1:] if slow else [])
    assert [batch for what, batch in events if what == "read"] == rows
    for i, batch in enumerate(rows[1:] if slow else [], 1):
        before = events[: events.index(("read", batch))]
        assert len([what for what, _ in before if what == "asked"]) == min(i + 3, 9)
    assert all(torch.equal(target.labels, batch) for target, batch in zip(result, order, strict=True))


@pytest.mark.parametrize("memory", [0, 2**20])
@pytest.mark.parametrize("taken", [1, 3 * 300 * (8 + 4 * 84), 2**20])
@pytest.mark.parametrize("needs", [{"features", "logits"}, {"features"}, set()])
def test_batches_do_not_depend_on_how_many_are_gathered_together(
    digits: Cache, memory: int, taken: int, needs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets_module, "GATHER_BYTES", taken)
    columns, labels = {"features": digits.train.features, "logits": digits.train.logits}, digits.train.labels
    targets = TargetLoader(columns, torch.from_numpy(labels), frozenset(needs), memory, torch.device("cpu"))
    order = list(torch.randperm(1000).split(150))
    result = list(targets.batches(order))
    assert len(result) == len(order)
    for rows, target in zip(order, result, strict=True):
        assert torch.equal(target.labels, torch.from_numpy(labels)[rows])
        for name, part in (("features", target.features), ("logits", target.logits)):
            stored = torch.from_numpy(columns[name].load()).float()[rows]
            assert torch.equal(part, stored if name in needs else torch.empty(len(rows), 0))
    assert list(targets.batches([])) == []
    none, one = targets.batches([torch.empty(0, dtype=torch.int64), torch.arange(1)])
    assert (len(none.labels), len(one.labels)) == (0, 1)
    assert [len(target.labels) for target in targets.batches([torch.empty(0, dtype=torch.int64)] * 2)] == [0, 0]


@pytest.mark.parametrize(("memory", "held"), [(8000, torch.float32), (4000, torch.float16)])
def test_targets_are_held_as_float32_if_they_fit(memory: int, held: torch.dtype) -> None:
    class Rows:
        shape, nbytes, dtype = (1000, 2), 4000, np.dtype(np.float16)

        def pieces(self) -> list[tuple[int, np.ndarray]]:
            return [(first, np.ones((500, 2), np.float16)) for first in (0, 500)]

    targets = TargetLoader(
        {"features": Rows()}, torch.arange(1000), frozenset({"features"}), memory, torch.device("cpu")
    )
    assert targets._held["features"].dtype == held
    (target,) = targets.batches([torch.arange(5)])
    assert target.features.dtype == torch.float32
