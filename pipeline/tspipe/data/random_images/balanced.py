"""Balanced random images: more are drawn than needed, and those are kept whose labels spread evenly over the classes.

The teacher labels each candidate, so an image costs up to `rounds` passes of the teacher. The paper leaves
balancing to future work.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def select(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return `count` of the candidates, in order, so that the largest count of a class is as small as possible.

    Of each class, the first candidates are kept.

    Args:
        labels: (n,) int64, the label of each candidate, n ≥ `count`.
    """
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels)
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts[order]  # how many earlier candidates have the same label
    return np.sort(np.argsort(rank, kind="stable")[:count])


def choose(
    label: Callable[[int], NDArray[np.int64]], count: int, classes: int, rounds: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw candidates in rounds until they can be balanced or the rounds are used up.

    Args:
        label: returns the labels (count,) int64 of the candidates of a round, numbered from 0.
        classes: the number of classes.

    Returns the numbers of the chosen candidates (count,) and the labels of all candidates (r · count,).
    """
    labels, most = np.empty(0, np.int64), -(-count // classes)
    for number in range(rounds):
        labels = np.concatenate([labels, label(number)])
        if np.minimum(np.bincount(labels), most).sum() >= count:
            break
    return select(labels, count), labels
