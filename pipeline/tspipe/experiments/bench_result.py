"""What `tspipe bench` measured."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """`what`, and what it is compared with after the stroke: seconds, medians of n turns; quartiles of ours / floor."""

    what: str
    floor: float
    ours: float
    ratio: float
    lower: float
    upper: float
    n: int


@dataclass(frozen=True)
class Result:
    """What was measured; `asdict` of it is the JSON."""

    cache: str
    environment: dict[str, Any]
    lines: list[Line]
    facts: dict[str, float]
    sentence: str


def as_json(result: Result) -> dict[str, Any]:
    """A result as JSON has it; times are seconds."""
    return asdict(result)
