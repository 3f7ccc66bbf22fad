"""What a cache says of its teacher to a loss, and the losses that use it in a run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tspipe.cache import Cache
from tspipe.errors import CacheMismatch, RecipeError
from tspipe.losses._statistics import TeacherStatistics
from tspipe.models.teacher import load_teacher
from tspipe.recipes import load
from tspipe.training.arms import TAUGHT, LearnerSpec
from tspipe.training.config import StudentConfig
from tspipe.training.learner import Learner, TaskShape
from tspipe.training.statistics import cache_statistics
from tspipe.training.targets import row_labels
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


NO_BIAS = """
from torch import nn
def build(num_classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Linear(8, num_classes, bias=False))
"""


def test_classifiers_without_a_bias(tmp_path: Path) -> None:
    """A teacher's becomes one with a bias of 0; a student's own is counted as it is, and takes none with a bias."""
    (tmp_path / "mine.py").write_text(NO_BIAS)
    student_file = str(tmp_path / "mine.py")

    def build(student: str, *settings: str, bias: bool) -> Learner:
        blocks = [(torch.rand(4, 8), torch.arange(4) % 2)]
        statistics = TeacherStatistics(lambda: blocks, lambda: torch.nn.Linear(8, 2, bias=bias), (2, 8))
        spec, shape = LearnerSpec(student, TAUGHT, "simkd", 0), TaskShape(8, 2, (1, 16, 16), statistics)
        return Learner(spec, load.load("digits", settings), shape, torch.device("cpu"))

    assert torch.equal(build("lenet5", bias=False).network.head.bias, torch.zeros(2))
    assert build(student_file, "match=linear", bias=False).parameter_counts == (257 * 8 + 16, 257 * 8 + 16)
    with pytest.raises(RecipeError, match=r"gives the student a classifier with a bias, and that of .* has none\."):
        build(student_file, "match=linear", bias=True)


def test_a_classifier_of_other_rows_is_refused(digits: Cache) -> None:
    recipe = load.load("digits", facts={"preprocess": digits.manifest["preprocess"]})
    swapped = replace(digits, train=replace(digits.train, logits=digits.train.logits.load()[::-1].copy()))
    with pytest.raises(CacheMismatch) as refused:
        _ = cache_statistics(swapped, row_labels(swapped), recipe, (1, 16, 16)).classifier
    assert str(refused.value) == (
        "digits.h5: the last layer of its teacher does not map the cached features to the cached logits, so no loss "
        "can use it. Choose another loss than simkd and srrl."
    )
