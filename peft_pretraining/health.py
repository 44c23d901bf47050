"""Numbers that tell of a sick run: updates with a loss or gradient that is not finite, and losses that jump."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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
    """Counts updates that were skipped, or of which tensors were, on the device: reading is left to who logs."""

    def __init__(self, so_far: int, device: torch.device):
        """so_far: skipped before the run went on here."""
        import torch

        self._total = torch.tensor(so_far, dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._most_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, skipped: torch.Tensor) -> None:
        """One more update, of which `skipped` tensors were not stepped."""
        bad = (skipped > 0).to(self._total.dtype)
        self._total += bad
        self._in_a_row += bad
        self._in_a_row *= bad
        self._most_in_a_row.copy_(self._most_in_a_row.maximum(self._in_a_row))

    def read(self, update_step: int) -> int:
        """Updates skipped since the run began; waits for the device. Raises TrainingError after too many in a row."""
        most_in_a_row = int(self._most_in_a_row)
        if most_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{most_in_a_row} updates in a row, up to update {update_step}, had a loss or a gradient that is not finite and "
                f"were skipped: training has diverged; {WAY_OUT}"
            )
        return int(self._total)

    @property
    def last_one(self) -> bool:
        """Whether the newest update was skipped; waits for the device."""
        return bool(self._in_a_row)


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
