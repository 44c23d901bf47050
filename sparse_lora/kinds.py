"""The kinds of support, by the names that configurations use."""

from collections.abc import Callable

import torch
from torch import Tensor

from .block import BlockPart, BlockSupport, block_count
from .support import SparsePart, Support
from .uniform import UniformPart, UniformSupport


def make_support(
    kind: str, out_features: int, in_features: int, sparsity: float, device: torch.device | str | None = None
) -> Support:
    """A support with a share `sparsity` of a weight's entries, its positions not drawn yet.

    "uniform": int(sparsity * out * in) positions, as published (arXiv 2406.02214). "block": round(1 / sparsity) blocks.

    Raises:
        ValueError: the sparsity leaves no entry, no number of blocks has about this share, or so many do not fit the weight.
    """
    return SUPPORTS[kind](out_features, in_features, sparsity, device)


def _uniform(out_features: int, in_features: int, sparsity: float, device: torch.device | str | None) -> Support:
    nnz = int(sparsity * out_features * in_features)
    if nnz == 0:
        raise ValueError(
            f"sparsity {sparsity} of a {out_features} x {in_features} weight leaves no entry: "
            f"use at least {1 / (out_features * in_features):.2g}, or 0 for a low-rank weight"
        )
    return UniformSupport(out_features, in_features, nnz, device)


def _block(out_features: int, in_features: int, sparsity: float, device: torch.device | str | None) -> Support:
    return BlockSupport(out_features, in_features, block_count(sparsity))


# A new kind is one row here, its arithmetic in `sparse_part`, and one row of peft_pretraining.config.supports.
SUPPORTS: dict[str, Callable[[int, int, float, torch.device | str | None], Support]] = {
    UniformSupport.kind: _uniform,
    BlockSupport.kind: _block,
}
SUPPORT_KINDS = tuple(SUPPORTS)


def sparse_part(code: Tensor | None, blocks: int, nnz: int, out_features: int, in_features: int) -> SparsePart:
    """The arithmetic of a support with these attributes; see Support."""
    if blocks:
        return BlockPart(blocks, out_features, in_features)
    if code is None:
        raise ValueError("a support needs stored positions or blocks")
    return UniformPart(code, nnz, out_features, in_features)


def part_of(support: Support) -> SparsePart:
    """The arithmetic of `support`."""
    return sparse_part(support.code, support.blocks, support.nnz, support.out_features, support.in_features)
