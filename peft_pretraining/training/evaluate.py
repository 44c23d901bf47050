"""Evaluation: the mean token loss over a set, counted exactly and independent of batch size and process count."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from peft_pretraining.model.loss import IGNORE_INDEX


class LabelledBatch(Protocol):
    """What evaluation needs of a batch: token ids and labels, both (B, T), and how many targets those are."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def num_targets(self) -> int: ...


@dataclass(frozen=True)
class EvalResult:
    """loss: mean over target tokens, nats. perplexity: exp(loss). tokens: targets counted. bits_per_byte: of their text."""

    loss: float
    perplexity: float
    tokens: int
    bits_per_byte: float | None = None


# Of each batch: the sum of its token losses, and how many there are.
Batches = list[tuple[Tensor, Tensor]]


class NothingToEvaluate(ValueError):
    """An evaluation set without a target token."""


@torch.no_grad()
def evaluate(
    loss_module: nn.Module,
    batches: Iterable[LabelledBatch],
    *,
    world_reduce: Callable[[Tensor], object] | None = None,
    bytes_per_id: Tensor | None = None,
    each: Batches | None = None,
) -> EvalResult:
    """Mean token loss over `batches`, in eval mode (each module's mode is restored), sums in float64.

    Args:
        loss_module: (input_ids, labels, num_targets) -> sum of token losses, as loss.TokenLoss. Not wrapped in
            DistributedDataParallel, whose forward is collective: processes may have different numbers of batches.
        batches: token ids and labels on any device; labels as in transformers, -100 where nothing is predicted.
        world_reduce: adds a small float64 tensor over all processes, in place; called once, at the end.
        bytes_per_id: (V,), UTF-8 bytes that each id stands for; with it bits per byte are computed.
        each: gets the sum of losses and the number of targets of every batch, scalars on the device.

    Raises:
        NothingToEvaluate: no target token in all of `batches`.
    """
    device = next(loss_module.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # losses, tokens, bytes
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
        raise NothingToEvaluate("the evaluation set holds no target token; check --eval_dataset and --eval_tokens")
    loss = loss_sum / tokens
    return EvalResult(
        loss=loss,
        perplexity=math.exp(loss) if loss < 709 else math.inf,
        tokens=int(tokens),
        bits_per_byte=loss_sum / math.log(2) / num_bytes if num_bytes else None,
    )
