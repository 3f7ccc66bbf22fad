"""A network as (features, logits), and a student of the teacher's feature width."""

import pytest
import torch
from torch import nn

from tspipe.errors import NetworkError
from tspipe.models import networks
from tspipe.models.feature_net import FeatureNet, last_linear, split, student_of

SHAPE = (3, 32, 32)
PROBE = torch.zeros(2, *SHAPE)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return networks.build(name, 10, SHAPE)


@pytest.mark.parametrize("name", networks.names())
def test_a_split_network_computes_the_same(name: str) -> None:
    module = build(name).eval()
    images = torch.rand(3, *SHAPE)
    with torch.no_grad():
        expected = module(images)
        features, logits = split(module, name, PROBE)(images)
    torch.testing.assert_close(logits, expected)
    assert features.shape[0] == 3


@pytest.mark.parametrize("name", networks.names())
def test_every_network_can_be_a_student(name: str) -> None:
    student = student_of(build(name), name, 24, 7, PROBE)
    features, logits = student(torch.rand(3, *SHAPE))
    assert (features.shape, logits.shape) == ((3, 24), (3, 7))
    g, head = student.backbone[1], student.head
    assert isinstance(g, nn.Linear)
    # Without an activation in between, the two fold into one.
    torch.testing.assert_close(head(features), features @ head.weight.T + head.bias)


@pytest.mark.parametrize(
    ("name", "native", "removed", "dropouts"),
    [
        ("lenet5", 120, {"Linear(in_features=120, out_features=84, bias=True)"}, []),
        ("alexnet", 4096, {"Linear(in_features=4096, out_features=4096, bias=True)"}, ["Dropout", "Dropout"]),
        ("mobilenet_v2", 1280, set(), ["Dropout"]),
        ("resnet18", 512, set(), []),
        ("resnet56", 64, set(), []),
    ],
)
def test_the_position_of_g(name: str, native: int, removed: set[str], dropouts: list[str]) -> None:
    student = student_of(build(name), name, 24, 10, PROBE)
    layers = list(student.modules())
    assert student.backbone[1].in_features == native
    assert not removed & {str(layer) for layer in layers}
    assert [type(layer).__name__ for layer in layers if isinstance(layer, nn.Dropout)] == dropouts


def test_a_sequential_is_a_network() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    student = student_of(module, "chain", 5, 3, torch.zeros(2, 3, 2, 2))
    assert [layer.in_features for layer in student.modules() if isinstance(layer, nn.Linear)] == [12, 5]


def test_one_image_suffices_as_a_probe_of_a_network_with_batch_norm() -> None:
    """At the end of resnet18, an image of 16×16 pixels is one value per channel."""
    student = student_of(build("resnet18"), "resnet18", 24, 10, torch.zeros(1, 3, 16, 16))
    assert student.training


class Unsplittable(nn.Module):
    """A network that does not run its Linear, or computes more after it."""

    def __init__(self, *, runs_linear: bool):
        super().__init__()
        self.runs_linear, self.conv, self.fc = runs_linear, nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.conv(x).mean((2, 3))
        return 2 * self.fc(pooled) if self.runs_linear else pooled


def test_a_network_without_a_linear_is_refused() -> None:
    with pytest.raises(NetworkError) as error:
        split(Unsplittable(runs_linear=False), "net.py", PROBE)
    assert str(error.value) == (
        "net.py does not end in a Linear layer, so it has no penultimate features to learn from."
    )


def test_a_network_that_computes_more_after_the_linear_is_refused() -> None:
    with pytest.raises(NetworkError) as error:
        split(Unsplittable(runs_linear=True), "net.py", PROBE)
    assert str(error.value) == (
        "net.py computes more than its last Linear (fc) at its end, so its features cannot be separated. "
        "Use a network that ends in a Linear."
    )


def test_images_of_another_number_of_channels() -> None:
    with pytest.raises(NetworkError) as error:
        split(build("lenet5"), "lenet5", torch.zeros(2, 1, 32, 32))
    assert str(error.value).startswith("lenet5 does not take images of (1, 32, 32): ")


def test_any_error_for_images_of_another_size() -> None:
    """A vision transformer asserts the size; other networks raise a RuntimeError."""

    class Asserting(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    with pytest.raises(NetworkError) as error:
        last_linear(Asserting(), "asserting", torch.zeros(2, 1, 16, 16))
    assert str(error.value) == "asserting does not take images of (1, 16, 16): AssertionError"


def test_a_probe_leaves_no_trace() -> None:
    module = build("resnet20").train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    network = split(module, "resnet20", torch.rand(2, *SHAPE))
    assert network.training
    after = {**network.backbone.state_dict(), **{f"fc.{k}": v for k, v in network.head.state_dict().items()}}
    assert all(before[name].equal(after[name]) for name in before)


def test_width() -> None:
    assert FeatureNet(nn.Flatten(), nn.Linear(12, 3)).width == 12


def test_bfloat16_is_float32_rounded() -> None:
    torch.manual_seed(0)
    network = FeatureNet(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), nn.Linear(8 * 36, 4))
    images = torch.rand(5, 3, 8, 8)
    exact = network(images)
    network.precision = torch.bfloat16
    rounded = network(images)
    for actual, expected in zip(rounded, exact, strict=True):
        assert actual.dtype == torch.float32
        assert not torch.equal(actual, expected)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))
    rounded.logits.sum().backward()
    assert network.head.weight.grad is not None
    assert network.head.weight.grad.dtype == torch.float32
