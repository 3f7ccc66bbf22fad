"""Any network as (features, logits), and a student of the teacher's width."""

import copy

import pytest
import torch
from torch import nn

from tspipe.errors import NetworkError
from tspipe.models import networks, weights
from tspipe.models.feature_net import (
    FeatureNet,
    fold_batch_norms,
    freeze,
    load_teacher,
    split,
    student_of,
)

SHAPE = (3, 32, 32)
PROBE = torch.zeros(2, *SHAPE)


def build(name: str, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    torch.manual_seed(0)
    return networks.build(name, 10, shape)


@pytest.mark.parametrize("name", networks.names())
def test_every_network_splits_into_what_it_was(name: str) -> None:
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
    # No activation in between: the two fold into one.
    torch.testing.assert_close(head(features), features @ head.weight.T + head.bias)


@pytest.mark.parametrize(
    ("name", "native", "gone", "kept"),
    [
        ("lenet5", 120, {"Linear(in_features=120, out_features=84, bias=True)"}, []),
        ("alexnet", 4096, {"Linear(in_features=4096, out_features=4096, bias=True)"}, ["Dropout", "Dropout"]),
        ("mobilenet_v2", 1280, set(), ["Dropout"]),
        ("resnet18", 512, set(), []),
        ("resnet56", 64, set(), []),
    ],
)
def test_where_g_stands(name: str, native: int, gone: set[str], kept: list[str]) -> None:
    student = student_of(build(name), name, 24, 10, PROBE)
    layers = list(student.modules())
    assert student.backbone[1].in_features == native
    assert not gone & {str(layer) for layer in layers}
    assert [type(layer).__name__ for layer in layers if isinstance(layer, nn.Dropout)] == kept


def test_a_bare_chain_is_a_network() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    student = student_of(module, "mine", 5, 3, torch.zeros(2, 3, 2, 2))
    assert [layer.in_features for layer in student.modules() if isinstance(layer, nn.Linear)] == [12, 5]


class Strange(nn.Module):
    """Ends in something else than its Linear, or has none, depending on `kind`."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.conv, self.fc = kind, nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.conv(x).mean((2, 3))
        return pooled if self.kind == "none" else 2 * self.fc(pooled)


def test_no_linear_is_refused_by_name() -> None:
    with pytest.raises(NetworkError) as refused:
        split(Strange("none"), "strange.py", PROBE)
    assert str(refused.value) == (
        "strange.py does not end in a Linear layer, so it has no penultimate features to learn from."
    )


def test_more_after_the_linear_is_refused_by_name() -> None:
    with pytest.raises(NetworkError) as refused:
        split(Strange("more"), "strange.py", PROBE)
    assert str(refused.value) == (
        "strange.py does more after its last Linear (fc) than that layer, so its features cannot be cut out. "
        "Give a network that ends in a Linear."
    )


def test_images_it_does_not_take() -> None:
    with pytest.raises(NetworkError) as refused:
        split(build("lenet5"), "lenet5", torch.zeros(2, 1, 32, 32))
    assert str(refused.value).startswith("lenet5 does not take images of (1, 32, 32): ")


def test_a_probe_leaves_no_trace() -> None:
    module = build("resnet20").train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    network = split(module, "resnet20", torch.rand(2, *SHAPE))
    assert network.training
    after = {**network.backbone.state_dict(), **{f"fc.{k}": v for k, v in network.head.state_dict().items()}}
    assert all(before[name].equal(after[name]) for name in before)


def randomised(name: str) -> nn.Module:
    """A network whose batch norms have averages worth folding."""
    module = build(name).eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v2", "lenet5"])
def test_the_frozen_teacher_is_the_plain_one(name: str) -> None:
    module, images = randomised(name), torch.rand(4, *SHAPE)
    plain = split(module, name, PROBE)
    with torch.no_grad():
        features, logits = plain(images)
        teacher = freeze(nn.Sequential(plain.backbone, plain.head), name, SHAPE, torch.device("cpu"))
        found = teacher(images)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in teacher.modules())
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert (found.features - features).abs().max() < 1e-4 * features.abs().max()
    assert (found.logits - logits).abs().max() < 1e-4 * logits.abs().max()


def test_a_batch_norm_after_something_else_stays() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    folded = fold_batch_norms(module)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules()) == 1
    torch.testing.assert_close(folded(PROBE), module(PROBE))


class Branching(nn.Module):
    """A control flow that cannot be traced, around parts that can; `count` parts are used, by their places."""

    def __init__(self, *, by_place: bool) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.fc, self.by_place = nn.Linear(4, 2), by_place
        nn.init.uniform_(self.parts[1].running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.sum() > 0 else -x
        for part in [self.parts[i] for i in range(3)] if self.by_place else [self.parts]:
            x = part(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("by_place", [False, True])
def test_what_cannot_be_traced_is_folded_part_by_part(by_place: bool) -> None:
    """Unless it wants of a part what only the part itself has."""
    module = Branching(by_place=by_place).eval()
    expected = module(PROBE).detach()
    with torch.no_grad():
        teacher = freeze(copy.deepcopy(module), "module", SHAPE, torch.device("cpu"))
        torch.testing.assert_close(teacher(PROBE).logits, expected, rtol=1e-4, atol=1e-5)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in teacher.modules()) is by_place
    fold_batch_norms(module)
    assert isinstance(module.parts[1], nn.BatchNorm2d)  # what is given is left as it is


def test_a_single_layer_is_not_folded() -> None:
    layer = nn.Conv2d(3, 4, 1)
    assert fold_batch_norms(layer) is layer


def test_loading_a_teacher_gives_the_options_its_weights_show() -> None:
    module = networks.build("resnet20", 10, SHAPE, {"shortcut": "B"})
    options = {"input_shape": list(SHAPE), "shortcut": "A"}
    loaded, seen = load_teacher("resnet20", 10, SHAPE, options, module.state_dict(), "w.pt")
    assert seen == {"input_shape": [3, 32, 32], "shortcut": "B"}
    assert weights.canonical_bytes(loaded) == weights.canonical_bytes(module)


def test_width() -> None:
    assert FeatureNet(nn.Flatten(), nn.Linear(12, 3)).width == 12


class Shared(nn.Module):
    """One convolution used twice, with another batch norm each time: neither may be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.two(self.conv(self.one(self.conv(x)))).mean((2, 3)))


class Odd(nn.Module):
    """Batch norms that cannot be folded: without averages of their own, and called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        self.one, self.two = nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.two(input=self.one(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("module", [Shared(), Odd()], ids=["shared", "odd"])
def test_what_cannot_be_folded_is_left(module: nn.Module) -> None:
    module.eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    images = torch.rand(4, *SHAPE)
    expected = module(images).detach()
    with torch.no_grad():
        found = freeze(module, "module", SHAPE, torch.device("cpu"))(images).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_float32_rounded() -> None:
    torch.manual_seed(0)
    network = FeatureNet(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), nn.Linear(8 * 36, 4))
    images = torch.rand(5, 3, 8, 8)
    exact = network(images)
    network.precision = torch.bfloat16
    rounded = network(images)
    for found, expected in zip(rounded, exact, strict=True):
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))
    rounded.logits.sum().backward()
    assert network.head.weight.grad is not None
    assert network.head.weight.grad.dtype == torch.float32
