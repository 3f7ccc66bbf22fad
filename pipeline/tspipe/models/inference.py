"""Networks prepared for inference: frozen, batch norms folded into convolutions, channels-last."""

import contextlib
import copy
from collections import Counter
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tspipe.models.feature_net import FeatureNet, split
from tspipe.models.probe import eval_mode, probe_images

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def freeze(module: nn.Module, name: str, input_shape: tuple[int, int, int], device: torch.device) -> FeatureNet:
    """Return a classifier as a FeatureNet for inference: in eval mode, without gradients, on the device.

    Batch norms are folded into the convolutions before them; convolutions run channels-last. The module is modified.
    """
    probe = probe_images(input_shape)
    network = split(module.eval().requires_grad_(False), name, probe)
    network = FeatureNet(fold_if_equal(network.backbone, probe), network.head).eval()
    return channels_last(network.to(device))


def channels_last(module: AnyModule) -> AnyModule:
    """Return the module after its convolutions have been made to run channels-last."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:  # Module.to would refuse one of five dimensions, as Swin's masks have
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return module


def fold_if_equal(module: nn.Module, probe: Tensor) -> nn.Module:
    """Return `fold_batch_norms(module)`, or the module itself if that changes its output.

    Args:
        module: in eval mode, maps images to a tensor. It is not modified.
        probe: a few images, on which the outputs may differ by 1e-4, max|Δ| / max|output|.
    """
    folded = fold_batch_norms(module).eval()
    with eval_mode(module):
        expected = module(probe)
    with contextlib.suppress(Exception), eval_mode(folded):  # a folded part lacks attributes, as a Sequential's length
        if (folded(probe) - expected).abs().max() <= 1e-4 * expected.abs().max():
            return folded
    return module


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Return a module in eval mode without the batch norms that directly follow a convolution used only once.

    If its control flow cannot be traced, its parts are folded one by one. The given module is not modified.
    """
    if not any(module.children()):
        return module
    try:
        traced = fx.symbolic_trace(module)
        _fold(traced)
    except Exception:  # tracing runs the module's code on proxies, which can raise anything
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
        previous = node.args[0]
        conv = layers.get(previous.target) if previous.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and len(previous.users) == 1 and calls[previous.target] == 1:
            traced.set_submodule(previous.target, fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(previous)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
