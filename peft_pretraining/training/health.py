"""Numbers that tell of a sick run: updates with a loss or gradient that is not finite, and losses that jump."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

MAX_SKIPPED_IN_A_ROW = 10
_WINDOW, _MIN_LOSSES = 100, 20
_SIGMAS, _MIN_JUMP = 6.0, 0.2


WAY_OUT = (
    "go on from the last checkpoint (--continue_from the run's folder) with a lower --lr or --grad_clipping 1.0, and "
    "--allow_changes lr,grad_clipping"
)


class TrainingError(RuntimeError):
    """The run cannot go on."""


class SkippedUpdates:
    """Counts updates that were skipped, or of which tensors were."""

    def __init__(self, so_far: int = 0):
        """so_far: skipped before the run went on here."""
        self.total = so_far
        self._in_a_row = 0

    def add(self, update_step: int, num_tensors: float) -> None:
        """One more update, of which `num_tensors` were not stepped. Raises TrainingError after too many in a row."""
        if not num_tensors:
            self._in_a_row = 0
            return
        self.total += 1
        self._in_a_row += 1
        if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{self._in_a_row} updates in a row, up to update {update_step}, had a loss or a gradient that is not finite and "
                f"were skipped: training has diverged; {WAY_OUT}"
            )

    @property
    def last_one(self) -> bool:
        """Whether the newest update was skipped."""
        return self._in_a_row > 0


class LossSpikes:
    """Tells a logged loss that lies far above the last hundred: by 6 standard deviations (from the median absolute deviation),
    and by 0.2 nats at least."""

    def __init__(self, losses: Iterable[float | None] = ()):
        """losses: logged before, oldest first."""
        self._recent = deque((loss for loss in losses if loss is not None), maxlen=_WINDOW)

    def usual(self, loss: float) -> float | None:
        """The median that `loss` jumped away from; None where it did not, or too few are known."""
        found = None
        if len(self._recent) >= _MIN_LOSSES:
            median = statistics.median(self._recent)
            deviation = 1.4826 * statistics.median(abs(value - median) for value in self._recent)
            if loss > median + max(_MIN_JUMP, _SIGMAS * deviation):
                found = median
        self._recent.append(loss)
        return found
