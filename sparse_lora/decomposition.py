"""Factors from singular values: those of a product made balanced, and the best ones of a dense matrix.

Shapes: O out_features, I in_features, r rank.
"""

import math

import torch
from torch import Tensor

# Of a direction that the product lacks, A's row gets this norm: that of a row of the published initial A, whose entries have
# the variance 1 / (3 I).
_IDLE_ROW_NORM = 1 / math.sqrt(3)


@torch.no_grad()
def balanced(lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (O, r) and (r, I) in float32 of the same product, B'^T B' = A' A'^T = its singular values, the largest first.

    With B = Q_B R_B and A^T = Q_A R_A only the r x r core R_B R_A^T = U S V^T is decomposed: B' = Q_B U sqrt(S), A' = sqrt(S) V^T
    Q_A^T (the refactorisation of arXiv 2505.22922, section 4). A direction whose singular value is nothing but rounding gets a
    column of zeros in B' and a row of A' that keeps it trainable: with zeros in both, neither would ever get a gradient.

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
    wide = weight.double()
    lying = wide.shape[0] <= wide.shape[1]
    _, vectors = torch.linalg.eigh(wide @ wide.t() if lying else wide.t() @ wide)
    leading = vectors[:, -rank:].flip(1)
    # Rows (or columns) of the other factor are the singular vectors times the singular values.
    other = leading.t() @ wide if lying else wide @ leading
    root = torch.linalg.vector_norm(other, dim=1 if lying else 0).sqrt()
    safe = root.clamp(min=torch.finfo(torch.float32).tiny)
    if lying:
        return (leading * root).float(), (other / safe[:, None]).float()
    return (other / safe).float(), (leading * root).t().contiguous().float()
