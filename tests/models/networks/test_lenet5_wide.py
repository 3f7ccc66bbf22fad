"""LeNet-5 with wide layers, and its optional max-pooling dropout."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tspipe.errors import NetworkError
from tspipe.models import feature_net, networks
from tspipe.models.networks.lenet5_wide import MaxPoolDropout
from tspipe.models.probe import probe_images

SHAPE = (3, 32, 32)


def activations(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def max_pool_dropout(images: torch.Tensor, keep: float, training: bool) -> torch.Tensor:
    return MaxPoolDropout(keep).train(training)(images)


def test_sizes() -> None:
    network = networks.build("lenet5_wide", 10, SHAPE)
    assert sum(parameter.numel() for parameter in network.parameters()) == 6_785_930
    assert network.classifier[2].in_features == 2048
    student = feature_net.student_of(network, "lenet5_wide", 64, 10, probe_images(SHAPE))
    assert student.backbone[1].in_features == 128 * 5 * 5
    assert [student.backbone[1].out_features, student.head.in_features] == [64, 64]
    narrow = networks.build("lenet5_wide", 10, SHAPE, {"maps": [2, 3], "hidden": 4, "keep": 0.5})
    assert [p.shape[0] for p in narrow.parameters()] == [2, 2, 3, 3, 4, 4, 10, 10]


@pytest.mark.parametrize("keep", [0.3, 0.5, 1.0])
def test_evaluation_returns_the_expectation(keep: float) -> None:
    """The expectation over the 16 subsets of four activations; the maximum of none is 0."""
    images = activations(2, 3, 4, 6)
    expected = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
    for mask in product((0.0, 1.0), repeat=4):
        kept = images * torch.tensor(mask, dtype=torch.float64).view(2, 2).repeat(2, 3)
        expected += keep ** sum(mask) * (1 - keep) ** (4 - sum(mask)) * F.max_pool2d(kept, 2)
    pooled = max_pool_dropout(images, keep, training=False)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


def test_training_samples_have_the_mean_that_evaluation_returns() -> None:
    torch.manual_seed(0)
    images = activations(1, 2, 2, 2)
    samples = max_pool_dropout(images.expand(20_000, -1, -1, -1), 0.4, training=True)
    expected = max_pool_dropout(images, 0.4, training=False)
    assert samples.mean(0, keepdim=True) == pytest.approx(expected.numpy(), abs=0.01)
    assert {round(value, 9) for value in samples[:, 0].flatten().tolist()} == {
        0.0, *(round(value, 9) for value in images[0, 0].flatten().tolist())
    }  # fmt: skip


def test_only_the_largest_kept_activation_has_a_gradient() -> None:
    torch.manual_seed(1)
    images = activations(4, 2, 5, 7).requires_grad_()  # the last row and column are ignored
    pooled = max_pool_dropout(images, 0.5, training=True)
    assert pooled.shape == (4, 2, 2, 3) == F.max_pool2d(images, 2).shape
    pooled.sum().backward()
    assert images.grad is not None
    used = images.grad.nonzero(as_tuple=True)
    assert len(used[0]) == (pooled > 0).sum()
    assert set(images[used].tolist()) == set(pooled[pooled > 0].tolist())


def test_keep_of_one_is_max_pooling() -> None:
    images = activations(2, 3, 6, 6)
    for training in (False, True):
        torch.testing.assert_close(max_pool_dropout(images, 1.0, training), F.max_pool2d(images, 2), rtol=0, atol=0)


def test_only_training_mode_is_random() -> None:
    network = networks.build("lenet5_wide", 10, (1, 16, 16), {"keep": 0.5, "maps": [4, 4], "hidden": 8})
    images = torch.rand(2, 1, 16, 16)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))
    channels_last = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network.to(memory_format=torch.channels_last)(channels_last), network(images))


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_keep_is_a_probability(keep: float) -> None:
    with pytest.raises(NetworkError) as error:
        networks.build("lenet5_wide", 10, SHAPE, {"keep": keep})
    assert str(error.value) == (
        f"lenet5_wide cannot keep an activation with probability {keep}: it must be above 0 and at most 1."
    )
