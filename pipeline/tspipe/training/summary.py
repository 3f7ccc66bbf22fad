"""Sentences about a run: the teacher's labels for random images, and how the loss terms compare in size."""

from collections.abc import Iterable, Iterator
from typing import Any

from tspipe.utils.console import printable

_MAX_NAME = 60  # characters printed of a class name
_SHOWN = 5  # classes printed


def label_shares(counts: dict[str, int]) -> str:
    """Say how the teacher labels random images; classes below half a percent are left out."""
    total = sum(counts.values())
    shares = [f"{printable(name, _MAX_NAME)} ({n / total:.0%})" for name, n in counts.items() if n >= total / 200]
    return f"The teacher's labels for random images: {', '.join(shares[:_SHOWN])}"


def loss_ratios(rows: Iterable[dict[str, Any]], *, hint: bool) -> Iterator[str]:
    """Yield a sentence per row that compares the teacher's loss term with the cross-entropy.

    With `hint`, it ends with what to do if they are far apart.
    """
    for row in rows:
        for term in ("mse", "kl", "vid"):
            if isinstance(row.get(term), float) and row.get("xent"):
                ratio, learner = (
                    row[term] / row["xent"],
                    f"{printable(row['student'])}, {row['arm']}, epoch {row['epoch']}",
                )
                remedy = ": try --set mse_weight=auto" if hint and term == "mse" and not 0.1 <= ratio <= 10 else ""
                yield f"{learner}: {term} {row[term]:.3g} / xent {row['xent']:.3g} = {ratio:.2g}{remedy}"
