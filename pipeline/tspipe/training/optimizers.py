"""Optimisers and learning-rate schedules, as a recipe states them."""

import inspect
import math
from collections.abc import Iterable
from types import MethodType

import torch
from torch import Tensor, nn

from tspipe.recipes.schema import Optimisation


def make_optimizer(settings: Optimisation, parameters: Iterable[Tensor], device: torch.device) -> torch.optim.Optimizer:
    """Return Adam, AdamW (decoupled weight decay) or SGD, fused into one kernel where PyTorch supports it."""
    _know_uncompiled_methods()
    fused = device.type in ("cpu", "cuda")
    lr, weight_decay = settings.lr, settings.weight_decay
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, lr=lr, momentum=settings.momentum, weight_decay=weight_decay, fused=fused
        )
    else:
        adam = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
        optimizer = adam(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    # `step` without its wrappers, of which one imports the compiler, and the others serve hooks and profilers.
    step = MethodType(inspect.unwrap(type(optimizer).step), optimizer)
    optimizer.step = torch.no_grad()(step)  # type: ignore[method-assign]
    return optimizer


def _know_uncompiled_methods() -> None:
    """Let optimisers work without PyTorch's compiler, whose import takes a second.

    Some methods import it when they are first called, to exclude themselves from compilation, unless their excluded
    form is already known. Optimisers are never compiled here, so that form is the method itself.
    """
    for method in vars(torch.optim.Optimizer).values():
        if function := getattr(method, "__wrapped__", None):
            function.__dict__.setdefault("__dynamo_disable", function)


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: Optimisation, epoch: int) -> None:
    """Set the learning rate of an epoch, counted from 0; see `learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, epoch)


def learning_rate(settings: Optimisation, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 0.

    It rises over w warm-up epochs as lr · (epoch + 1) / (w + 1). Then `step` gives lr · factor^⌊epoch / every⌋ or, with
    milestones, lr · factor^(milestones reached). `cosine` gives ½ lr (1 + cos(π t)), where t rises from 0 after the
    warm-up to 1 at the end of the last epoch (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
    """
    warmup = settings.warmup_epochs
    if epoch < warmup:
        return settings.lr * (epoch + 1) / (warmup + 1)
    if settings.schedule == "cosine":
        progress = min(1, (epoch - warmup) / max(1, settings.epochs - warmup))  # a benchmark goes on after the end
        return settings.lr * (1 + math.cos(math.pi * progress)) / 2
    drops = sum(epoch >= milestone for milestone in settings.lr_milestones)
    if not settings.lr_milestones:
        drops = epoch // settings.lr_drop_every
    return settings.lr * settings.lr_drop_factor**drops


def set_batch_norm_momentum(network: nn.Module, settings: Optimisation) -> None:
    """Set the momentum of a network's batch norms, if the recipe states one.

    Running statistics reach the data's after a few times 1 / momentum steps. Networks that are published with 0.01, as
    MobileNetV3, need more steps than a small dataset has, and classify at chance level until then.
    """
    if settings.batch_norm_momentum is not None:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = settings.batch_norm_momentum
