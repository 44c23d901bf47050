"""Decomposes a linear's weight: singular values, the contribution of each part, the residual of its best approximation.

Computations are in float64, whatever the model's dtype. Shapes: O out_features, I in_features, K = min(O, I) singular values.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.methods.galore import projected_matrices
from peft_pretraining.optim.updates import l2_norm
from sparse_lora import SparseLowRankLinear

# Bins of the histogram of magnitudes.
_BINS = 100


def target_linears(model: nn.Module, only: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The linears of attention and MLP, dense or replaced, by qualified name in the model's order.

    only: keeps linears whose name contains one of these texts; empty for all linears.

    Raises:
        ValueError: no linear matches.
    """
    dense = {name.removesuffix(".weight") for name in projected_matrices(model)}
    linears = {name: module for name, module in model.named_modules() if name in dense or hasattr(module, "dense_weight")}
    chosen = {name: module for name, module in linears.items() if not only or any(part in name for part in only)}
    if not chosen:
        raise ValueError(
            f"--only {' '.join(only)}: matches none of the model's {len(linears)} linears; "
            f"names are {', '.join(list(linears)[:7])} ..."
        )
    return chosen


def check_rank(linears: Mapping[str, Any], rank: int) -> None:
    """Raises ValueError if an approximation of this rank would be exact for one of these dense linears."""
    sides = {name: min(linear.in_features, linear.out_features) for name, linear in linears.items()}
    smallest = min(sides, key=lambda name: sides[name])
    if rank >= sides[smallest]:
        raise ValueError(
            f"--rank {rank}: leaves no residual of {smallest}, whose shorter side is {sides[smallest]}; use a smaller rank"
        )


@torch.no_grad()
def weight_parts(linear: Any) -> dict[str, Tensor]:
    """The summands of a linear's weight, (O, I) float64, by name: low_rank = s B A and sparse = S, or only dense."""
    if not isinstance(linear, SparseLowRankLinear):
        weight: Tensor = linear.dense_weight() if hasattr(linear, "dense_weight") else linear.weight
        return {"dense": weight.double()}
    parts = {"low_rank": linear.lora_B.double() @ linear.lora_A.double() * linear.effective_scaling()}
    if linear.sparse_value is not None and linear.support is not None:
        sparse = torch.zeros_like(parts["low_rank"])
        sparse.view(-1)[linear.support.flat_indices().to(sparse.device)] = linear.sparse_value.double()
        parts["sparse"] = sparse
    return parts


