"""Every classifier of torchvision that ends in a Linear works as a teacher and as a student."""

import os

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from shared import equal
from tspipe.errors import NetworkError
from tspipe.models import loading, networks
from tspipe.models.feature_net import student_of
from tspipe.models.inference import freeze
from tspipe.models.probe import probe_images

ALL = models.list_models(module=models)
# The smallest of each family. TSPIPE_TORCHVISION=1 tests all, which takes an hour and 16 GB of memory.
SAMPLE = [
    "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2",
    "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
]  # fmt: skip
LARGE = {"alexnet", "maxvit", "vgg", "vision_transformer"}  # families without a small network
SIDES = {"maxvit": 224, "vit": 224, "inception": 75, "alexnet": 64}


def test_the_sample_has_every_family() -> None:
    families, sampled = ({models.get_model_builder(name).__module__ for name in names} for names in (ALL, SAMPLE))
    assert families == sampled | {f"torchvision.models.{family}" for family in LARGE}


@pytest.mark.usefixtures("fast_weights")
@pytest.mark.parametrize("name", ALL if os.environ.get("TSPIPE_TORCHVISION") else SAMPLE)
def test_teacher_and_student(name: str) -> None:
    side = next((side for start, side in SIDES.items() if name.startswith(start)), 32)
    shape, name = (3, side, side), f"torchvision:{name}"
    module = networks.build(name, 4, shape)
    spec = loading.NetworkSpec(name, 4, shape, {})
    assert spec.count_parameters() == sum(parameter.numel() for parameter in module.parameters())
    if "squeezenet" in name:
        with pytest.raises(NetworkError, match=r"^torchvision:squeezenet1_. does not end in a Linear layer"):
            freeze(module, name, shape, torch.device("cpu"))
        return
    loaded, _ = loading.load_network(spec, module.state_dict(), "w.pt")
    assert equal(loaded.state_dict(), module.state_dict())
    probe = probe_images(shape)
    with torch.inference_mode():
        expected = module.eval()(probe)
        features, logits = freeze(loaded, name, shape, torch.device("cpu"))(probe)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert features.ndim == 2
    student = student_of(module, name, 5, 3, probe).train()
    with torch.no_grad():
        assert [part.shape for part in student(probe)] == [(2, 5), (2, 3)]


@pytest.mark.parametrize(("name", "sha256"), [("googlenet", "1378be20"), ("inception_v3", "0cc3c7bd")])
def test_published_weights_with_auxiliary_heads(name: str, sha256: str) -> None:
    """The heads are left out. torchvision builds the network with `transform_input` for its own weights alone."""
    with torch.device("meta"):
        state = models.get_model(name, weights=None, num_classes=4, aux_logits=True, init_weights=False).state_dict()
    spec = loading.NetworkSpec(f"torchvision:{name}", 4, (3, 75, 75), {})
    tensors, options = loading.adapt(spec, state, sha256 + "0" * 56)
    assert options == {"transform_input": True}
    assert (
        loading.adapt(spec._replace(options={"transform_input": False}), state, sha256)[1]["transform_input"] is False
    )
    assert loading.adapt(spec, state, "0" * 64)[1] == {}
    loading.check_fit(spec.build_on_meta(), tensors, spec.name, "w.pt")
    assert len(tensors) < len(state)


class TwoOutputs(nn.Module):
    """A network with a second head in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, images: Tensor) -> object:
        inputs = images.flatten(1)
        return [self.two(inputs), self.one(inputs)] if self.training else self.one(inputs)


def test_several_outputs_in_training_mode_are_refused() -> None:
    with pytest.raises(NetworkError) as error:
        student_of(TwoOutputs(), "two.py", 5, 3, probe_images((3, 2, 2)))
    assert str(error.value) == (
        "two.py returns a list in training mode, not one tensor of logits. Leave out its auxiliary heads, as "
        "torchvision's option aux_logits=false does."
    )
