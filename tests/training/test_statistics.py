"""What a cache says of its teacher to a loss, and the losses that use it in a run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tspipe.cache import Cache
from tspipe.errors import CacheMismatch
from tspipe.losses._statistics import TeacherStatistics
from tspipe.models.teacher import load_teacher
from tspipe.recipes import load
from tspipe.training.arms import TAUGHT
from tspipe.training.config import StudentConfig
from tspipe.training.statistics import cache_statistics
from tspipe.training.trainer import train_students


def test_statistics_of_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last class has no rows and the last feature does not vary."""
    draw = np.random.default_rng(0)
    rows, labels = draw.random((11, 4)).astype(np.float16), np.arange(11) % 2
    rows[:, 3] = 0.5
    blocks = [(torch.from_numpy(rows[i : i + 3]), torch.from_numpy(labels[i : i + 3])) for i in (0, 3, 6, 9)]
    statistics = TeacherStatistics(lambda: blocks, lambda: torch.nn.Linear(4, 3), (3, 4))
    exact = rows.astype(np.float64)
    means = [exact[labels == 0].mean(axis=0), exact[labels == 1].mean(axis=0), exact.mean(axis=0)]
    np.testing.assert_allclose(statistics.class_means, means, rtol=1e-6)
    np.testing.assert_allclose(statistics.feature_mean, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(statistics.feature_std, [*exact.std(axis=0)[:3], 1], rtol=1e-6)
    assert statistics.is_nonnegative
    assert torch.equal(statistics.memory.features, torch.from_numpy(rows))
    monkeypatch.setattr("tspipe.losses._statistics._MEMORY_ROWS", 3)
    every_fourth = TeacherStatistics(lambda: blocks, lambda: torch.nn.Linear(4, 3), (3, 4)).memory
    assert torch.equal(every_fourth.features, torch.from_numpy(rows[::4]))
    assert torch.equal(every_fourth.labels, torch.from_numpy(labels[::4]))


def test_simkd_students_have_the_teachers_classifier(digits: Cache, tmp_path: Path) -> None:
    settings = ['loss=["simkd", "srrl", "crd"]', "losses.crd.negatives=50", "epochs=1", "batch_size=200"]
    recipe = load.load("digits", settings, facts={"preprocess": digits.manifest["preprocess"]})
    run = train_students(StudentConfig(recipe, digits, (TAUGHT,), out=tmp_path / "run"))
    student = load_file(run.path / "student-lenet5-taught-simkd-seed0.safetensors")
    head = load_teacher(digits, recipe, (1, 16, 16), torch.device("cpu")).head
    assert torch.equal(student["head.weight"], head.weight)
    assert torch.equal(student["head.bias"], head.bias)


def test_a_classifier_of_other_rows_is_refused(digits: Cache) -> None:
    recipe = load.load("digits", facts={"preprocess": digits.manifest["preprocess"]})
    swapped = replace(digits, train=replace(digits.train, logits=digits.train.logits.load()[::-1].copy()))
    with pytest.raises(CacheMismatch) as refused:
        _ = cache_statistics(swapped, recipe, (1, 16, 16)).classifier
    assert str(refused.value) == (
        "digits.h5: the last layer of its teacher does not map the cached features to the cached logits, so no loss "
        "can use it. Choose another loss than simkd and srrl."
    )
