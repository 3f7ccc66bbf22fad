"""Optimisers and learning-rate schedules, as a recipe states them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tspipe.recipes.schema import Optimisation


def make_optimizer(settings: Optimisation, parameters: Iterable[Tensor], device: torch.device) -> torch.optim.Optimizer:
    """Return Adam or SGD, fused into one kernel where PyTorch supports it."""
    fused = device.type in ("cpu", "cuda")
    lr, weight_decay = settings.lr, settings.weight_decay
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=weight_decay, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: Optimisation, epoch: int) -> None:
    """Set the learning rate of an epoch, counted from 0.

    It is lr · factor^⌊epoch / every⌋ or, with milestones, lr · factor^(milestones reached).
    """
    drops = sum(epoch >= milestone for milestone in settings.lr_milestones)
    if not settings.lr_milestones:
        drops = epoch // settings.lr_drop_every
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * settings.lr_drop_factor**drops
