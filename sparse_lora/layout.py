"""How many bytes the positions of a uniform support take, and where each part of them lies.

Sorted positions are stored as the gaps between them, one byte each: with a share delta of all entries the mean gap is
1 / delta, and a gap of 256 or more has the probability exp(-256 delta), 2e-6 at delta .05 and 8 % at .01. Of those escaped gaps
the lower byte stands in its place as for any other, the upper byte and the place in a list of their own, whose sorted places are
stored in the same way. Where fewer positions make gaps long, two bytes each, or the plain positions, take less.

The sizes follow from the shape alone, so that a tensor can be allocated, loaded and accounted for before anything is drawn: the
list of escaped gaps has room for 12 standard deviations above what a uniform draw is expected to need.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

_SPARE_DEVIATIONS = 12
# Gaps beyond the upper byte's reach must be rarer than this, all together, or the width is not taken.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Layout:
    """Storage of up to `count` sorted numbers below `limit`.

    width: bytes per number; 1 and 2 are gaps (`escaped` is then set), 4 and 8 plain numbers.
    escaped: the layout of the places of the gaps that do not fit in `width` bytes.
    """

    count: int
    limit: int
    width: int
    escaped: Layout | None = None

    @property
    def upper_bytes_at(self) -> int:
        """Offset of the escaped gaps' upper bytes; parts begin at multiples of 8, so that they can be viewed as integers."""
        return _aligned(self.count * self.width)

    @property
    def places_at(self) -> int:
        """Offset of the escaped gaps' places."""
        return self.upper_bytes_at + _aligned(0 if self.escaped is None else self.escaped.count)

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.count * self.width if self.escaped is None else self.places_at + self.escaped.nbytes


def plain_layout(count: int, limit: int) -> Layout:
    """`count` plain numbers below `limit`, however they lie."""
    return Layout(count, limit, 4 if limit <= 2**31 else 8)


@functools.cache
def layout_for(nnz: int, numel: int) -> Layout:
    """The smallest layout for `nnz` uniformly drawn positions below `numel`."""
    return _smallest(nnz, nnz, nnz, numel)


def _smallest(count: int, expected: float, fewest: float, limit: int) -> Layout:
    """Smallest layout with room for `count` numbers below `limit`; `expected` and at least `fewest` will be there."""
    candidates = [plain_layout(count, limit)]
    for width in (1, 2):
        reach = 256**width
        if expected * _share_of_gaps(reach * 256, fewest, limit) > _NEGLIGIBLE:
            continue
        escaped = expected * _share_of_gaps(reach, fewest, limit)
        room = math.ceil(escaped + _SPARE_DEVIATIONS * (math.sqrt(escaped) + 1))
        room = min(room, limit // reach, count)
        if room < count:
            below = max(0.0, escaped - _SPARE_DEVIATIONS * math.sqrt(escaped))
            candidates.append(Layout(count, limit, width, _smallest(room, escaped, below, count)))
    return min(candidates, key=lambda layout: layout.nbytes)


def _share_of_gaps(length: int, count: float, limit: int) -> float:
    """Probability that a gap between `count` uniform numbers below `limit` is at least `length`."""
    return 0.0 if length >= limit else math.exp(count * math.log1p(-length / limit))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 8) * 8
