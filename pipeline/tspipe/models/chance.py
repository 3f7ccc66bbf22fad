"""Whether a classifier has learned anything, by its predictions for images with labels."""

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.int64]


def is_suspicious(accuracy: float, labels: Classes) -> bool:
    """Return whether a classifier that has learned nothing may have this accuracy; if so, see `remark`.

    One that always names the most frequent class reaches its share; two standard deviations are added.
    """
    share = np.bincount(labels).max() / len(labels)
    return bool(accuracy <= share + 2 * np.sqrt(share * (1 - share) / len(labels)))


def remark(predicted: Classes, labels: Classes) -> str | None:
    """Describe why predictions are no better than guesses, as the predicate of a sentence; None if they are better.

    Predictions and labels that are drawn independently, each with the frequencies that they have here, agree with
    probability p_e = Σ p_c q_c. More than two standard deviations above it is better than guessing (Cohen's kappa and
    its deviation under independence: Fleiss, Cohen and Everitt, 1969). Where there are so few images that even perfect
    predictions would not be, better is what is nearer to perfect than to p_e. So a classifier of imbalanced classes is
    not taken for a guess because it is wrong more often than one that always names the most frequent class.
    """
    count, classes = len(labels), int(max(predicted.max(), labels.max())) + 1
    if len(np.unique(labels)) == 1:
        return None
    right = float((predicted == labels).mean())
    if len(np.unique(predicted)) == 1:
        return f"gives all {count:,} test images the same class ({right:.2%} are of it)"
    p, q = (np.bincount(one, minlength=classes) / count for one in (predicted, labels))
    expected = float(p @ q)
    deviation = np.sqrt(max(0.0, expected + expected**2 - float((p * q * (p + q)).sum())) / (count - 1))
    limit = expected + min(2 * deviation, (1 - expected) / 2)
    if right > limit:
        return None
    return f"classifies {right:.2%} of the test images correctly, and guesses may reach {limit:.2%}"
