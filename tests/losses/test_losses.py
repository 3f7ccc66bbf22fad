"""Every loss keeps the contract; `ts` is Equations 5 and 6."""

import math

import pytest
import torch

from tspipe import losses
from tspipe.errors import RecipeError
from tspipe.losses import Output, Target
from tspipe.losses.ts import ts_loss


def batch(n: int = 6, d: int = 5, c: int = 3) -> tuple[Output, Target]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    output = Output(draw(n, d).requires_grad_(), draw(n, c).requires_grad_())
    return output, Target(draw(n, d), draw(n, c), torch.randint(c, (n,), generator=generator))


@pytest.mark.parametrize("name", losses.names())
def test_contract(name: str) -> None:
    loss = losses.build(name, {})
    assert loss.needs <= {"features", "logits", "labels"}
    output, target = batch()
    terms = loss(output, target)
    assert terms
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert any(part.grad is not None and part.grad.abs().sum() > 0 for part in output)


@pytest.mark.parametrize("name", losses.names())
def test_what_a_loss_does_not_need_it_does_not_read(name: str) -> None:
    loss = losses.build(name, {})
    output, target = batch()
    nothing = torch.empty(6, 0)
    bare = Target(*(v if field in loss.needs else nothing for field, v in target._asdict().items()))
    assert {k: v.item() for k, v in loss(output, bare).items()} == {
        k: v.item() for k, v in loss(output, target).items()
    }


def test_ts_is_the_papers_sums() -> None:
    output, target = batch()
    (m, d), c = output.features.shape, output.logits.shape[1]
    g, f, z = output.features.tolist(), target.features.tolist(), output.logits.tolist()
    mse = sum((g[i][j] - f[i][j]) ** 2 for i in range(m) for j in range(d)) / (m * d)
    xent = 0.0
    for i, y in enumerate(target.labels.tolist()):
        xent += (math.log(sum(math.exp(z[i][k]) for k in range(c))) - z[i][y]) / m
    terms = ts_loss(*output, target.features, target.labels, mse_weight=2.0, xent_weight=0.5)
    assert terms["mse"].item() == pytest.approx(2 * mse, abs=1e-12)
    assert terms["xent"].item() == pytest.approx(0.5 * xent, abs=1e-12)


def test_the_gradient_of_ts_is_the_derivative() -> None:
    output, target = batch()
    assert torch.autograd.gradcheck(
        lambda g, z: sum(ts_loss(g, z, target.features, target.labels, 1.5, 0.5).values()), tuple(output)
    )


def test_options_go_to_the_losses_that_name_them() -> None:
    assert losses.build("ts", {"mse_weight": 3.0, "epochs": 5}).mse_weight == 3.0
    losses.build("xent", {"mse_weight": 3.0})


def test_an_unknown_loss() -> None:
    with pytest.raises(RecipeError) as refused:
        losses.build("xnet", {})
    assert str(refused.value) == "Unknown loss 'xnet'. There are: xent, ts."
