"""The live teacher runs ahead of the students, with the same results as in turn."""

import threading

import pytest
import torch
from torch import Tensor, nn

from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import make
from tspipe.models.feature_net import FeatureNet
from tspipe.training.live_teacher import LiveTeacher
from tspipe.training.random_source import LiveSpec, RandomSpec

SHAPE = (3, 8, 8)
GREY = Preprocess((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Backbone(nn.Module):
    """Returns channel means; sets an event at each call."""

    def __init__(self, *, draws: bool = False):
        super().__init__()
        self.draws, self.calls, self.called = draws, 0, [threading.Event() for _ in range(20)]

    def forward(self, images: Tensor) -> Tensor:
        self.called[self.calls].set()
        self.calls += 1
        features = images.mean((2, 3))
        return nn.functional.dropout(features, 0.5, training=True) if self.draws else features


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one core more than PyTorch uses."""
    monkeypatch.setattr("tspipe.training.live_teacher.available_cores", lambda: torch.get_num_threads() + 1)


def live(backbone: Backbone) -> LiveTeacher:
    torch.manual_seed(0)
    spec = RandomSpec(5, SHAPE, 10, GREY, torch.device("cpu"))
    return LiveTeacher(FeatureNet(backbone, nn.Linear(3, 4)), spec, LiveSpec(lambda seed: make("uniform", SHAPE), 4))


def test_the_teacher_runs_one_batch_ahead() -> None:
    backbone = Backbone()
    teacher = live(backbone)
    before = backbone.calls
    batches = teacher.batches(0, 0, range(3))
    next(batches)
    assert backbone.called[before + 1].wait(60), "the second batch, which nobody has asked for yet"
    assert len(list(batches)) == 2
    assert backbone.calls == before + 3


def test_the_teacher_waits_its_turn_if_no_core_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tspipe.training.live_teacher.available_cores", torch.get_num_threads)
    backbone = Backbone()
    teacher = live(backbone)
    before = backbone.calls
    batches = teacher.batches(0, 0, range(3))
    next(batches)
    assert not backbone.called[before + 1].wait(0.2)
    assert len(list(batches)) == 2


def test_running_ahead_does_not_change_the_output() -> None:
    for backbone in (Backbone(), Backbone(draws=True)):
        teacher, result = live(backbone), []
        for images, output, _ in teacher.batches(7, 2, range(4, 7)):
            torch.rand(1000)  # the students draw too
            result.append((images, *output))
        for number, tensors in zip(range(4, 7), result, strict=True):
            images, output, _ = teacher.batch(7, 2, number)
            assert images.shape == (5, *SHAPE)
            assert all(torch.equal(a, b) for a, b in zip(tensors, (images, *output), strict=True))
        assert not torch.equal(result[0][1], result[1][1])


def test_its_output_can_be_used_in_a_loss() -> None:
    _, output, _ = live(Backbone()).batch(0, 0, 0)
    student = torch.ones(5, 3, requires_grad=True)
    (student * output.features).sum().backward()  # refused of tensors that inference mode made
    assert torch.equal(student.grad, output.features)


def test_no_batches() -> None:
    assert list(live(Backbone()).batches(0, 0, range(0))) == []
