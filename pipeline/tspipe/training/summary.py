"""Sentences on a run: what the teacher calls random images, and how large the terms of a loss are."""

from collections.abc import Iterable, Iterator
from typing import Any

from tspipe.utils.console import plain

_NAME = 60  # characters shown of a class's name


def shares(counts: dict[str, int]) -> str:
    """What the teacher calls the random images, as a sentence; classes under half a percent are left out."""
    total = sum(counts.values())
    found = [f"{plain(name, _NAME)} ({count / total:.0%})" for name, count in counts.items() if count >= total / 200]
    return f"The teacher calls the random images: {', '.join(found[:5])}"


def loss_ratios(rows: Iterable[dict[str, Any]], *, hint: bool) -> Iterator[str]:
    """For rows of an epoch, how large the first loss of two is beside the cross-entropy, a sentence each.

    Where they are far apart a `hint` is given what to do about it.
    """
    for row in rows:
        for term in ("mse", "kl", "vid"):
            if isinstance(row.get(term), float) and row.get("xent"):
                ratio, what = row[term] / row["xent"], f"{plain(row['student'])}, {row['arm']}, epoch {row['epoch']}"
                remedy = ": try --set mse_weight=auto" if hint and term == "mse" and not 0.1 <= ratio <= 10 else ""
                yield f"{what}: {term} {row[term]:.3g} / xent {row['xent']:.3g} = {ratio:.2g}{remedy}"
