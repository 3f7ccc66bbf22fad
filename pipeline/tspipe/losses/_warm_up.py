"""A loss whose distillation grows during the first epochs."""

import torch
from torch import Tensor, nn


class WarmUpLoss(nn.Module):
    """A loss with a factor, `ramp`, that grows linearly over the first `warmup` epochs up to 1."""

    ramp: Tensor

    def __init__(self, warmup: int):
        super().__init__()
        self.warmup = warmup
        self.register_buffer("ramp", torch.ones(()), persistent=False)

    def start_epoch(self, epoch: int) -> None:
        """Set the factor of an epoch, counted from 0: (epoch + 1) / warmup."""
        self.ramp.fill_(min((epoch + 1) / max(self.warmup, 1), 1))
