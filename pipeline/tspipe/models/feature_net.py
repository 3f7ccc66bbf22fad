"""Any network as (features, logits), and a student's g(x) of the teacher's width."""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tspipe.errors import NetworkError
from tspipe.models import networks, weights
from tspipe.models.output import Output


class FeatureNet(nn.Module):
    """A network cut before its last Linear: `forward(x)` gives (features (n, d), logits (n, c)), float32.

    Attributes:
        backbone: images (n, C, H, W) to features (n, d).
        head: the last Linear, (n, d) to (n, c).
        precision: what it computes in; weights are float32 all the same. bfloat16 is autocast's, and is rounded to
            8 bits: fast where the processor or the GPU has it, slow where it has not.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear):
        super().__init__()
        self.backbone, self.head, self.precision = backbone, head, torch.float32

    @property
    def width(self) -> int:
        """d, the number of features."""
        return self.head.in_features

    def forward(self, images: Tensor) -> Output:
        """(n, C, H, W) float32 to (features, logits)."""
        if self.precision == torch.float32:
            features = self.backbone(images)
            return Output(features, self.head(features))
        with torch.autocast(images.device.type, self.precision):
            features = self.backbone(images)
            return Output(features.float(), self.head(features).float())


def split(module: nn.Module, name: str, probe: Tensor) -> FeatureNet:
    """Cut a classifier before its last Linear. The module is taken apart, not copied.

    Args:
        module: maps images to logits.
        name: what to call it in an error.
        probe: a small batch of its input, on which head(backbone(x)) must equal module(x).

    Raises NetworkError where there is no such Linear.
    """
    path, expected = last_linear(module, name, probe)
    head = cast(nn.Linear, module.get_submodule(path))
    if head is module:
        return FeatureNet(nn.Flatten(), head)
    _replace(module, path, nn.Identity())
    network = FeatureNet(module, head).train(module.training)
    with _evaluated(network):
        features, logits = network(probe)
    same = torch.allclose(logits, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    if features.shape != (len(probe), head.in_features) or not same:
        raise NetworkError(
            f"{name} does more after its last Linear ({path}) than that layer, so its features cannot be cut out. "
            "Give a network that ends in a Linear."
        )
    return network


def student_of(module: nn.Module, name: str, width: int, num_classes: int, probe: Tensor) -> FeatureNet:
    """Give a classifier the teacher's feature width: backbone, then g(x) = Linear(native, d), then Linear(d, c).

    There is no activation between g and the last Linear, so both fold into one when the student is exported.
    Where a hidden Linear feeds the last one in the same chain (LeNet-5, AlexNet), g takes the place of
    that hidden layer and its activation; a dropout before it stays. The module is taken apart, not copied.

    Args:
        module: a classifier that maps images to logits and ends in a Linear.
        name: what to call it in an error.
        width: d, the teacher's number of features.
        num_classes: c.
        probe: a small batch of its input.
    """
    path, _ = last_linear(module, name, probe)
    parent_path, _, last = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    hidden = _hidden_linear(parent, last)
    if hidden is None:
        network = split(module, name, probe)
        backbone, native = network.backbone, network.width
    else:
        chain = cast(nn.Sequential, parent)
        native = cast(nn.Linear, chain[hidden]).in_features
        if parent is module:
            backbone = chain[:hidden]
        else:
            backbone = module
            _replace(module, parent_path, chain[:hidden])
    return FeatureNet(nn.Sequential(backbone, nn.Linear(native, width)), nn.Linear(width, num_classes))


def _hidden_linear(parent: nn.Module, last: str) -> int | None:
    """The position of the Linear that feeds the last one through nothing but activations and dropout, if any."""
    if not isinstance(parent, nn.Sequential) or last != list(parent._modules)[-1]:
        return None
    for position in range(len(parent) - 2, -1, -1):
        if isinstance(parent[position], nn.Linear):
            return position
        if any(True for _ in parent[position].parameters()):
            return None
    return None


def last_linear(module: nn.Module, name: str, probe: Tensor) -> tuple[str, Tensor]:
    """The path of the Linear that runs last on the probe, and the module's output."""
    ran: list[str] = []
    hooks = []
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear):

            def note(_layer: nn.Module, _input: object, _output: object, path: str = path) -> None:
                ran.append(path)

            hooks.append(layer.register_forward_hook(note))
    try:
        with _evaluated(module):
            output = module(probe)
    except Exception as problem:  # what images that do not fit raise differs from network to network
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise NetworkError(f"{name} does not take images of {tuple(probe.shape[1:])}: {reason}") from problem
    finally:
        for hook in hooks:
            hook.remove()
    if not ran or not isinstance(output, Tensor) or output.ndim != 2:
        raise NetworkError(f"{name} does not end in a Linear layer, so it has no penultimate features to learn from.")
    return ran[-1], output


