"""Detects diverging runs: counts updates with a non-finite loss or gradient, and finds sudden jumps of the loss."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

MAX_SKIPPED_IN_A_ROW = 10
_WINDOW, _MIN_LOSSES = 100, 20
_SIGMAS, _MIN_JUMP = 6.0, 0.2


WAY_OUT = (
    "resume from the last checkpoint (--continue_from the run's folder) with a lower --lr or --grad_clipping 1.0, and "
    "--allow_changes lr,grad_clipping"
)


class TrainingError(RuntimeError):
    """Raised when training cannot continue."""


class SkippedUpdates:
    """Counts updates that were skipped whole or for some tensors."""

    def __init__(self, so_far: int = 0):
        """so_far: updates skipped before the run was resumed."""
        self.total = so_far
        self._in_a_row = 0

    def add(self, update_step: int, num_tensors: float) -> None:
        """Adds an update in which `num_tensors` tensors were not stepped. Raises TrainingError after too many in a row."""
        if not num_tensors:
            self._in_a_row = 0
            return
        self.total += 1
        self._in_a_row += 1
        if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{self._in_a_row} updates in a row, up to update {update_step}, had a non-finite loss or gradient and were "
                f"skipped: training has diverged; {WAY_OUT}"
            )

    @property
    def last_one(self) -> bool:
        """True if the newest update was skipped."""
        return self._in_a_row > 0


class LossSpikes:
    """Detects a logged loss far above the last 100 losses: by 6 standard deviations and at least 0.2 nats above their median.

    The standard deviation is estimated as 1.4826 times the median absolute deviation, its value for a normal distribution.
    """

    def __init__(self, losses: Iterable[float | None] = ()):
        """losses: losses logged before the run was resumed, oldest first."""
        self._recent = deque((loss for loss in losses if loss is not None), maxlen=_WINDOW)

    def usual(self, loss: float) -> float | None:
        """Adds a loss; returns the median of the earlier losses if `loss` is a spike, else None (also with too few losses)."""
        usual = None
        if len(self._recent) >= _MIN_LOSSES:
            median = statistics.median(self._recent)
            deviation = 1.4826 * statistics.median(abs(value - median) for value in self._recent)
            if loss > median + max(_MIN_JUMP, _SIGMAS * deviation):
                usual = median
        self._recent.append(loss)
        return usual
