"""One update: forward, backward, all-reduce, clip, step; independent of arguments, files, dashboards and clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from peft_pretraining.distributed.parallel import gradient_sync, is_sharded
from peft_pretraining.distributed.world import World, all_reduce_sum_, totals
from peft_pretraining.optim.updates import Updates

if TYPE_CHECKING:
    from peft_pretraining.data.loader import Batch

MAX_SKIPPED_IN_A_ROW = 10
WAY_OUT = (
    "resume from the last checkpoint (--continue_from the run's folder) with a lower --lr or --grad_clipping 1.0 (with "
    "--per_layer: --grad_norm_growth 1.01, unless --accumulate moments), and --allow_changes with the names of the flags that "
    "you change"
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


@dataclass
class TrainState:
    """A run's progress."""

    update_step: int = 0  # finished updates
    tokens_seen: int = 0  # text tokens trained on, over all processes
    skipped_updates: int = 0  # finished updates in which a tensor was not stepped because of a non-finite number


@dataclass(frozen=True)
class StepResult:
    """Results of one update over all processes; tensors stay on the device, so that nothing waits for them."""

    loss: torch.Tensor  # mean over the update's target tokens, float32
    gradnorm: torch.Tensor  # global norm before clipping, float32
    skipped: torch.Tensor  # number of tensors not stepped because of a non-finite loss or gradient, float32
    num_tokens: int  # tokens of text
    num_bad_records: int  # bad records skipped


def train_step(
    module: nn.Module,
    updates: Updates,
    micro_batches: Sequence[Batch],
    *,
    lr: float,
    world: World,
    device: torch.device,
    progress: float = 0.0,
) -> StepResult:
    """Performs one update with the gradient of the mean token loss over all sequences of the update.

    The loss is the sum of token losses divided by the number of target tokens of all micro-batches and processes. Therefore
    1 process x 4 micro-batches = 2 x 2 = 4 x 1, even if micro-batches have different numbers of tokens.

    If the loss is non-finite, nothing is stepped. If a gradient is non-finite, nothing is stepped, except that per-layer updates
    step the tensors with finite gradients.

    Two cases wait for the device: each step of an optimizer that must know in Python whether to step (`step_unless`), and
    per-layer updates, which need the loss before the last backward pass.

    Args:
        module: maps (input_ids, labels, num_targets) to the float32 sum of token losses: a TokenLoss (model.loss), in
            DistributedDataParallel or sharded where there are several processes.
        updates: steps the parameters, after the last backward pass or inside it.
        micro_batches: this process's share of the update.
        lr: learning rate of this update.
        progress: share of the run that is over, for optimizers with a schedule of their own.
    """
    num_targets, num_tokens, num_bad_records = totals(
        [
            sum(batch.num_targets for batch in micro_batches),
            sum(batch.num_tokens for batch in micro_batches),
            sum(batch.num_bad_records for batch in micro_batches),
        ],
        world,
    )
    # Gradients are averaged over processes; multiplying by their number gives the sum that the mean over tokens needs.
    gradient_scale = world.size / max(1, num_targets)

    updates.begin(lr, progress)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    abandoned = False
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with gradient_sync(module, enabled=last):
            # From pinned memory, so the copy does not block this process.
            input_ids = batch.input_ids.to(device, non_blocking=True)
            loss = module(input_ids, batch.labels.to(device, non_blocking=True), batch.num_targets)
            loss_sum += loss.detach()
            if last:
                all_reduce_sum_(loss_sum, world)
                # Per-layer updates step in this backward pass, so whether to step must be known before it; waits for the device.
                abandoned = updates.steps_in_backward and not bool(torch.isfinite(loss_sum))
            # FSDP2 keeps gradients of earlier micro-batches until a backward pass sums them, so it always runs that pass.
            if not abandoned or is_sharded(module):
                updates.before_backward(last and not abandoned)
                (loss * gradient_scale).backward()
    outcome = updates.abandon() if abandoned else updates.finish(loss_sum)
    return StepResult((loss_sum / max(1, num_targets)).float(), outcome.gradnorm, outcome.skipped, num_tokens, num_bad_records)
