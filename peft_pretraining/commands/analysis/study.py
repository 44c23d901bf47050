"""Builds and trains the pruning study's models (arXiv 2406.02214, table 1): low-rank plus sparse versions of dense weights.

W = L0 + R, where L0 = B A is the best rank-r approximation of a trained dense weight. All models use SLTrain's layers, with
these factors and an S made of entries of R, so SLTrain's evaluation and training work on them unchanged.

Shapes: O out_features, I in_features, N nonzeros of S.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.commands.analysis.decompose import check_rank, decompose, target_linears
from peft_pretraining.config.arguments import Arguments
from peft_pretraining.distributed.world import World
from peft_pretraining.model.loss import TokenLoss
from peft_pretraining.plan.plan import Plan, learning_rates
from peft_pretraining.run.build import Data, build_updates
from peft_pretraining.training.evaluate import evaluate
from peft_pretraining.training.update import train_step
from sparse_lora import SLTrainConfig, SparseLowRankLinear, reparameterize
from sparse_lora.uniform import UniformSupport

# The row of the unchanged model.
INTACT = "full"
# name -> (support of S, whether its values are trained), in the order of the paper's table
ROWS: dict[str, tuple[str | None, bool]] = {
    INTACT: (None, False),
    "low_rank": (None, False),
    "top_pruned": ("top", False),
    "random_pruned": ("random", False),
    "top_trained": ("top", True),
    "random_trained": ("random", True),
}


def make_rows(
    names: Sequence[str], module: TokenLoss, args: Arguments, plan: Plan, data: Data, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yields the figures of these ROWS in order, "full" first, as later rows change the model in place.

    A row has the held-out "loss" (nats), "perplexity" and "bits_per_byte" (None where not finite), the evaluated "tokens",
    "relative_error" (see `relative_error`), the "updates" that trained its S, and how many were skipped ("skipped_updates").
    """
    splits: dict[str, Split] = {}
    for name in names:
        support, trained = ROWS[name]
        skipped = 0
        if name != INTACT:
            splits = splits or split_model(module.model, args.rank, args.sp_ratio, args.seed)
            set_sparse_parts(splits, support)
            if trained:
                skipped = train_sparse_parts(module, args, plan, data, device)
        result = evaluate(module, data.eval_set, bytes_per_id=data.tokenizer.bytes_per_id())
        yield {
            "row": name,
            "loss": _finite(result.loss),
            "perplexity": _finite(result.perplexity),
            "bits_per_byte": _finite(result.bits_per_byte),
            "tokens": result.tokens,
            "relative_error": relative_error(splits, support) if splits else 0.0,
            "updates": plan.num_training_steps if trained else 0,
            "skipped_updates": skipped,
        }


def _finite(value: float | None) -> float | None:
    """The value, None if not finite: JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Split:
    """A linear's layer with L0 as its factors, and the entries of the residual R that S may get.

    positions, values: entries of R on the "top" and the "random" support, (N,) int64 and float64. squared_norm: ||W||_F^2.
    squared_residual: ||R||_F^2.
    """

    layer: SparseLowRankLinear
    positions: dict[str, Tensor]
    values: dict[str, Tensor]
    squared_norm: float
    squared_residual: float


@torch.no_grad()
def split_model(model: nn.Module, rank: int, sparsity: float, seed: int) -> dict[str, Split]:
    """Replaces the model's dense attention and MLP linears in place by layers with L0 and an S of int(sparsity * O * I) zeros.

    L0's factors have the model's dtype; R is W minus the product of the rounded factors. The random support is the one that
    SLTrain draws with this seed. All parameters except S's values are frozen.

    Raises:
        ValueError: the rank leaves no residual of a weight, or the sparsity leaves S no entry.
    """
    dense = target_linears(model)
    check_rank(dense, rank)
    replaced = reparameterize(model, SLTrainConfig(rank=rank, sparsity=sparsity, alpha=float(rank), seed=seed))
    splits = {name: _split(dense.pop(name), model.get_submodule(name)) for name in replaced}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".sparse_value"))
    return splits


def _split(linear: nn.Module, layer: nn.Module) -> Split:
    assert isinstance(layer, SparseLowRankLinear)
    assert isinstance(layer.support, UniformSupport)
    weight = linear.get_parameter("weight").double()
    for parameter, factor in zip((layer.lora_B, layer.lora_A), decompose(weight).factors(layer.rank), strict=True):
        parameter.copy_(factor)
    if layer.bias is not None:
        layer.bias.copy_(linear.get_parameter("bias"))
    residual = weight - layer.lora_B.double() @ layer.lora_A.double()
    flat = residual.flatten()
    top = flat.abs().topk(layer.support.nnz, sorted=False).indices.sort().values
    positions = {"top": top, "random": layer.support.flat_indices().to(top.device)}
    return Split(
        layer=layer,
        positions=positions,
        values={support: flat[indices] for support, indices in positions.items()},
        squared_norm=float(weight.square().sum()),
        squared_residual=float(flat.square().sum()),
    )


@torch.no_grad()
def set_sparse_parts(splits: Mapping[str, Split], support: str | None) -> None:
    """Sets every S to the residual's entries on the "top" or "random" support; None: to zeros, so only L0 remains."""
    for split in splits.values():
        sparse_value = split.layer.get_parameter("sparse_value")
        if support is None:
            sparse_value.zero_()
            continue
        assert isinstance(split.layer.support, UniformSupport)
        split.layer.support.place_(split.positions[support])
        sparse_value.copy_(split.values[support])


@torch.no_grad()
def relative_error(splits: Mapping[str, Split], support: str | None) -> float:
    """||W - L0 - S||_F / ||W||_F over all replaced linears together, with the current values of S on this support."""
    total = 0.0
    for split in splits.values():
        total += split.squared_residual
        if support is not None:
            values = split.values[support]
            remainder = values - split.layer.get_parameter("sparse_value").double()
            total += float(remainder.square().sum() - values.square().sum())
    return math.sqrt(max(0.0, total) / sum(split.squared_norm for split in splits.values()))


def train_sparse_parts(module: TokenLoss, args: Arguments, plan: Plan, data: Data, device: torch.device) -> int:
    """Trains the sparse values for the plan's updates with the trainer's update and schedule, from the first record of the data.

    Returns:
        The number of skipped updates, whose loss or gradients were not finite.
    """
    world = World()
    initial_state = data.loader.state_dict()
    updates = build_updates(args, module.model, world, device, plan.gradient_accumulation)
    module.train()
    skipped = torch.zeros((), device=device)
    tokens = 0
    try:
        batches = iter(data.loader)
        for step in range(plan.num_training_steps):
            micro_batches = [next(batches) for _ in range(plan.gradient_accumulation)]
            lr = learning_rates(args, plan).at(step, tokens)
            result = train_step(module, updates, micro_batches, lr=lr, world=world, device=device)
            tokens += result.num_tokens
            skipped += result.skipped > 0
            if (step + 1) % max(1, plan.num_training_steps // 10) == 0:
                print(f"  update {step + 1} of {plan.num_training_steps}: loss {float(result.loss):.4f}", file=sys.stderr)
    finally:
        data.loader.take_back(initial_state)
    return int(skipped)
