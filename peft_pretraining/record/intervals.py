"""Means of few runs with their 95 % intervals: Student's t, no scipy."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values; low and high are None for a single value, which says nothing of its scatter."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width of an interval that is symmetric."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval of one or more values, taken as independent draws."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> Interval:
    """Geometric mean of first / second over pairs, and the 95 % interval from the t-interval of the logarithms."""
    found = mean_interval([math.log(first / second) for first, second in pairs])
    low, high = (None if bound is None else math.exp(bound) for bound in (found.low, found.high))
    return Interval(math.exp(found.mean), low, high, found.n)


@functools.cache
def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t within whose +- a share `confidence` of Student's distribution lies. Raises ValueError below one degree."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: at least two values are needed")
    low, high = 0.0, math.pi / 2
    for _ in range(80):  # halves an angle to below the spacing of floats
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _share_within(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)): Abramowitz & Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for number in range(1, degrees // 2 + 1):
        total += term
        term *= cosine**2 * ((2 * number) / (2 * number + 1) if odd else (2 * number - 1) / (2 * number))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
