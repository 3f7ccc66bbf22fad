"""Probes leave no trace in a module or in torch's generator."""

import pytest
import torch
from torch import nn

from tspipe.errors import NetworkError
from tspipe.models.probe import eval_mode, probe_images, run_probe


def test_probe_images_are_fixed_and_draw_from_no_global_generator() -> None:
    state = torch.get_rng_state()
    images = probe_images((3, 4, 5))
    assert images.shape == (2, 3, 4, 5)
    assert torch.equal(images, probe_images((3, 4, 5)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_restores_the_mode_and_the_generator(training: bool) -> None:
    module = nn.Linear(2, 2).train(training)
    state, samples = torch.get_rng_state(), []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), eval_mode(module):
            assert not module.training
            assert not torch.is_grad_enabled()
            samples.append(torch.rand(3))
            raise ZeroDivisionError
    assert torch.equal(*samples)
    assert module.training is training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_message_is_the_first_line_of_any_error() -> None:
    with pytest.raises(NetworkError) as error:
        run_probe(nn.Conv2d(1, 1, 3), "net", probe_images((3, 8, 8)))
    assert str(error.value).startswith("net does not take images of (3, 8, 8): Given groups=1, ")
    assert "\n" not in str(error.value)


def test_a_probe_in_training_mode_leaves_statistics_as_they_are() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout()).eval()
    before, state = {key: value.clone() for key, value in module.state_dict().items()}, torch.get_rng_state()
    output = run_probe(module, "net", probe_images((3, 4, 4)), training=True)
    assert (output == 0).any()
    assert not module.training
    assert all(before[key].equal(value) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
