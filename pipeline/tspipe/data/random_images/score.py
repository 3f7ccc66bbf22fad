"""How a kind of random images is scored before any student is trained: from the teacher's logits alone."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tspipe.utils.console import printable

_NAME_LENGTH, _CLASSES = 60, 5  # printed of a class name, and printed of all classes
_MEAN_OF = 640  # images in a mean, as in the code of arXiv 2012.02909


class Score(NamedTuple):
    """The score of images that a teacher has labelled.

    Attributes:
        images: their number.
        classes: exp of the entropy of the shares of labels: the number of classes that even labels would have.
        largest: the index of the most frequent class.
        share: its share of the labels.
        entropy: of the teacher's probabilities, in nats, the mean over images.
        deviation: the standard deviation of the teacher's mean probability over 640 images, the mean over classes
            (Wang, Lohit, Jones and Fu, arXiv 2012.02909, "T. stddev"). For independent images it is the deviation
            over single images divided by √640, which needs no repeated means. Of two augmentations, the paper finds
            that the one with the smaller deviation helps distillation more.
    """

    images: int
    classes: float
    largest: int
    share: float
    entropy: float
    deviation: float


def score(logits: NDArray[np.floating]) -> Score:
    """Score images by the teacher's logits (n, c), n ≥ 2."""
    log_probabilities = logits - logits.max(1, keepdims=True).astype(np.float64)
    log_probabilities -= np.log(np.exp(log_probabilities).sum(1, keepdims=True))
    probabilities = np.exp(log_probabilities)
    shares = np.bincount(logits.argmax(1), minlength=logits.shape[1]) / len(logits)
    present = shares[shares > 0]
    return Score(
        len(logits),
        float(np.exp(-(present * np.log(present)).sum())),
        int(shares.argmax()),
        float(shares.max()),
        float(-(probabilities * log_probabilities).sum(1).mean()),
        float(probabilities.std(0, ddof=1).mean() / np.sqrt(_MEAN_OF)),
    )


def label_counts(labels: NDArray[np.int64], classes: Sequence[str]) -> dict[str, int]:
    """Return how often each label (n,) occurs, by class name, the most frequent first."""
    counts = np.bincount(labels, minlength=len(classes))
    return {classes[label]: int(counts[label]) for label in np.argsort(-counts, kind="stable") if counts[label]}


def balance_report(before: Mapping[str, int], after: Mapping[str, int], passes: float) -> list[str]:
    """Say how the teacher labels the candidates and the images chosen from them.

    Args:
        before: how often each label occurs among the candidates, by class name.
        after: the same of the chosen images.
        passes: of the teacher, for each chosen image.
    """
    cost = f"random images before balancing, {passes:.1f} passes of the teacher for each that is kept"
    return [label_shares(before, cost), label_shares(after, "the balanced images")]


def label_shares(counts: Mapping[str, int], what: str = "random images") -> str:
    """Say how the teacher labels images; classes below half a percent are left out."""
    total = sum(counts.values())
    shares = [f"{printable(name, _NAME_LENGTH)} ({n / total:.0%})" for name, n in counts.items() if n >= total / 200]
    return f"The teacher's labels for {what}: {', '.join(shares[:_CLASSES])}"
