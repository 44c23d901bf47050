"""Computes means of a few runs and their 95 % intervals by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values with its interval; low and high are None for a single value, whose scatter is unknown."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width of a symmetric interval; None without an interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval of one or more independent values."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> Interval:
    """Geometric mean of first / second over pairs, and the 95 % interval from the t-interval of the logarithms."""
    logarithms = mean_interval([math.log(first / second) for first, second in pairs])
    low, high = (None if bound is None else math.exp(bound) for bound in (logarithms.low, logarithms.high))
    return Interval(math.exp(logarithms.mean), low, high, logarithms.n)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with probability `confidence` between -t and t in Student's distribution. Raises ValueError for degrees < 1."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: at least two values are needed")
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + confidence) / 2))
