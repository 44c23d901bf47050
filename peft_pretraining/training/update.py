"""One update: forward, backward, all-reduce, clip, step. No arguments, files, dashboards or clocks in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from peft_pretraining.distributed.parallel import gradient_sync, is_sharded
from peft_pretraining.distributed.world import World, all_reduce_sum_, totals
from peft_pretraining.optim import Updates


class Batch(Protocol):
    """What a micro-batch offers; T tokens per sequence, labels as transformers has them (unshifted, -100 is ignored)."""

    @property
    def input_ids(self) -> torch.Tensor: ...  # (batch, T) int64
    @property
    def labels(self) -> torch.Tensor: ...  # (batch, T) int64
    @property
    def num_tokens(self) -> int: ...  # inputs that are text
    @property
    def num_targets(self) -> int: ...  # labels that count, after the shift
    @property
    def num_bad_records(self) -> int: ...  # passed over on the way to it


@dataclass
class TrainState:
    """How far a run has come."""

    update_step: int = 0  # finished updates
    tokens_seen: int = 0  # tokens of text that went in, over all processes
    skipped_updates: int = 0  # of the finished ones, in which a tensor was not stepped because of a number that is not finite


@dataclass(frozen=True)
class StepResult:
    """What one update was, over all processes; tensors stay on the device so that nothing waits for them."""

    loss: torch.Tensor  # mean over the update's target tokens, float32
    gradnorm: torch.Tensor  # global norm before clipping, float32
    skipped: torch.Tensor  # tensors that were not stepped because loss or gradient was not finite, float32
    num_tokens: int  # tokens of text
    num_bad_records: int  # records of the data passed over


def train_step(
    module: nn.Module,
    updates: Updates,
    micro_batches: Sequence[Batch],
    *,
    lr: float,
    world: World,
    device: torch.device,
) -> StepResult:
    """One update by the gradient of the mean token loss over all of its sequences.

    The loss is the sum of token losses over the number of target tokens of all micro-batches and processes, so that
    1 process x 4 micro-batches = 2 x 2 = 4 x 1, however unequal the micro-batches' token counts are.

    Where the loss or a gradient is not finite, nothing is stepped (per layer: only tensors whose gradient is finite).

    Nothing in here waits for the device, but: an optimizer that needs to know in Python whether to step (`step_unless`), and
    with per-layer updates the loss before the last backward pass.

    Args:
        module: maps (input_ids, labels, num_targets) to the float32 sum of token losses; as `parallel` shares it among
            processes.
        updates: steps the parameters, after the last backward pass or inside it.
        micro_batches: this process's share of the update.
        lr: learning rate of this update.
    """
    num_targets, num_tokens, num_bad_records = totals(
        [
            sum(batch.num_targets for batch in micro_batches),
            sum(batch.num_tokens for batch in micro_batches),
            sum(batch.num_bad_records for batch in micro_batches),
        ],
        world,
    )
    # Gradients are averaged over the processes; times their number it is the sum that the mean over all tokens needs.
    gradient_scale = world.size / max(1, num_targets)

    updates.begin(lr)
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    abandoned = False
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with gradient_sync(module, enabled=last):
            # From pinned memory: copied when the device gets there, while this process goes on.
            input_ids = batch.input_ids.to(device, non_blocking=True)
            loss = module(input_ids, batch.labels.to(device, non_blocking=True), batch.num_targets)
            loss_sum += loss.detach()
            if last:
                all_reduce_sum_(loss_sum, world)
                # Stepping begins in this backward pass: what must not be stepped has to be known before it, at the cost of
                # waiting for the forward pass.
                abandoned = updates.steps_in_backward and not bool(torch.isfinite(loss_sum))
            # FSDP2 holds gradients of earlier micro-batches where only a backward pass that sums them takes them from.
            if not abandoned or is_sharded(module):
                updates.before_backward(last and not abandoned)
                (loss * gradient_scale).backward()
    outcome = updates.abandon() if abandoned else updates.finish(loss_sum)
    return StepResult(loss_sum / max(1, num_targets), outcome.gradnorm, outcome.skipped, num_tokens, num_bad_records)
