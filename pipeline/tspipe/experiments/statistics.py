"""Paired differences and their confidence intervals."""

import math
import statistics
from dataclasses import dataclass

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal quantile with a correction.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
HELPS, HURTS, UNDECIDED = "it helps", "it hurts", "no difference shown"
ONE_SEED, TWO_SEEDS = "one seed: no interval, so no conclusion", "two seeds: too few seeds for an interval"


@dataclass(frozen=True)
class Sample:
    """One value per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def margin(self) -> float | None:
        """Half the width of Student's 95 % confidence interval of the mean; None for one value or two.

        The interval of two values reaches 9 sample deviations to either side, too wide to be of use.
        """
        if self.deviation is None or len(self.values) == 2:
            return None
        freedom = len(self.values) - 1
        t = _T[freedom - 1] if freedom <= len(_T) else 1.960 + 2.37 / freedom
        return t * self.deviation / math.sqrt(len(self.values))

    @property
    def conclusion(self) -> str:
        """The conclusion from a sample of differences: whether its interval excludes zero."""
        if self.margin is None:
            return TWO_SEEDS if self.deviation is not None else ONE_SEED
        return HELPS if self.mean > self.margin else HURTS if self.mean < -self.margin else UNDECIDED

    def __sub__(self, other: "Sample") -> "Sample":
        """Return the differences, seed by seed."""
        return Sample(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))
