"""Evaluation: computes the mean token loss over a data set, independent of batch size and number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peft_pretraining.model.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from peft_pretraining.data.loader import Batch


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    loss: mean over target tokens, nats. perplexity: exp(loss). tokens: number of target tokens.
    bits_per_byte: loss per UTF-8 byte of the targets' text, in bits; None without byte counts.
    """

    loss: float
    perplexity: float
    tokens: int
    bits_per_byte: float | None = None


# For each batch the sum of its token losses and the number of its target tokens.
Batches = list[tuple[Tensor, Tensor]]


class NothingToEvaluate(ValueError):
    """Raised when an evaluation set contains no target token."""


def perplexity_of(loss: float) -> float:
    """Returns exp(loss); inf instead of an overflow, NaN for NaN."""
    return math.inf if loss >= 709 else math.exp(loss)


@torch.no_grad()
def evaluate(
    loss_module: nn.Module,
    batches: Iterable[Batch],
    *,
    world_reduce: Callable[[Tensor], object] | None = None,
    bytes_per_id: Tensor | None = None,
    each: Batches | None = None,
) -> EvalResult:
    """Computes the mean token loss over `batches` in eval mode; each module's mode is restored afterwards.

    Args:
        loss_module: maps (input_ids, labels, num_targets) to the sum of token losses, like TokenLoss. Not wrapped in
            DistributedDataParallel, whose forward is collective: processes may have different numbers of batches.
        batches: token ids and labels on any device; labels as in transformers, -100 where no token is predicted.
        world_reduce: sums a small float64 tensor over all processes, in place; called once, at the end.
        bytes_per_id: (V,), number of UTF-8 bytes of each token id, needed for bits per byte.
        each: a list that receives the sum of losses and the number of targets of every batch, scalars on the device.

    Sums are accumulated in float64.

    Raises:
        NothingToEvaluate: the batches contain no target token.
    """
    device = next(loss_module.parameters()).device
    # Sums of losses, target tokens and bytes.
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    sizes = None if bytes_per_id is None else bytes_per_id.to(device)
    modes = [(module, module.training) for module in loss_module.modules()]
    loss_module.eval()
    try:
        for batch in batches:
            input_ids = batch.input_ids.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            targets = labels[:, 1:]
            valid = targets != IGNORE_INDEX
            loss, count = loss_module(input_ids, labels, batch.num_targets).double(), valid.sum()
            sums[0] += loss
            sums[1] += count
            if each is not None:
                each.append((loss, count))
            if sizes is not None:
                sums[2] += (sizes[targets.clamp(min=0)] * valid).sum()
    finally:
        for module, mode in modes:
            module.training = mode
    if world_reduce is not None:
        world_reduce(sums)
    loss_sum, tokens, num_bytes = sums.tolist()
    if tokens == 0:
        raise NothingToEvaluate("the evaluation set contains no target token; check --eval_dataset and --eval_tokens")
    loss = loss_sum / tokens
    return EvalResult(
        loss=loss,
        perplexity=perplexity_of(loss),
        tokens=int(tokens),
        bits_per_byte=loss_sum / math.log(2) / num_bytes if num_bytes else None,
    )
