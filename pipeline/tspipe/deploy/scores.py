"""How good predictions are: accuracy, F1, calibration, agreement with the teacher."""

from typing import NamedTuple

import torch
from torch import Tensor

_BINS = 15  # of the calibration error, as in Guo et al. 2017, arXiv 1706.04599


class Scores(NamedTuple):
    """The scores of a classifier, fractions.

    Attributes:
        top1: the accuracy.
        top5: how often the label is among the five most probable classes; None for five classes or fewer.
        macro_f1: the mean of the F1 of each class that occurs as a label or a prediction.
        calibration_error: the expected calibration error over 15 bins of equal width.
        agreement: how often the prediction is the teacher's.
        worst_classes: up to three classes with images, those of the lowest accuracy first, and their accuracy.
    """

    top1: float
    top5: float | None
    macro_f1: float
    calibration_error: float
    agreement: float
    worst_classes: list[tuple[int, float]]


def score(probabilities: Tensor, labels: Tensor, teacher_labels: Tensor) -> Scores:
    """Return the scores of probabilities (n, c), given labels and the teacher's predictions (n,) int64."""
    confidence, predicted = probabilities.max(1)
    correct = (predicted == labels).double()
    classes = probabilities.shape[1]
    in_top5 = (probabilities.topk(5).indices == labels[:, None]).any(1).double() if classes > 5 else None
    return Scores(
        float(correct.mean()),
        None if in_top5 is None else float(in_top5.mean()),
        macro_f1(predicted, labels, classes),
        calibration_error(confidence, correct),
        float((predicted == teacher_labels).double().mean()),
        worst_classes(predicted, labels, classes),
    )


def worst_classes(predicted: Tensor, labels: Tensor, classes: int, most: int = 3) -> list[tuple[int, float]]:
    """Return the classes with the lowest accuracy on their images, of those that have any, and their accuracy."""
    hits = torch.bincount(labels[predicted == labels], minlength=classes).double()
    accuracies = hits / torch.bincount(labels, minlength=classes)  # NaN for a class without images
    ranked = accuracies.sort(stable=True)
    pairs = zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True)
    return [(label, value) for label, value in pairs if value == value][:most]


def macro_f1(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Return the mean over classes of F1 = 2·TP / (2·TP + FP + FN), of those that occur in either tensor (n,) int64."""
    hits = torch.bincount(labels[predicted == labels], minlength=classes).double()
    total = (torch.bincount(predicted, minlength=classes) + torch.bincount(labels, minlength=classes)).double()
    return float((2 * hits / total)[total > 0].mean())


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Return the mean over images of |accuracy − confidence| in each image's bin of confidence (n,)."""
    bins = (confidence.double() * _BINS).ceil().long().clamp(1, _BINS) - 1
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, correct.double() - confidence.double())
    return float(gaps.abs().sum() / len(confidence))
