"""Which path computes a low-rank plus sparse linear in less time: a count of multiplications, no torch."""

PATHS = ("materialised", "factored")

# A multiplication of a thin block takes so many times one of a large matrix; of the blocks of one support.
_BLOCK_OVERHEAD = {"cpu": 2.5, "cuda": 4.0}


def multiplications(
    path: str, num_rows: int, out_features: int, in_features: int, rank: int, kind: str, nnz: int, device_type: str
) -> float:
    """Forward and backward pass of y = x W^T, W = scaling * B A + S, gradients of all, in multiplications of large products.

    With T rows, r the rank, d x p the weight:
      materialised: 3 T d p for y, dx and dW, and 4 r d p for building W twice and for dA and dB by way of dW.
      factored: 3 T r (d + p) for the factors, and for S 3 T d p where it is computed as a dense matrix ("uniform"), 3 T nnz times
      an overhead for small products where it is blocks ("block"), nothing where there is none ("none").
    Adding and gathering the nonzeros costs about the same on both, and much less.
    """
    dense = out_features * in_features
    if path == "materialised":
        return 3 * num_rows * dense + 4 * rank * dense
    sparse = {
        "none": 0.0,
        "block": _BLOCK_OVERHEAD.get(device_type, _BLOCK_OVERHEAD["cuda"]) * nnz,
        "uniform": float(dense),
    }
    return 3 * num_rows * (rank * (out_features + in_features) + sparse[kind])


def cheaper_path(
    num_rows: int, out_features: int, in_features: int, rank: int, kind: str, nnz: int, device_type: str
) -> str:
    """The path with fewer multiplications. Of inference too, so that a recomputed forward pass takes the path of the first one.

    Args:
        num_rows: rows of the input, all leading dimensions together.
        kind: of the support, "none" without a sparse part.
        nnz: number of S's entries.
        device_type: "cpu" or "cuda".
    """
    sizes = (num_rows, out_features, in_features, rank, kind, nnz, device_type)
    # Written out for torch.compile, which traces through it.
    factored, materialised = (multiplications(path, *sizes) for path in ("factored", "materialised"))
    return "factored" if factored <= materialised else "materialised"
