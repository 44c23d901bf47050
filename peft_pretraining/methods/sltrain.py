"""SLTrain (arXiv 2406.02214): linears are (alpha / r) B A + S, S on a fixed random support; lowrank is the same without S."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_pretraining.config.arguments import (
    Arguments,
)

if TYPE_CHECKING:
    from torch import nn

    from sparse_lora import SLTrainConfig


def _block_problems(sp_ratio: float) -> list[str]:
    """Blocks have a share 1 / k of a weight's entries; it must be near what was asked for (sparse_lora.block.block_count)."""
    blocks = block_count(sp_ratio)
    if abs(1 / blocks - sp_ratio) <= 0.05 * sp_ratio:
        return []
    below, above = 1 / (int(1 / sp_ratio) + 1), 1 / int(1 / sp_ratio)
    return [
        f"--sp_ratio {sp_ratio} with --support block: k blocks have a share 1/k of a weight's entries, the nearest are "
        f"{below:.4g} and {above:.4g}; choose one of them, or --support uniform"
    ]


def _lowrank(model: nn.Module, args: Arguments) -> list[str]:
    """Attention and MLP linears become (alpha/r) B A, both factors trained, no sparse part."""
    from sparse_lora import reparameterize

    return reparameterize(model, _layer_config(args, sparsity=0.0))


def _sltrain(model: nn.Module, args: Arguments) -> list[str]:
    """Attention and MLP linears become (alpha/r) B A + S (arXiv 2406.02214)."""
    from sparse_lora import reparameterize

    return reparameterize(model, _layer_config(args, sparsity=args.sp_ratio))


def _layer_config(args: Arguments, sparsity: float) -> SLTrainConfig:
    from sparse_lora import SLTrainConfig

    return SLTrainConfig(
        rank=args.rank,
        sparsity=sparsity,
        alpha=args.lora_alpha,
        support=args.support,
        trainable_scaling=args.train_scaling,
        path=args.linear_path,
        seed=args.seed,
    )


def block_count(sparsity: float) -> int:
    """Blocks of a block support with about this share of a weight's entries; as sparse_lora.block.block_count."""
    return max(1, round(1 / sparsity))


def nonzeros(support: str, out_features: int, in_features: int, sparsity: float) -> int:
    """Entries that S has in a weight, for a share `sparsity` of them; as sparse_lora.linear.make_support."""
    if support == "uniform":
        return int(sparsity * out_features * in_features)
    # k slices of the rows and of the columns, in each direction the first few one longer than the others.
    blocks = block_count(sparsity)
    rows, more_rows = divmod(out_features, blocks)
    columns, more_columns = divmod(in_features, blocks)
    return blocks * rows * columns + more_rows * columns + more_columns * rows + min(more_rows, more_columns)
