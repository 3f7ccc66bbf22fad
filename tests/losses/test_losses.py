"""The contract of every loss, the values of `ts`, `kd` and `vid`, and where options come from."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tspipe import losses
from tspipe.errors import RecipeError
from tspipe.losses import Target
from tspipe.losses.kd import kd_loss
from tspipe.losses.ts import ts_loss
from tspipe.models.output import Output
from tspipe.recipes import load

SIZES = losses.Sizes(5, 3, 5)


def batch(n: int = 6, d: int = 5, c: int = 3) -> tuple[Output, Target]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    output = Output(draw(n, d).requires_grad_(), draw(n, c).requires_grad_())
    return output, Target(draw(n, d), draw(n, c), torch.randint(c, (n,), generator=generator))


@pytest.mark.parametrize("name", losses.names())
def test_contract(name: str) -> None:
    built = losses.build(name, SIZES)
    loss = built.module.double()
    assert loss.needs <= {"features", "logits", "labels"}
    output, target = batch()
    terms = loss(output, target)
    assert list(terms) == built.terms
    assert terms
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert any(part.grad is not None and part.grad.abs().sum() > 0 for part in output)


@pytest.mark.parametrize("name", losses.names())
def test_a_loss_reads_only_what_it_needs(name: str) -> None:
    loss = losses.build(name, SIZES).module.double()
    output, target = batch()
    empty = torch.empty(6, 0)
    needed = Target(*(value if field in loss.needs else empty for field, value in target._asdict().items()))
    terms = []
    for one in (needed, target):
        torch.manual_seed(0)
        terms.append(loss(output, one))
    assert terms[0] == terms[1]


def test_ts_equals_the_papers_sums() -> None:
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


def test_the_gradient_of_ts() -> None:
    output, target = batch()
    assert torch.autograd.gradcheck(
        lambda g, z: sum(ts_loss(g, z, target.features, target.labels, 1.5, 0.5).values()), tuple(output)
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("temperature", "alpha"), [(4.0, 0.9), (1.0, 0.5), (2.0, 0.0), (3.0, 1.0)])
def test_kd_equals_hintons(temperature: float, alpha: float) -> None:
    """Values and gradients; that of the first term is α·T·(p − q) / m."""
    output, target = batch()
    terms = kd_loss(output.logits, target.logits, target.labels, temperature, alpha)
    (kl, xent), m = terms.values(), len(target.labels)
    z, t, one_hot = output.logits.detach().numpy(), target.logits.numpy(), np.eye(3)[target.labels]
    student, teacher = softmax(z / temperature), softmax(t / temperature)
    assert list(terms) == ["kl", "xent"]
    assert kl.item() == pytest.approx(alpha * temperature**2 * (teacher * np.log(teacher / student)).sum() / m, 1e-12)
    assert xent.item() == pytest.approx(-(1 - alpha) * (one_hot * np.log(softmax(z))).sum() / m, 1e-12)
    (kl + xent).backward()
    expected = alpha * temperature * (student - teacher) / m + (1 - alpha) * (softmax(z) - one_hot) / m
    np.testing.assert_allclose(output.logits.grad, expected, rtol=1e-10, atol=1e-14)


def test_vid_equals_ahns() -> None:
    """Values, and the gradients of the student's features, the regressor and the variances."""
    output, target = batch()
    loss = losses.build("vid", SIZES).module.double()
    assert loss.alpha.detach().exp().log1p().add(1e-5).numpy() == pytest.approx(np.full(5, 5.0))
    with torch.no_grad():
        loss.alpha.copy_(torch.linspace(-2, 2, 5))
    terms = loss(output, target)
    weight, bias, alpha = (p.detach().numpy() for p in (*loss.regressor.parameters(), loss.alpha))
    s, t, (m, d) = output.features.detach().numpy(), target.features.numpy(), target.features.shape
    error, variance = s @ weight.T + bias - t, np.log(1 + np.exp(alpha)) + 1e-5
    one_hot = np.eye(3)[target.labels]
    assert terms["vid"].item() == pytest.approx((error**2 / variance + np.log(variance)).sum() / 2 / (m * d), 1e-12)
    assert terms["xent"].item() == pytest.approx(-(one_hot * np.log(softmax(output.logits.detach().numpy()))).sum() / m)
    sum(terms.values()).backward()
    mean_gradient = error / variance / (m * d)
    variance_gradient = (1 / variance - error**2 / variance**2).sum(axis=0) / 2 / (m * d)
    for gradient, expected in (
        (output.features.grad, mean_gradient @ weight),
        (loss.regressor.weight.grad, mean_gradient.T @ s),
        (loss.regressor.bias.grad, mean_gradient.sum(axis=0)),
        (loss.alpha.grad, variance_gradient / (1 + np.exp(-alpha))),
    ):
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("temperature", "alpha"), [(0.0, 0.9), (4.0, 1.5)])
def test_kd_options_out_of_range(temperature: float, alpha: float) -> None:
    with pytest.raises(RecipeError) as error:
        losses.build("kd", SIZES, {"temperature": temperature, "alpha": alpha})
    assert str(error.value) == (
        f"The loss kd cannot have temperature={temperature:g} and alpha={alpha:g}: a temperature is above 0, alpha "
        "from 0 to 1."
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kd", {"temprature": 2}, "The loss kd has no option 'temprature'. There are: temperature, alpha."),
        (
            "xent",
            {"foo": 1},
            "The loss xent has no option 'foo'. There are: label_smoothing.",
        ),
        ("vid", {"feature_dim": 4}, "The loss vid has no option 'feature_dim'. It has none."),
        (
            "kd",
            {"temperature": "two"},
            "The loss kd cannot be built with temperature='two': '<' not supported between instances of 'int' and "
            "'str'.",
        ),
    ],
)
def test_wrong_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        losses.build(name, SIZES, options)
    assert str(error.value) == message