@contextlib.contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, for a probe that leaves no trace (dropout, batch norm, torch's generator).

    What a module draws at random even so is the same in every such probe on the CPU.
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # not torch.manual_seed, which seeds GPUs too
            yield
    finally:
        module.train(training)


def _replace(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)


def load_teacher(
    name: str,
    num_classes: int,
    input_shape: tuple[int, int, int],
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a teacher and give it its weights; also gives the options with those that the weights' names show.

    Args:
        name: a network's name.
        input_shape: (C, H, W).
        options: the network's own; an `input_shape` among them, as a cache's manifest has it, is not one.
        tensors: the weights, named as the network or a published checkpoint of it names them.
        source: what to call the weights in an error.

    Raises NetworkError when they do not fit, before memory is taken for the network.
    """
    tensors, seen = networks.adapt(name, dict(tensors))
    options = {**options, **seen}
    with torch.device("meta"):
        weights.check_fit(_build(name, num_classes, input_shape, options), tensors, name, source)
    module = _build(name, num_classes, input_shape, options)
    weights.load_into(module, tensors, name, source)
    return module, options


def count_parameters(name: str, num_classes: int, input_shape: tuple[int, int, int], options: Mapping[str, Any]) -> int:
    """How many weights a network has, counted without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _build(name, num_classes, input_shape, options).parameters())


def _build(name: str, num_classes: int, input_shape: tuple[int, int, int], options: Mapping[str, Any]) -> nn.Module:
    own = {key: value for key, value in options.items() if key != "input_shape"}
    return networks.build(name, num_classes, input_shape, own)


def freeze(module: nn.Module, name: str, input_shape: tuple[int, int, int], device: torch.device) -> FeatureNet:
    """A loaded teacher as the (features, logits) it gives: in eval mode, never to be trained, made for inference.

    Batch norms are folded into the convolutions before them, and convolutions run channels-last. Features stay
    within 1e-4 of the plain network's, max|Δ| / max|f|, on a probe of noise; where they would not, nothing is folded.
    """
    probe = probe_images(input_shape)
    network = split(module.eval().requires_grad_(False), name, probe)
    folded = FeatureNet(fold_batch_norms(network.backbone), network.head).eval()
    if _same_features(network, folded, probe):
        network = folded
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _same_features(plain: FeatureNet, folded: FeatureNet, probe: Tensor) -> bool:
    with _evaluated(plain):
        expected = plain(probe).features
    try:
        with _evaluated(folded):
            found = folded(probe).features
    except Exception:  # its code may want of its parts what only they have, as a Sequential's length
        return False
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def probe_images(input_shape: tuple[int, int, int]) -> Tensor:
    """A probe of two images (2, C, H, W), always the same, that tells functions apart which agree on zeros."""
    return torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0))


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """A module in eval mode without those batch norms that directly follow a convolution used only there.

    Where its control flow cannot be traced, its parts are folded one by one. The module given is left as it is.
    """
    if not any(module.children()):
        return module
    try:
        traced = fx.symbolic_trace(module)
        _fold(traced)
    except Exception:  # tracing runs the module's own code on stand-ins, which can raise anything
        folded = copy.copy(module)
        folded._modules = {name: part and fold_batch_norms(part) for name, part in module._modules.items()}
        return folded
    return traced


def _fold(traced: fx.GraphModule) -> None:
    layers, nodes = dict(traced.named_modules()), list(traced.graph.nodes)
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    for node in nodes:
        norm = layers.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or len(node.args) != 1:
            continue
        before = node.args[0]
        conv = layers.get(before.target) if before.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1 and calls[before.target] == 1:
            _replace(traced, before.target, fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
