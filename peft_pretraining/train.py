"""One update: forward, backward, all-reduce, clip, step. No arguments, files, dashboards or clocks in here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from peft_pretraining.distributed import World, all_reduce_sum_, gradient_sync


class Batch(Protocol):
    """What a micro-batch offers; T tokens per sequence, labels as transformers has them (unshifted, -100 is ignored)."""

    input_ids: torch.Tensor  # (batch, T) int64
    labels: torch.Tensor  # (batch, T) int64
    num_tokens: int  # inputs that are text
    num_targets: int  # labels that count, after the shift


@dataclass
class TrainState:
    """How far a run has come."""

    update_step: int = 0  # finished updates
    tokens_seen: int = 0  # tokens of text that went in, over all processes


@dataclass(frozen=True)
class StepResult:
    """What one update was, over all processes; tensors stay on the device so that nothing waits for them."""

    loss: torch.Tensor  # mean over the update's target tokens, float32
    gradnorm: torch.Tensor  # global norm before clipping, float32
    num_tokens: torch.Tensor  # tokens of text, int64


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    lr: float,
    grad_clipping: float | None,
    world: World,
    device: torch.device,
) -> StepResult:
    """One optimizer step on the gradient of the mean token loss of the whole update.

    The loss is the sum of token losses over the number of target tokens of all micro-batches and processes, so that
    1 process x 4 micro-batches = 2 x 2 = 4 x 1, however unequal the micro-batches' token counts are.

    Args:
        module: maps (input_ids, labels) to the float32 sum of token losses; wrapped by `distributed.parallelize`.
        micro_batches: this process's share of the update.
        lr: learning rate of this update.
        grad_clipping: largest global gradient norm, None for no limit.
    """
    counts = torch.tensor(
        [sum(batch.num_targets for batch in micro_batches), sum(batch.num_tokens for batch in micro_batches)],
        dtype=torch.int64,
        device=device,
    )
    num_targets, num_tokens = all_reduce_sum_(counts, world).unbind()
    # DDP averages gradients over the processes; times their number it is the sum that the mean over all tokens needs.
    gradient_scale = world.size / num_targets.clamp(min=1).to(torch.float32)

    optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    for number, batch in enumerate(micro_batches, start=1):
        with gradient_sync(module, enabled=number == len(micro_batches)):
            loss = module(batch.input_ids.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True))
            (loss * gradient_scale).backward()
        loss_sum += loss.detach()
    all_reduce_sum_(loss_sum, world)

    gradnorm = clip_gradients(module.parameters(), grad_clipping)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_sum / num_targets.clamp(min=1), gradnorm, num_tokens)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """The true global L2 norm of all gradients, float32, on the device; scales them down to `max_norm` where given."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Summed in float32: a bfloat16 sum of squares would keep three digits.
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.dtype))
    return total
