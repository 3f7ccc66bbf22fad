"""The students of the best epoch: which epoch that is, and that it survives an interruption."""

from pathlib import Path

import pytest
import torch
from torch import nn

from shared import interrupted_at
from tspipe.cache import Cache
from tspipe.models import weights
from tspipe.recipes import load
from tspipe.training.arms import TAUGHT
from tspipe.training.best_epoch import BestEpoch
from tspipe.training.config import StudentConfig
from tspipe.training.evaluation import Evaluator
from tspipe.training.run_folder import RunFolder
from tspipe.training.trainer import train_students


def test_the_first_of_equal_epochs_is_kept() -> None:
    network, best = nn.Linear(1, 1, bias=False), BestEpoch()
    for epoch, accuracy in enumerate((0.25, 0.5, 0.5, 0.125), 1):
        with torch.no_grad():
            network.weight.fill_(epoch)
        best.update(network, epoch, accuracy)
    copy = BestEpoch()
    copy.load_state_dict(best.state_dict())
    for one in (best, copy):
        assert (one.epoch, one.accuracy, one.weights["weight"].item()) == (2, 0.5, 2.0)


def run(cache: Cache, out: Path, *settings: str) -> RunFolder:
    """Train for three epochs of two batches each."""
    settings = ("epochs=3", "seeds=1", "batch_size=500", *settings)
    return train_students(StudentConfig(load.load("digits", settings), cache, (TAUGHT,), out=out))


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_it_survives_an_interruption(
    digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float
) -> None:
    """The first epoch is the best on the test split, the second on held-back images."""
    counts = {"test": [90, 80, 70], "train": [10, 30, 20]}

    def count(self: Evaluator, learners: list, images: object, labels: object, rows: object) -> list[int]:
        split = "test" if images is self.data.test else "train"
        return [left[split].pop(0)]

    monkeypatch.setattr(Evaluator, "_correct", count)
    settings = [f"val_fraction={fraction}", "checkpoint_seconds=0"]
    left = {split: list(values) for split, values in counts.items()}
    undisturbed = run(digits, tmp_path / "undisturbed", *settings)
    left = {split: list(values) for split, values in counts.items()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, 6)
        run(digits, tmp_path / "resumed", *settings)
    resumed = run(digits, tmp_path / "resumed", *settings)
    selected, epoch, accuracy = ("validation", "2", 80) if fraction else ("test", "1", 90)
    names = ["student-lenet5-taught-seed0.safetensors", f"student-lenet5-taught-seed0-best-{selected}.safetensors"]
    assert sorted(path.name for path in resumed.path.glob("student-*")) == sorted(names)
    for name in names:
        assert (resumed.path / name).read_bytes() == (undisturbed.path / name).read_bytes()
    last, best = (weights.read(resumed.path / name) for name in names)
    assert last.metadata.items() >= {"epoch": "3", "epochs": "3", "selected": "last"}.items()
    assert best.metadata.items() >= {"epoch": epoch, "epochs": "3", "selected": selected}.items()
    assert float(best.metadata["test_accuracy"]) == accuracy / len(digits.test)
    assert not best.tensors["head.weight"].equal(last.tensors["head.weight"])
