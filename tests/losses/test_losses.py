"""Every loss keeps the contract; `ts` is Equations 5 and 6, `kd` and `vid` are what their papers say."""

import math

import numpy as np
import pytest
import torch

from tspipe import losses
from tspipe.errors import RecipeError
from tspipe.losses import Target
from tspipe.losses.kd import kd_loss
from tspipe.losses.ts import ts_loss
from tspipe.models.output import Output


def batch(n: int = 6, d: int = 5, c: int = 3) -> tuple[Output, Target]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    output = Output(draw(n, d).requires_grad_(), draw(n, c).requires_grad_())
    return output, Target(draw(n, d), draw(n, c), torch.randint(c, (n,), generator=generator))


@pytest.mark.parametrize("name", losses.names())
def test_contract(name: str) -> None:
    loss = losses.build(name, {"width": 5}).double()
    assert loss.needs <= {"features", "logits", "labels"}
    output, target = batch()
    terms = loss(output, target)
    assert terms
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert any(part.grad is not None and part.grad.abs().sum() > 0 for part in output)


@pytest.mark.parametrize("name", losses.names())
def test_what_a_loss_does_not_need_it_does_not_read(name: str) -> None:
    loss = losses.build(name, {"width": 5}).double()
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


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("temperature", "alpha"), [(4.0, 0.9), (1.0, 0.5), (2.0, 0.0), (3.0, 1.0)])
def test_kd_is_hintons(temperature: float, alpha: float) -> None:
    """With its gradient, which for the first term is α·T·(p − q) / m."""
    output, target = batch()
    terms = kd_loss(output.logits, target.logits, target.labels, temperature, alpha)
    (kl, xent), m = terms.values(), len(target.labels)
    z, t, right = output.logits.detach().numpy(), target.logits.numpy(), np.eye(3)[target.labels]
    student, teacher = softmax(z / temperature), softmax(t / temperature)
    assert list(terms) == ["kl", "xent"]
    assert kl.item() == pytest.approx(alpha * temperature**2 * (teacher * np.log(teacher / student)).sum() / m, 1e-12)
    assert xent.item() == pytest.approx(-(1 - alpha) * (right * np.log(softmax(z))).sum() / m, 1e-12)
    (kl + xent).backward()
    expected = alpha * temperature * (student - teacher) / m + (1 - alpha) * (softmax(z) - right) / m
    np.testing.assert_allclose(output.logits.grad, expected, rtol=1e-10, atol=1e-14)


def test_vid_is_ahns() -> None:
    """With the gradients of the student's features, of the regressor and of the variances."""
    output, target = batch()
    loss = losses.build("vid", {"width": 5}).double()
    assert loss.alpha.detach().exp().log1p().add(1e-5).numpy() == pytest.approx(np.full(5, 5.0))
    with torch.no_grad():
        loss.alpha.copy_(torch.linspace(-2, 2, 5))
    terms = loss(output, target)
    weight, bias, alpha = (p.detach().numpy() for p in (*loss.regressor.parameters(), loss.alpha))
    s, t, (m, d) = output.features.detach().numpy(), target.features.numpy(), target.features.shape
    off, variance = s @ weight.T + bias - t, np.log(1 + np.exp(alpha)) + 1e-5
    right = np.eye(3)[target.labels]
    assert terms["vid"].item() == pytest.approx((off**2 / variance + np.log(variance)).sum() / 2 / (m * d), 1e-12)
    assert terms["xent"].item() == pytest.approx(-(right * np.log(softmax(output.logits.detach().numpy()))).sum() / m)
    sum(terms.values()).backward()
    of_mean = off / variance / (m * d)
    of_variance = (1 / variance - off**2 / variance**2).sum(axis=0) / 2 / (m * d)
    for found, expected in (
        (output.features.grad, of_mean @ weight),
        (loss.regressor.weight.grad, of_mean.T @ s),
        (loss.regressor.bias.grad, of_mean.sum(axis=0)),
        (loss.alpha.grad, of_variance / (1 + np.exp(-alpha))),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("temperature", "alpha"), [(0.0, 0.9), (4.0, 1.5)])
def test_numbers_that_make_no_kd(temperature: float, alpha: float) -> None:
    with pytest.raises(RecipeError) as refused:
        losses.build("kd", {}, {"temperature": temperature, "alpha": alpha})
    assert str(refused.value) == (
        f"The loss kd cannot have temperature={temperature:g} and alpha={alpha:g}: a temperature is above 0, alpha "
        "from 0 to 1."
    )


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("kd", {"temprature": 2}, "The loss kd has no option 'temprature'. There are: temperature, alpha."),
        ("xent", {"foo": 1}, "The loss xent has no option 'foo'. There are: none."),
        (
            "kd",
            {"temperature": "two"},
            "The loss kd cannot be built with temperature='two': '<' not supported between instances of 'int' and "
            "'str'.",
        ),
    ],
)
def test_options_that_a_loss_does_not_take(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        losses.build(name, {}, options)
    assert str(refused.value) == said


def test_options_go_to_the_losses_that_name_them() -> None:
    assert losses.build("ts", {"mse_weight": 3.0, "epochs": 5}).mse_weight == 3.0
    losses.build("xent", {"mse_weight": 3.0})


def test_an_unknown_loss() -> None:
    with pytest.raises(RecipeError) as refused:
        losses.build("xnet", {})
    assert str(refused.value) == "Unknown loss 'xnet'. There are: xent, kd, ts, vid."
