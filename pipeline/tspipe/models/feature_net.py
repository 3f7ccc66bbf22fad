"""A network as (features, logits), and a student's projection g(x) to the teacher's feature width."""

from typing import cast

import torch
from torch import Tensor, nn

from tspipe.errors import NetworkError
from tspipe.models.output import Output
from tspipe.models.probe import check_trainable, eval_mode, run_probe


class FeatureNet(nn.Module):
    """A network cut before its last Linear: `forward(images)` returns features (n, d) and logits (n, c), float32.

    Attributes:
        backbone: maps images (n, C, H, W) to features (n, d).
        head: the last Linear, (n, d) to (n, c).
        precision: the dtype of the computation; weights stay float32. bfloat16 uses autocast. It keeps 8 bits, and is
            slow on processors and GPUs without native support.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear):
        super().__init__()
        self.backbone, self.head, self.precision = backbone, head, torch.float32

    @property
    def width(self) -> int:
        """The number of features, d."""
        return self.head.in_features

    def forward(self, images: Tensor) -> Output:
        """Map images (n, C, H, W) float32 to features and logits."""
        if self.precision == torch.float32:
            features = self.backbone(images)
            return Output(features, self.head(features))
        with torch.autocast(images.device.type, self.precision):
            features = self.backbone(images)
            return Output(features.float(), self.head(features).float())


def split(module: nn.Module, name: str, probe: Tensor) -> FeatureNet:
    """Cut a classifier before its last Linear. The module is modified, not copied.

    Args:
        module: maps images to logits.
        name: the network's name in an error.
        probe: a small batch of images on which head(backbone(x)) must equal module(x).

    Raises NetworkError if there is no such Linear.
    """
    path, expected = last_linear(module, name, probe)
    head = cast(nn.Linear, module.get_submodule(path))
    if head is module:
        return FeatureNet(nn.Flatten(), head)
    module.set_submodule(path, nn.Identity())
    network = FeatureNet(module, head).train(module.training)
    inseparable = NetworkError(
        f"{name} computes more than its last Linear ({path}) at its end, so its features cannot be separated. "
        "Use a network that ends in a Linear."
    )
    try:
        with eval_mode(network):
            features, logits = network(probe)
    except Exception as error:  # of any type, where the outputs of several heads no longer fit together
        raise inseparable from error
    equal = torch.allclose(logits, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    if features.shape != (len(probe), head.in_features) or not equal:
        raise inseparable
    return network


def student_of(module: nn.Module, name: str, width: int | None, num_classes: int, probe: Tensor) -> FeatureNet:
    """Give a classifier the teacher's feature width: backbone, then g(x) = Linear(native, d), then Linear(d, c).

    No activation follows g, so both Linears fold into one when the student is exported. Where a hidden Linear feeds
    the last one in the same nn.Sequential (LeNet-5, AlexNet), g replaces that layer and its activation, and keeps a
    dropout before it. The module is modified, not copied.

    Args:
        module: a classifier that maps images to logits and ends in a Linear.
        name: the network's name in an error.
        width: d, the number of the teacher's features; None leaves the classifier its own last layers.
        num_classes: c.
        probe: a small batch of images.
    """
    check_trainable(module, name, probe)
    if width is None:
        network = split(module, name, probe)
        return FeatureNet(nn.Sequential(network.backbone), network.head)
    path, _ = last_linear(module, name, probe)
    parent_path, _, last = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    hidden = _hidden_linear(parent, last)
    if hidden is None:
        network = split(module, name, probe)
        backbone, native = network.backbone, network.width
    else:
        chain = cast(nn.Sequential, parent)
        backbone, native = chain[:hidden], cast(nn.Linear, chain[hidden]).in_features
        if parent is not module:
            module.set_submodule(parent_path, backbone)
            backbone = module
    return FeatureNet(nn.Sequential(backbone, nn.Linear(native, width)), nn.Linear(width, num_classes))


def _hidden_linear(parent: nn.Module, last: str) -> int | None:
    """Return the position of the Linear that feeds the last one through activations and dropout only, if any."""
    if not isinstance(parent, nn.Sequential) or last != list(parent._modules)[-1]:
        return None
    for position in range(len(parent) - 2, -1, -1):
        if isinstance(parent[position], nn.Linear):
            return position
        if any(True for _ in parent[position].parameters()):
            return None
    return None


def last_linear(module: nn.Module, name: str, probe: Tensor) -> tuple[str, Tensor]:
    """Return the path of the Linear that runs last on the probe, and the module's output."""
    calls: list[str] = []
    hooks = [
        layer.register_forward_hook(lambda *_, path=path: calls.append(path))
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        output = run_probe(module, name, probe)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls or not isinstance(output, Tensor) or output.ndim != 2:
        raise NetworkError(f"{name} does not end in a Linear layer, so it has no penultimate features to learn from.")
    return calls[-1], output
