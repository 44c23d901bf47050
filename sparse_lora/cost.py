"""Which path computes a low-rank plus sparse linear in less time: a count of multiplications, no torch."""

PATHS = ("materialised", "factored")

# Products of thin blocks are as fast as memory: so many multiplications of large products are made while an element of a block's
# inputs or outputs is moved. Measured with blocks of 15 x 15 to 550 x 204 on a CPU (docs/speed.md), assumed for a GPU.
_PER_MOVED_ELEMENT = {"cpu": 100.0, "cuda": 200.0}


def multiplications(
    path: str,
    num_rows: int,
    out_features: int,
    in_features: int,
    rank: int,
    kind: str,
    nnz: int,
    device_type: str,
    with_base: bool = False,
) -> float:
    """Forward and backward pass of y = x W^T, W = scaling * B A + S, gradients of all, in multiplications of large products.

    With T rows, r the rank, d x p the weight:
      materialised: 3 T d p for y, dx and dW, and 4 r d p for building W twice and for dA and dB by way of dW.
      factored: 3 T r (d + p) for the factors, and for S 3 T d p where it is computed as a dense matrix ("uniform"), 3 T nnz and
      what moving 3 T (2 d + p) elements takes where it is blocks ("block"): inputs and outputs of the blocks in three products,
      and outputs that are put in order. Nothing where there is none ("none").
    With a frozen base, factored: 2 T d p more for its own product and dx; the other path has it in W.
    Adding and gathering the nonzeros costs about the same on both, and much less.
    """
    dense = out_features * in_features
    if path == "materialised":
        return 3 * num_rows * dense + 4 * rank * dense
    sparse = {
        "none": 0.0,
        "block": nnz + _PER_MOVED_ELEMENT.get(device_type, 200.0) * (2 * out_features + in_features),
        "uniform": float(dense),
    }
    base = 2 * num_rows * dense if with_base else 0
    return base + 3 * num_rows * (rank * (out_features + in_features) + sparse[kind])


def cheaper_path(
    num_rows: int,
    out_features: int,
    in_features: int,
    rank: int,
    kind: str,
    nnz: int,
    device_type: str,
    with_base: bool = False,
) -> str:
    """The path with fewer multiplications. Of inference too, so that a recomputed forward pass takes the path of the first one.

    Args:
        num_rows: rows of the input, all leading dimensions together.
        kind: of the support, "none" without a sparse part.
        nnz: number of S's entries.
        device_type: "cpu" or "cuda".
        with_base: whether the weight has a dense part W0 besides.
    """
    sizes = (num_rows, out_features, in_features, rank, kind, nnz, device_type, with_base)
    # Written out for torch.compile, which traces through it.
    factored, materialised = (multiplications(path, *sizes) for path in ("factored", "materialised"))
    return "factored" if factored <= materialised else "materialised"
