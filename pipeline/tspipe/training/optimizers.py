"""What training a teacher and training students have in common: optimiser, schedule, evaluation, checkpoint."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tspipe.recipes.schema import Optimisation


def make_optimizer(how: Optimisation, parameters: Iterable[Tensor], device: torch.device) -> torch.optim.Optimizer:
    """Adam or SGD as the recipe says; one fused kernel for all parameters where PyTorch has it."""
    fused = device.type in ("cpu", "cuda")
    if how.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=how.lr, weight_decay=how.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters, lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay, nesterov=False, fused=fused
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, how: Optimisation, epoch: int) -> None:
    """The learning rate of an epoch (from 0): lr · factor^⌊epoch / every⌋, or a factor for each milestone passed."""
    drops = sum(epoch >= milestone for milestone in how.lr_milestones)
    if not how.lr_milestones:
        drops = epoch // how.lr_drop_every
    for group in optimizer.param_groups:
        group["lr"] = how.lr * how.lr_drop_factor**drops
