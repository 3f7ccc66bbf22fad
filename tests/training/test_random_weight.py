"""How much random images count for in the loss, and from which epoch on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tspipe.cache import Cache
from tspipe.errors import RecipeError
from tspipe.losses import Target, kd
from tspipe.models.feature_net import FeatureNet
from tspipe.recipes import load
from tspipe.training import learner
from tspipe.training.arms import RANDOM
from tspipe.training.config import StudentConfig
from tspipe.training.learner import StudentWithLoss
from tspipe.training.trainer import train_students


def inputs(count: int) -> tuple[torch.Tensor, Target]:
    return torch.randn(count, 3), Target(torch.randn(count, 4), torch.randn(count, 5), torch.arange(count) % 5)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 3.0])
def test_a_random_image_counts_for_so_many_real_ones(weight: float) -> None:
    torch.manual_seed(0)
    network, loss = FeatureNet(nn.Linear(3, 4), nn.Linear(4, 5)), kd.Loss()
    (real, real_target), (random, random_target) = inputs(6), inputs(4)
    output, terms = StudentWithLoss(network, loss, False, weight)(real, real_target, (random, random_target))
    assert output.logits.shape == (10, 5)
    parts = [loss(network(images), target) for images, target in ((real, real_target), (random, random_target))]
    for name, term in terms.items():
        expected = (6 * parts[0][name] + weight * 4 * parts[1][name]) / (6 + weight * 4)
        torch.testing.assert_close(term, expected)


@pytest.mark.parametrize("weight", [0.0, 0.25])
@pytest.mark.parametrize("counts", [(0, 4), (6, 0), (0, 0)])
def test_one_of_several_processes_may_have_no_images(weight: float, counts: tuple[int, int]) -> None:
    (real, real_target), random = map(inputs, counts)
    network, loss = FeatureNet(nn.Linear(3, 4), nn.Linear(4, 5)), kd.Loss()
    _, terms = StudentWithLoss(network, loss, False, weight)(real, real_target, random)
    sum(terms.values()).backward()
    expected = loss(
        network(torch.cat([real, random[0]])), Target(*map(torch.cat, zip(real_target, random[1], strict=True)))
    )
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], equal_nan=True)


def test_random_images_come_from_an_epoch_on(digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["epochs=2", "batch_size=500", "random_images=5", "random_kind=mixed", "seeds=1"]
    facts = {"preprocess": digits.manifest["preprocess"]}
    counts, step = list[int](), learner.Learner.step

    def counted(self: Any, batch: Any, number: int) -> None:
        counts.append(len(batch.random[0]) if batch.random else 0)
        step(self, batch, number)

    monkeypatch.setattr(learner.Learner, "step", counted)
    recipe = load.load("digits", [*settings, "random_from=2"], facts=facts)
    train_students(StudentConfig(recipe, digits, (RANDOM,), out=tmp_path / "run"))
    assert counts == [0, 0, 5, 5]
    with pytest.raises(RecipeError, match=r"random_from=3 is after the last epoch, 2"):
        load.load("digits", [*settings, "random_from=3"])
    with pytest.raises(RecipeError, match="minstd draws plain uniform images only"):
        load.load("digits", [*settings, "random_generator=minstd"])
