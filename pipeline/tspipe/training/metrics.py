"""The metrics of an epoch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_MAX_PENDING = 64  # steps evaluated at once


class EpochMetrics:
    """Loss terms, image count and correct predictions of an epoch, kept on the device without waiting for it.

    Correct predictions and non-finite losses are counted for many steps at once, because counting costs a small
    network a noticeable part of each step.

    Args:
        names: the loss terms.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names, self.device = list(names), device
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._sums = torch.zeros(len(self.names), device=self.device)
        self._rows, self._correct = 0, torch.tensor(0, device=self.device)
        self._bad_step = torch.tensor(-1, device=self.device)
        self._first_pending = 0
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, step: int, terms: Tensor, weight: float, logits: Tensor, labels: Tensor) -> None:
        """Add a training step.

        Args:
            step: its number in the epoch.
            terms: its loss terms (t,); their sum is the loss.
            weight: how many images the terms are a mean over.
            logits: (n, c) for the images with these labels (n,) int64.
        """
        if len(self._pending) == _MAX_PENDING or step != self._first_pending + len(self._pending):
            self._evaluate_pending()
            self._first_pending = step
        terms = terms.detach()
        self._sums.add_(terms, alpha=weight)
        self._pending.append((terms, logits.argmax(1), labels))
        self._rows += len(labels)

    def _evaluate_pending(self) -> None:
        if not self._pending:
            return
        terms, predictions, labels = zip(*self._pending, strict=True)
        self._pending = []
        self._correct += (torch.cat(predictions) == torch.cat(labels)).sum()
        bad = ~torch.stack(terms).sum(1).isfinite()
        first = self._first_pending + bad.int().argmax()
        self._bad_step = torch.where((self._bad_step < 0) & bad.any(), first, self._bad_step)

    @property
    def correct(self) -> Tensor:
        """The number of correct predictions, ()."""
        self._evaluate_pending()
        return self._correct

    @property
    def bad_step(self) -> Tensor:
        """The first step with a non-finite loss, or -1, ()."""
        self._evaluate_pending()
        return self._bad_step

    def means(self) -> dict[str, float]:
        """Return `train_accuracy` and the mean of each loss term over images."""
        means = {name: total / self._rows for name, total in zip(self.names, self._sums.tolist(), strict=True)}
        return {"train_accuracy": int(self.correct) / self._rows, **means}

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything counted so far as tensors."""
        rows = torch.tensor(self._rows)
        return {"sums": self._sums, "rows": rows, "correct": self.correct, "bad_step": self.bad_step}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        self._pending = []
        self._sums, self._correct, self._bad_step = (
            tensors[name].to(self.device, copy=True) for name in ("sums", "correct", "bad_step")
        )
        self._rows = int(tensors["rows"])


def merge_metrics(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Merge the `EpochMetrics.state_dict()` of several processes into one."""
    sums = {name: torch.stack([part[name] for part in parts]).sum(0) for name in ("sums", "rows", "correct")}
    bad = [step for part in parts if (step := int(part["bad_step"])) >= 0]
    return {**sums, "bad_step": torch.tensor(min(bad, default=-1))}
