"""Optimisers and schedules, against their definitions."""

import math
import sys

import pytest
import torch
from torch import nn

from tspipe import losses
from tspipe.errors import RecipeError
from tspipe.models import networks
from tspipe.models.output import Output
from tspipe.recipes import load
from tspipe.recipes.schema import Optimisation
from tspipe.training.optimizers import learning_rate, make_optimizer, set_batch_norm_momentum


def rates(**settings: object) -> list[float]:
    stated = Optimisation(lr=1, **settings)
    return [learning_rate(stated, epoch) for epoch in range(stated.epochs)]


def test_the_cosine_falls_from_lr_to_almost_nothing() -> None:
    assert rates(epochs=4, schedule="cosine") == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0.146447], abs=1e-6)


def test_the_warm_up_rises_to_lr_and_the_schedule_follows() -> None:
    assert rates(epochs=4, schedule="cosine", warmup_epochs=2) == pytest.approx([1 / 3, 2 / 3, 1, 0.5])
    assert rates(epochs=5, warmup_epochs=1, lr_milestones=[3]) == pytest.approx([0.5, 1, 1, 0.1, 0.1])
    assert rates(epochs=2, schedule="cosine", warmup_epochs=3) == pytest.approx([0.25, 0.5])
    assert learning_rate(Optimisation(epochs=2, schedule="cosine", warmup_epochs=2), 5) == 0


def test_weight_decay_of_adamw_is_decoupled_from_the_gradient() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(Optimisation(optimizer="adamw", lr=0.5, weight_decay=0.1), [weight], torch.device("cpu"))
    weight.grad = torch.zeros(1)
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.5 * 0.1)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_steps_are_those_of_pytorch_without_its_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    theirs = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]([weights[0]], lr=0.1, fused=True)
    for _ in range(3):
        weights[0].grad = weights[0].detach() ** 2
        theirs.step()
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # an import of it fails
    settings = Optimisation(optimizer=name, lr=0.1, momentum=0, weight_decay=0)
    ours = make_optimizer(settings, [weights[1]], torch.device("cpu"))
    for _ in range(3):
        ours.zero_grad()
        weights[1].grad = weights[1].detach() ** 2
        ours.step()
    assert torch.equal(*weights)
    assert ours.state_dict()["param_groups"]


def test_batch_norms_keep_their_momentum_unless_the_recipe_states_one() -> None:
    network = networks.build("torchvision:mobilenet_v3_small", 2, (3, 32, 32))
    for stated, expected in ((None, 0.01), (0.1, 0.1)):
        set_batch_norm_momentum(network, Optimisation(batch_norm_momentum=stated))
        assert {module.momentum for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {expected}


def test_label_smoothing_of_the_student_alone() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    target = losses.Target(torch.empty(1, 0), torch.empty(1, 0), torch.tensor([0]))
    options = load.load("digits", ["label_smoothing=0.2"]).loss_options("xent")
    loss = losses.build("xent", losses.Sizes(5, 4, 5), options).module(Output(torch.empty(1, 5), logits), target)[
        "xent"
    ]
    constant = math.log(math.exp(2) + 3)
    assert loss.item() == pytest.approx(0.85 * (constant - 2) + 0.15 * constant)
    with pytest.raises(RecipeError, match="label_smoothing=2: it is from 0 to below 1"):
        losses.build("xent", losses.Sizes(5, 4, 5), {"label_smoothing": 2})