@dataclass(frozen=True)
class Decomposition:
    """W = U diag(s) V^T: U (O, K), s (K,) descending, Vh = V^T (K, I)."""

    U: Tensor
    s: Tensor
    Vh: Tensor

    def best(self, rank: int) -> Tensor:
        """The nearest matrix of this rank to W in the Frobenius norm (Eckart-Young), (O, I)."""
        return (self.U[:, :rank] * self.s[:rank]) @ self.Vh[:rank]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (O, rank) and A (rank, I) with B A = best(rank); each contains the roots of the singular values."""
        roots = self.s[:rank].sqrt()
        return self.U[:, :rank] * roots, roots[:, None] * self.Vh[:rank]

    def contribution(self, part: Tensor) -> Tensor:
        """diag(U^T P V), (K,): the contribution of a summand P of W, (O, I), to each singular value; it may be negative.

        The contributions of all summands add up to s. The paper's figures (arXiv 2406.02214) show them for L and S.
        """
        return ((self.U.T @ part) * self.Vh).sum(1)


def decompose(weight: Tensor) -> Decomposition:
    """The singular value decomposition of a weight (O, I). Raises ValueError if an entry is not finite."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the checkpoint has non-finite weights, which have no singular values; use an earlier checkpoint")
    return Decomposition(*torch.linalg.svd(weight, full_matrices=False))


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a linear's weight and of its parts, and contributions of the parts, in the order of W's values.

    singular_values: of "weight", and of "low_rank" (the first r, as the rest are 0) and "sparse" alone. contributions: of
    "low_rank" and "sparse" to each singular value of W. A dense linear has only "weight".
    """

    singular_values: dict[str, list[float]]
    contributions: dict[str, list[float]]

    @property
    def stable_rank(self) -> float:
        """||W||_F^2 / ||W||_2^2: 1 for a matrix of rank one, K if all singular values are equal; 0 for W = 0."""
        s = self.singular_values["weight"]
        return sum(value**2 for value in s) / s[0] ** 2 if s[0] else 0.0

    def share(self, part: str, first: int, end: int | None = None) -> float | None:
        """A part's share of the sum of W's singular values number `first` to `end` (exclusive); None if that sum is zero."""
        total = sum(self.singular_values["weight"][first:end])
        least = 1e-12 * sum(self.singular_values["weight"])
        return sum(self.contributions[part][first:end]) / total if total > least else None


def spectrum(parts: Mapping[str, Tensor], decomposition: Decomposition, rank: int | None) -> Spectrum:
    """The spectrum of a linear. parts: its `weight_parts`; decomposition: of their sum; rank: of the low-rank part, if any."""
    summands = {name: part for name, part in parts.items() if name != "dense"}
    singular_values = {"weight": decomposition.s.tolist()}
    for name, part in summands.items():
        singular_values[name] = torch.linalg.svdvals(part)[: rank if name == "low_rank" else None].tolist()
    return Spectrum(singular_values, {name: decomposition.contribution(part).tolist() for name, part in summands.items()})


@dataclass(frozen=True)
class Residual:
    """Magnitudes of the residual W - W_r of a dense W, W_r being its best rank-r approximation (paper, figure 2).

    norm, weight_norm: Frobenius norms of W - W_r and of W. share: fraction of the entries that is largest in magnitude; cut: the
    threshold that these entries exceed; top_energy: their share of norm^2. edges: magnitudes in 100 equal steps from 0 to the
    largest; below: for each edge, the share of the entries that do not exceed it.
    """

    rank: int
    norm: float
    weight_norm: float
    share: float
    cut: float
    top_energy: float
    edges: list[float]
    below: list[float]


def residual_figures(residual: Tensor, weight: Tensor, rank: int, share: float) -> Residual:
    """Measures a residual. share: fraction of entries in SLTrain's sparse part, 0 < share < 1: int(share * O * I) entries."""
    magnitudes = residual.abs().flatten().sort().values
    numel = magnitudes.numel()
    top = int(share * numel)
    edges = torch.linspace(0, float(magnitudes[-1]), _BINS + 1, dtype=magnitudes.dtype, device=magnitudes.device)
    below = torch.searchsorted(magnitudes, edges, right=True).double() / numel
    squares = magnitudes.square()
    energy = float(squares.sum())
    return Residual(
        rank=rank,
        norm=energy**0.5,
        weight_norm=float(l2_norm(weight)),
        share=share,
        cut=float(magnitudes[numel - 1 - top]),
        top_energy=float(squares[numel - top :].sum()) / energy if energy else 0.0,
        edges=edges.tolist(),
        below=below.tolist(),
    )


def image(matrix: Tensor, size: int = 256) -> Tensor:
    """|matrix| averaged over neighbouring entries to at most size x size values, float32 on the CPU, for a picture."""
    height, width = (min(size, length) for length in matrix.shape)
    return nn.functional.adaptive_avg_pool2d(matrix.abs()[None], (height, width))[0].float().cpu()


def linear_figures(linear: Any, rank: int | None, share: float, draw: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A linear's figures, JSON-able; if `draw` and it is dense, also the pictures of W and its residual."""
    parts = weight_parts(linear)
    weight = functools.reduce(operator.add, parts.values())
    decomposition = decompose(weight)
    factor_rank: int | None = None if "dense" in parts else linear.rank
    measured = spectrum(parts, decomposition, factor_rank)
    figures: dict[str, Any] = {
        "shape": list(weight.shape),
        "rank": factor_rank,
        "nonzeros": linear.sparse_value.numel() if "sparse" in parts else None,
        "stable_rank": measured.stable_rank,
        **dataclasses.asdict(measured),
    }
    if factor_rank is not None:
        if "sparse" in parts:
            figures["sparse_share"] = {
                "first_r": measured.share("sparse", 0, factor_rank),
                "rest": measured.share("sparse", factor_rank),
            }
        return figures, {}
    rank = max(1, min(weight.shape) // 4) if rank is None else rank
    residual = weight - decomposition.best(rank)
    figures["residual"] = dataclasses.asdict(residual_figures(residual, weight, rank, share))
    return figures, {"weight": image(weight), "residual": image(residual)} if draw else {}