USERS_LOSS = """
from torch import nn

class Loss(nn.Module):
    needs = {needs}

    def __init__(self{parameters}):
        super().__init__()
        self.options = {options}

    def forward(self, student, target):
        return {returned}
"""


def users_loss(
    folder: Path,
    parameters: str = "",
    options: str = "None",
    needs: str = "frozenset({'features'})",
    returned: str = "{'a': student.features.sum()}",
) -> str:
    path = folder / "mine.py"
    path.write_text(USERS_LOSS.format(parameters=parameters, options=options, needs=needs, returned=returned))
    return str(path)


def test_a_users_loss_gets_its_options_from_its_own_section_alone(tmp_path: Path) -> None:
    """Recipe fields of the same name are not its options, not even the weights of `ts`."""
    path = users_loss(tmp_path, ", momentum=0.999, lr=7, mse_weight=5", "(momentum, lr, mse_weight)")
    recipe = load.load("digits", [f"loss={path}", "losses.mine.lr=8", "momentum=0.5", "mse_weight=2"])
    assert recipe.loss_options(path) == {"lr": 8}
    assert losses.build(path, SIZES, recipe.loss_options(path)).module.options == (0.999, 8, 5)


def test_a_loss_gets_the_dimensions_if_its_constructor_has_them(tmp_path: Path) -> None:
    path = users_loss(tmp_path, ", num_classes, feature_dim=1, width=9", "(num_classes, feature_dim, width)")
    assert losses.build(path, SIZES).module.options == (3, 5, 9)


def test_the_weights_of_ts_are_fields_of_the_recipe() -> None:
    recipe = load.load("digits", ["mse_weight=3", "xent_weight=0.5", "losses.kd.alpha=0.2"])
    loss = losses.build("ts", SIZES, recipe.loss_options("ts")).module
    assert (loss.mse_weight, loss.xent_weight) == (3.0, 0.5)
    assert recipe.loss_options("kd") == {"alpha": 0.2}
    assert recipe.loss_options("xent") == {"label_smoothing": 0}
    recipe = load.load("digits", ["mse_weight=3", "losses.ts.mse_weight=4"])
    assert recipe.loss_options("ts") == {"mse_weight": 4, "xent_weight": 1.0}


