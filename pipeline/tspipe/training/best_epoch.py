"""A student's weights after its best epoch, kept beside those that training continues with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tspipe.training.checkpoint import prefixed, without_prefix


class BestEpoch:
    """A copy of a network's weights after the first epoch with the highest accuracy.

    Attributes:
        epoch: its number, from 1; 0 before the first epoch ends.
        accuracy: the accuracy that selected it.
        weights: the network's state dict after that epoch.
    """

    def __init__(self) -> None:
        self.epoch, self.accuracy, self.weights = 0, -1.0, dict[str, Tensor]()

    def update(self, network: nn.Module, epoch: int, accuracy: float) -> None:
        """Copy the network's weights if this epoch, numbered from 1, is better than those before."""
        if accuracy > self.accuracy:
            self.epoch, self.accuracy = epoch, accuracy
            state = network.state_dict()
            if not self.weights:
                self.weights = {name: torch.empty_like(value) for name, value in state.items()}
            for name, value in state.items():
                self.weights[name].copy_(value)  # into the same memory, which is faster

    def state_dict(self) -> dict[str, Tensor]:
        """Return the epoch, its accuracy and the weights as tensors."""
        facts = {"epoch": torch.tensor(self.epoch), "accuracy": torch.tensor(self.accuracy, dtype=torch.float64)}
        return {**facts, **prefixed("network.", self.weights)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        self.epoch, self.accuracy = int(tensors["epoch"]), float(tensors["accuracy"])
        self.weights = without_prefix("network.", tensors)
