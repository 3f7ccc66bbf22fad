"""Freezing a network for inference, and folding its batch norms."""

import copy

import pytest
import torch
from torch import nn

from tspipe.models import networks
from tspipe.models.feature_net import split
from tspipe.models.inference import fold_batch_norms, freeze

SHAPE = (3, 32, 32)
PROBE = torch.zeros(2, *SHAPE)


def randomised(name: str) -> nn.Module:
    """Return a network whose batch norms have non-trivial running statistics."""
    torch.manual_seed(0)
    module = networks.build(name, 10, SHAPE).eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v2", "lenet5"])
def test_a_frozen_network_computes_the_same(name: str) -> None:
    module, images = randomised(name), torch.rand(4, *SHAPE)
    plain = split(module, name, PROBE)
    with torch.no_grad():
        features, logits = plain(images)
        teacher = freeze(nn.Sequential(plain.backbone, plain.head), name, SHAPE, torch.device("cpu"))
        output = teacher(images)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in teacher.modules())
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert (output.features - features).abs().max() < 1e-4 * features.abs().max()
    assert (output.logits - logits).abs().max() < 1e-4 * logits.abs().max()


def test_a_batch_norm_after_another_layer_is_kept() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    folded = fold_batch_norms(module)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules()) == 1
    torch.testing.assert_close(folded(PROBE), module(PROBE))


class Branching(nn.Module):
    """A control flow that cannot be traced, around parts that can. With `indexed` it indexes into a Sequential."""

    def __init__(self, *, indexed: bool) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.fc, self.indexed = nn.Linear(4, 2), indexed
        nn.init.uniform_(self.parts[1].running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.sum() > 0 else -x
        for part in [self.parts[i] for i in range(3)] if self.indexed else [self.parts]:
            x = part(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("indexed", [False, True])
def test_a_module_that_cannot_be_traced_is_folded_part_by_part(indexed: bool) -> None:
    """Nothing is folded if the module needs an attribute that a folded part lacks."""
    module = Branching(indexed=indexed).eval()
    expected = module(PROBE).detach()
    with torch.no_grad():
        teacher = freeze(copy.deepcopy(module), "module", SHAPE, torch.device("cpu"))
        torch.testing.assert_close(teacher(PROBE).logits, expected, rtol=1e-4, atol=1e-5)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in teacher.modules()) is indexed
    fold_batch_norms(module)
    assert isinstance(module.parts[1], nn.BatchNorm2d)  # the given module is not modified


def test_a_single_layer_is_not_folded() -> None:
    layer = nn.Conv2d(3, 4, 1)
    assert fold_batch_norms(layer) is layer


class Shared(nn.Module):
    """One convolution used twice, each time with another batch norm: neither may be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.two(self.conv(self.one(self.conv(x)))).mean((2, 3)))


class Unfoldable(nn.Module):
    """Batch norms that cannot be folded: one without running statistics, one called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        self.one, self.two = nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.two(input=self.one(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("module", [Shared(), Unfoldable()], ids=["shared", "unfoldable"])
def test_other_batch_norms_are_kept(module: nn.Module) -> None:
    module.eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    images = torch.rand(4, *SHAPE)
    expected = module(images).detach()
    with torch.no_grad():
        logits = freeze(module, "module", SHAPE, torch.device("cpu"))(images).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """A classifier that adds a buffer of five dimensions to its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 2)
        self.register_buffer("mask", torch.zeros(1, 1, 4, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((self.convolution(images)[None] + self.mask)[0].flatten(1))


def test_a_buffer_of_five_dimensions_keeps_its_format() -> None:
    network = freeze(Masked(), "masked", (3, 8, 8), torch.device("cpu"))
    kernels = [tensor for tensor in network.parameters() if tensor.ndim == 4]
    assert [kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels] == [True]
    assert {buffer.ndim for buffer in network.buffers()} == {5}
