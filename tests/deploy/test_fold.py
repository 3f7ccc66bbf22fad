"""Folding a student: the same logits with fewer weights."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import tspipe
from tspipe.deploy.facts import StudentFacts
from tspipe.deploy.fold import fold, merge
from tspipe.deploy.student import Student
from tspipe.models import networks
from tspipe.models.feature_net import student_of
from tspipe.models.loading import count_parameters
from tspipe.models.probe import probe_images

WIDTH, CLASSES, SHAPE = 500, 5, (3, 32, 32)


def untrained(name: str) -> Student:
    """Return a student with random weights, and batch norms with non-trivial statistics."""
    torch.manual_seed(0)
    network = student_of(networks.build(name, CLASSES, SHAPE), name, WIDTH, CLASSES, probe_images(SHAPE)).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 2)
    facts = StudentFacts.model_construct(input_shape=SHAPE, classes=list("abcde"))
    return Student(network, facts, Path(f"student-{name}.safetensors")).eval()


@pytest.mark.parametrize(("name", "native"), [("resnet20", 64), ("alexnet", 4096)])
def test_a_folded_student_computes_the_same_with_fewer_weights(name: str, native: int) -> None:
    student, images = untrained(name), torch.rand(4, *SHAPE)
    folded = fold(student.train())
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    student.eval()
    with torch.no_grad():
        expected = student(images)
        assert (folded(images) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in student.modules()) is (name != "alexnet")
    saved = (native + 1) * WIDTH + (WIDTH + 1) * CLASSES - (native + 1) * CLASSES
    norms = [layer for layer in student.modules() if isinstance(layer, nn.BatchNorm2d)]
    # A folded batch norm's weight disappears; its bias becomes that of a convolution that had none.
    assert count_parameters(folded) == count_parameters(student) - saved - sum(norm.num_features for norm in norms)


def test_a_trained_student_predicts_the_same_when_folded(student_file: Path) -> None:
    student, images = tspipe.load_student(student_file), torch.randn(64, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fold(student)(images), student(images), rtol=1e-4, atol=1e-4)


def test_weights_are_merged_in_double_precision() -> None:
    first, second = nn.Linear(3, 20_000), nn.Linear(20_000, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    exact = x @ first.weight.double().T + first.bias.double()
    exact = exact @ second.weight.double().T + second.bias.double()
    assert (merge(first, second).double()(x) - exact).abs().max() < 1e-6


def test_a_student_that_folding_changes_is_refused() -> None:
    student = untrained("resnet20")
    student.network.head.bias.data[0] = math.nan
    with pytest.raises(
        tspipe.NetworkError, match=r"Folding changes the logits of student-resnet20\.safetensors by nan"
    ):
        fold(student)
