"""Properties of the kinds of support that --support names, known before sparse_lora is loaded. Imports no torch.

A new kind is one row of SUPPORTS; its class, with one row in sparse_lora.linear; its
arithmetic and cost in sparse_lora.functional.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SupportKind:
    """The properties of one kind of support: the positions of S's entries in a weight.

    nonzeros(out_features, in_features, sparsity): number of entries of S, as in sparse_lora.linear.make_support.
    problem(sparsity): why this kind has no support of about this sparsity, or None if it has one.
    fit_problem(sparsity, out_features, in_features): why no such support fits a weight of this shape, or None if one fits.
    """

    nonzeros: Callable[[int, int, float], int]
    problem: Callable[[float], str | None]
    fit_problem: Callable[[float, int, int], str | None]
    # Positions are stored and S is built as a dense matrix; otherwise positions follow from the shape.
    stored: bool
    # The rows of a linear's output are reordered before and after the sparse product.
    reorders_outputs: bool


def _uniform_nonzeros(out_features: int, in_features: int, sparsity: float) -> int:
    return int(sparsity * out_features * in_features)


def _uniform_fit(sparsity: float, out_features: int, in_features: int) -> str | None:
    if _uniform_nonzeros(out_features, in_features, sparsity):
        return None
    return (
        f"--sp_ratio {sparsity}: leaves no entry in a weight of {out_features} x {in_features}; "
        f"use at least {_rounded_up(1 / (out_features * in_features))}"
    )


def _rounded_up(share: float) -> str:
    """The share with two digits, never below it."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return f"{math.ceil(share / unit - 1e-9) * unit:.2g}"


def block_count(sparsity: float) -> int:
    """Returns the number of blocks of a block support of about this sparsity, as sparse_lora.block.block_count."""
    return max(1, round(_inverse(sparsity)))


def _inverse(sparsity: float) -> float:
    # A number of blocks beyond any weight's, so that tiny shares do not overflow.
    return min(1 / sparsity, 1e18)


def _block_nonzeros(out_features: int, in_features: int, sparsity: float) -> int:
    """Counts k blocks of nearly equal size: the first slices of rows, and of columns, may be one longer than the others."""
    blocks = block_count(sparsity)
    rows, more_rows = divmod(out_features, blocks)
    columns, more_columns = divmod(in_features, blocks)
    return blocks * rows * columns + more_rows * columns + more_columns * rows + min(more_rows, more_columns)


def _block_problem(sparsity: float) -> str | None:
    blocks = block_count(sparsity)
    if abs(1 / blocks - sparsity) <= 0.05 * sparsity:
        return None
    below, above = 1 / (int(_inverse(sparsity)) + 1), 1 / int(_inverse(sparsity))
    return (
        f"--sp_ratio {sparsity} with --support block: k blocks have a share 1/k of a weight's entries, the nearest are "
        f"{below:.4g} and {above:.4g}; choose one of them, or --support uniform"
    )


def _block_fit(sparsity: float, out_features: int, in_features: int) -> str | None:
    blocks, smallest = block_count(sparsity), min(out_features, in_features)
    if blocks <= smallest:
        return None
    return (
        f"--sp_ratio {sparsity} with --support block: {blocks} blocks do not fit a weight with "
        f"{smallest} rows or columns; use at least {_rounded_up(1 / smallest)}, or --support uniform"
    )


SUPPORTS: dict[str, SupportKind] = {
    "uniform": SupportKind(_uniform_nonzeros, lambda sparsity: None, _uniform_fit, stored=True, reorders_outputs=False),
    "block": SupportKind(_block_nonzeros, _block_problem, _block_fit, stored=False, reorders_outputs=True),
}