def test_a_missing_option(tmp_path: Path) -> None:
    path = users_loss(tmp_path, ", width")
    with pytest.raises(RecipeError) as error:
        losses.build(path, SIZES)
    assert str(error.value) == (
        f"The loss {path} cannot be built: missing a required argument: 'width'. Set it in [losses.mine] of the recipe."
    )


@pytest.mark.parametrize("needs", ["{'images'}", "'labels'", "None", "[['features']]"])
def test_needs_are_checked(tmp_path: Path, needs: str) -> None:
    path = users_loss(tmp_path, needs=needs)
    with pytest.raises(RecipeError) as error:
        losses.build(path, SIZES)
    assert str(error.value) == (
        f"The loss {path} must define `needs`, a subset of {{'features', 'logits', 'labels'}}; it is {needs}."
    )


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ("student.features.sum()", "a Tensor"),
        ("{}", "an empty dict"),
        ("{'a': student.features.sum(), 'b': 1.0}", "'b': a float"),
        ("{'a': student.features.sum(1)}", "'a': (2,) torch.float32"),
        ("{'a': target.labels.sum()}", "'a': () torch.int64"),
        ("{0: student.features.sum()}", "0: () torch.float32"),
    ],
)
def test_terms_are_checked(tmp_path: Path, returned: str, problem: str) -> None:
    path = users_loss(tmp_path, returned=returned)
    with pytest.raises(RecipeError) as error:
        losses.build(path, SIZES)
    assert str(error.value) == (
        f"The loss {path} must return a dict of names and floating-point scalar tensors, such as "
        f"{{'mse': tensor(0.5)}}; it returns {problem}."
    )


def test_a_loss_is_a_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def Loss():\n    return [1]\n")
    with pytest.raises(RecipeError) as error:
        losses.build(f"{tmp_path}/mine.py", SIZES)
    assert str(error.value) == f"The loss {tmp_path}/mine.py must be an nn.Module, not a list."


def test_the_check_does_not_change_what_training_draws(tmp_path: Path) -> None:
    path = users_loss(tmp_path, returned="{'a': nn.functional.dropout(student.features, 0.5).sum()}")
    state = torch.get_rng_state()
    losses.build(path, SIZES)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", losses.names())
def test_images_without_labels(name: str) -> None:
    """No term is undefined where no image has a label, and terms of labels are 0."""
    loss = losses.build(name, SIZES).module.double()
    output, target = batch()
    terms = loss(output, target._replace(labels=torch.full((6,), losses.NO_LABEL)))
    assert all(term.isfinite() for term in terms.values())
    assert all(term == 0 for key, term in terms.items() if key in ("xent", "tckd", "nckd") or key == name == "nd")


def test_distillation_grows_in_the_first_epochs() -> None:
    loss = losses.build("dkd", SIZES, {"warmup": 4}).module.double()
    output, target = batch()
    complete = loss(output, target)
    loss.start_epoch(0)
    first = loss(output, target)
    assert first["nckd"] == complete["nckd"] / 4
    assert first["xent"] == complete["xent"]
    loss.start_epoch(9)
    assert loss(output, target) == complete


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("dkd", {"temperature": 0}, "temperature=0: it is a number above 0."),
        ("dkd_lskd", {"beta": -1}, "beta=-1: it is a number of 0 or more."),
        ("rkd", {"angle_weight": -1}, "angle_weight=-1: it is a number of 0 or more."),
        ("pkt", {"weight": math.inf}, "weight=inf: it is a number of 0 or more."),
        ("projector", {"distance": "l1"}, "distance='l1': it is logsum or mse."),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, object], problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        losses.build(name, SIZES, options)
    assert str(error.value) == f"The loss {name} cannot have {problem}"


def test_an_unknown_loss() -> None:
    with pytest.raises(RecipeError) as error:
        losses.build("xnet", SIZES)
    assert str(error.value).startswith("Unknown loss 'xnet'. There are: xent, ")
