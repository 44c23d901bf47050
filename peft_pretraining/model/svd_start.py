"""Factors from singular values: the start of --init svd, and balanced factors of a product.

Shapes: O out_features, I in_features, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.parallel import assign_
from peft_pretraining.distributed.world import World, broadcast_
from sparse_lora import SparseLowRankLinear, generator_for

# Norm of A's row for a direction that the product lacks: that of a row of the published initial A, whose entries have the
# variance 1 / (3 I).
_IDLE_ROW_NORM = 1 / math.sqrt(3)


@torch.no_grad()
def start_from_svd(model: nn.Module, std: float, seed: int, world: World) -> None:
    """Set A, B and sparse values of every low-rank (plus sparse) layer, in place. Supports must be drawn; every process calls it.

    The dense weight W is N(0, std^2), drawn as full-rank training with this seed draws it. scaling B A is W's best approximation
    of rank r, by balanced factors, and S is the remainder of W at the support's positions. Computed on the CPU by process 0 and
    broadcast, since signs of singular vectors are arbitrary.
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseLowRankLinear):
            for parameter_name, values in _values(module, name, std, seed, world):
                assign_(module.get_parameter(parameter_name), broadcast_(values, world))


def _values(layer: SparseLowRankLinear, name: str, std: float, seed: int, world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (parameter name, float32 CPU tensor) of a layer; the values are undefined on all processes but the first."""
    if not world.is_main:
        for parameter_name in ("lora_B", "lora_A", *(["sparse_value"] if layer.support is not None else [])):
            yield parameter_name, torch.empty(layer.get_parameter(parameter_name).shape)
        return
    dense = torch.empty(layer.out_features, layer.in_features)
    dense.normal_(0.0, std, generator=generator_for(seed, f"{name}.weight"))
    left, right = best_low_rank(dense, layer.rank)
    share = layer.initial_scaling() ** -0.5
    yield "lora_B", (share * left).contiguous()
    yield "lora_A", (share * right).contiguous()
    if layer.support is not None:
        rest = dense.addmm_(left, right, alpha=-1)
        yield "sparse_value", rest.flatten()[layer.support.flat_indices().cpu()]


@torch.no_grad()
def balanced(lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (O, r) and (r, I) in float32 of the same product, B'^T B' = A' A'^T = its singular values, the largest first.

    With B = Q_B R_B and A^T = Q_A R_A only the r x r core R_B R_A^T = U S V^T is decomposed: B' = Q_B U sqrt(S), A' = sqrt(S) V^T
    Q_A^T (the refactorisation of arXiv 2505.22922, section 4). A direction whose singular value is only rounding error gets a
    column of zeros in B' and a non-zero row in A': with zeros in both, neither would ever get a gradient.

    Args:
        lora_B, lora_A: (O, r) and (r, I) with r at most O and I, of any floating dtype.
    """
    Q_B, R_B = torch.linalg.qr(lora_B.float())
    Q_A, R_A = torch.linalg.qr(lora_A.float().t())
    U, S, Vt = torch.linalg.svd(R_B @ R_A.t())
    noise = S[0] * max(Q_B.shape[0], Q_A.shape[0]) * torch.finfo(torch.float32).eps
    alive = noise < S
    root = S.sqrt()
    column, row = torch.where(alive, root, 0.0), torch.where(alive, root, _IDLE_ROW_NORM)
    return Q_B @ (U * column), (row[:, None] * Vt) @ Q_A.t()


@torch.no_grad()
def best_low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors (O, r) and (r, I) of the nearest matrix of rank r (Eckart and Young), in float32.

    By the eigenvectors of W W^T, or W^T W where that is smaller, in float64: a small multiple of the cost of one product with W,
    and right for singular values above about 1e-8 of the largest.

    Args:
        weight: (O, I), of any floating dtype; rank at most O and I.
    """
    W = weight.double()
    wide = W.shape[0] <= W.shape[1]
    _, vectors = torch.linalg.eigh(W @ W.t() if wide else W.t() @ W)
    leading = vectors[:, -rank:].flip(1)
    # Rows (or columns) of the other factor are the singular vectors times the singular values.
    other = leading.t() @ W if wide else W @ leading
    root = torch.linalg.vector_norm(other, dim=1 if wide else 0).sqrt()
    safe = root.clamp(min=torch.finfo(torch.float32).tiny)
    if wide:
        return (leading * root).float(), (other / safe[:, None]).float()
    return (other / safe).float(), (leading * root).t().contiguous().float()
