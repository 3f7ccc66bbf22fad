"""What a learner counts in an epoch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_MOST = 64  # steps that are counted at once


class Tally:
    """Loss terms, images and right answers of an epoch, on the device and without waiting for it.

    Right answers and losses that are no number are counted for many steps at once: a small network's step is worth few
    of the operations that this takes.

    Attributes:
        sums: the loss terms (t,) so far, each step's times its weight.
    """

    def __init__(self, terms: int, device: torch.device):
        self.sums = torch.zeros(terms, device=device)
        self._rows, self._correct, self._bad_step = 0, torch.tensor(0, device=device), torch.tensor(-1, device=device)
        self._first = 0  # the number of the first step not counted yet
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, step: int, terms: Tensor, weight: float, logits: Tensor, labels: Tensor) -> None:
        """Count a step.

        Args:
            step: its number in the epoch.
            terms: its loss terms (t,), whose sum is its loss.
            weight: how many images they are the mean of.
            logits: (n, c), of the images whose labels (n,) int64 these are.
        """
        if len(self._waiting) == _MOST or step != self._first + len(self._waiting):
            self._settle()
            self._first = step
        terms = terms.detach()
        self.sums.add_(terms, alpha=weight)
        self._waiting.append((terms, logits.argmax(1), labels))
        self._rows += len(labels)

    def _settle(self) -> None:
        if not self._waiting:
            return
        terms, said, labels = zip(*self._waiting, strict=True)
        self._waiting = []
        self._correct += (torch.cat(said) == torch.cat(labels)).sum()
        bad = ~torch.stack(terms).sum(1).isfinite()
        first = self._first + bad.int().argmax()
        self._bad_step = torch.where((self._bad_step < 0) & bad.any(), first, self._bad_step)

    @property
    def correct(self) -> Tensor:
        """How many images were classified rightly, ()."""
        self._settle()
        return self._correct

    @property
    def bad_step(self) -> Tensor:
        """The first step whose loss was no number, or -1, ()."""
        self._settle()
        return self._bad_step

    def row(self, names: Sequence[str]) -> dict[str, float]:
        """What was counted, a mean over images: `train_accuracy` and the loss terms of these names."""
        means = {name: total / self._rows for name, total in zip(names, self.sums.tolist(), strict=True)}
        return {"train_accuracy": int(self.correct) / self._rows, **means}

    def pack(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        rows = torch.tensor(self._rows)
        return {"sums": self.sums, "rows": rows, "correct": self.correct, "bad_step": self.bad_step}

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `pack`."""
        self._waiting = []
        self.sums, self._correct, self._bad_step = (
            tensors[name].to(self.sums.device, copy=True) for name in ("sums", "correct", "bad_step")
        )
        self._rows = int(tensors["rows"])


def together(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What several processes have counted, as `Tally.pack` gives it, as one."""
    sums = {name: torch.stack([part[name] for part in parts]).sum(0) for name in ("sums", "rows", "correct")}
    bad = [step for part in parts if (step := int(part["bad_step"])) >= 0]
    return {**sums, "bad_step": torch.tensor(min(bad, default=-1))}
