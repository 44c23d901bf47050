"""Computes y = x W^T + bias with W = scaling * B A + S (+ W0) without keeping W or its gradient; and the dense reference.

Two paths compute the same result, and `cheaper_path` chooses one. The materialised path builds W, and in backward W's gradient.
The factored path keeps x A^T and multiplies by the factors, and by S in the way that suits its support. Up to MOST_FEW_ROWS rows
without gradients have a third.

Shapes: T rows (all leading dimensions of x together), I in_features, O out_features, R rank, N nonzeros of S.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import BlockPart
from .support import SparsePart, Support, low_rank_weight, plain, scratch_product
from .uniform import UniformPart

Scaling = float | Tensor
PATHS = ("materialised", "factored")


def sparse_lowrank_linear(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    sparse_value: Tensor | None,
    support: Support | None,
    scaling: Scaling,
    bias: Tensor | None = None,
    path: str = "auto",
    base: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Returns x W^T + bias with W = scaling * B A + S (arXiv 2406.02214, section 3.2); saves no dense weight for backward.

    With a base, W = W0 + scaling * B A + S. W0's gradient, which is dense, is computed only if W0 requires one.

    Saved for backward are x, A, B, the values, the stored support, a given `weight` and, on the factored path, x A^T, (T, R). At
    most one matrix of W's size exists at a time (besides a given `weight`), in forward and in backward, compiled or not; the
    factored path needs none, except with a uniform support. Under autocast the products run in the autocast dtype, as nn.Linear's
    do; x and the parameters are then saved in their own dtype, without a copy.

    Args:
        x: (..., I), any number of leading dimensions.
        lora_A: (R, I).
        lora_B: (O, R).
        sparse_value: (N,) values of S in the order of the support's positions; None for W = scaling * B A.
        support: positions of the values; None exactly when sparse_value is.
        scaling: factor of B A, a number or a tensor of one element (which then gets a gradient).
        bias: (O,) or None.
        path: "materialised", "factored", or "auto" for the path that `cheaper_path` estimates to be faster.
        base: (O, I), W0, or None. Its product is computed separately on the factored path, and in dtypes of fewer than 32 bits,
            in which adding to W0 would round away small changes of large entries.
        weight: (O, I), W as `build_weight` returns it for these parameters, or None. Passes that build W use it instead.

    Returns:
        (..., O) in x's dtype, or in the autocast dtype under autocast.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or the path is unknown.
    """
    _check(x, lora_A, lora_B, sparse_value, support, scaling, bias, path, base)
    dtype = _compute_dtype(x, lora_A)
    few = path != "materialised" and _has_few_rows(x, support)
    if path == "auto" and not few and (base is None or dtype.itemsize >= 4):
        kind, nnz = ("none", 0) if support is None else (support.kind, support.nnz)
        sizes = (x.shape[:-1].numel(), lora_B.shape[0], x.shape[-1], lora_B.shape[1])
        path = cheaper_path(*sizes, kind, nnz, x.device.type, dtype.itemsize, with_base=base is not None)
    if base is not None and (few or path == "factored" or dtype.itemsize < 4):
        adapted = sparse_lowrank_linear(x, lora_A, lora_B, sparse_value, support, scaling, None, path)
        return F.linear(x, base, bias) + adapted
    if few:
        return _few_rows_output(x, lora_A, lora_B, sparse_value, support, scaling, bias)
    stored, blocks = (None, 0) if support is None else (support.stored, support.blocks)
    tensor, number = (scaling, 1.0) if isinstance(scaling, Tensor) else (None, float(scaling))
    factored = path == "factored"
    y: Tensor
    weight = None if factored else weight
    tensors = (x, lora_A, lora_B, sparse_value, stored, tensor, base, weight, bias)
    y, _ = _SparseLowRankLinear.apply(*tensors, number, dtype, blocks, factored)
    return y


def dense_reference(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    sparse_value: Tensor | None,
    support: Support | None,
    scaling: Scaling,
    bias: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Computes the same as `sparse_lowrank_linear` by plain autograd, which keeps W; tests compare with it."""
    weight = scaling * (lora_B @ lora_A)
    if base is not None:
        weight = weight + base
    if sparse_value is not None and support is not None:
        zeros = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        weight = weight + zeros.index_put((support.flat_indices(),), sparse_value).view_as(weight)
    return F.linear(x, weight, bias)


def build_weight(
    lora_A: Tensor,
    scaled_B: Tensor,
    values: Tensor | None,
    part: SparsePart | None,
    scratch: bool = False,
    base: Tensor | None = None,
) -> Tensor:
    """Returns W = scaled_B A + S (+ base), (O, I); all tensors have one dtype.

    scratch: put W in scratch memory, where it is valid until the next W is built.
    """
    if values is None or part is None:
        return low_rank_weight(scaled_B, lora_A, base, scratch)
    return part.weight(scaled_B, lora_A, values, base, scratch)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off on the tensor's device, for products whose dtype is already chosen."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class _SparseLowRankLinear(torch.autograd.Function):
    """Returns y and x A^T, which the factored path keeps for backward.

    x A^T is an output, although no caller uses it, so that higher derivatives are right: in eager mode backward consists of
    differentiable operations and is not marked once_differentiable.
    """

    # Every argument is named, because torch.compile takes the first of *arguments for the context.
    @staticmethod
    def forward(
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        values: Tensor | None,
        stored: Tensor | None,
        scaling: Tensor | None,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        scaling_number: float,
        dtype: torch.dtype,
        blocks: int,
        factored: bool,
    ) -> tuple[Tensor, Tensor]:
        """Calls `_output` with these arguments, as an operator under torch.compile."""
        compute = _output_op if torch.compiler.is_compiling() else _output
        return compute(x, lora_A, lora_B, values, stored, scaling, base, weight, bias, scaling_number, dtype, blocks, factored)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, lora_A, lora_B, values, stored, scaling, base, weight, bias, *ctx.settings = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], x, lora_A, lora_B, values, stored, scaling, base, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        grad_output, grad_h = grad_outputs
        need_x, need_A, need_B, need_values, _, need_scaling, need_base, _, need_bias, *_ = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 6
        grad_bias = None
        if grad_output is not None:
            compute: Callable[..., list[Tensor]] = _gradients_op if compiling else _gradients
            needed = [need_x, need_A, need_B, need_values, need_scaling, need_base]
            computed = iter(compute(grad_output, *ctx.saved_tensors, *ctx.settings, needed))
            grads = [next(computed) if need else None for need in needed]
            if need_bias:
                grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0).to(ctx.bias_dtype)
        # Present only in second derivatives, which compiled graphs do not support.
        if grad_h is not None and not compiling:
            _, x, lora_A, *_ = ctx.saved_tensors
            of_x, of_A = _gradients_of_h(grad_h, x, lora_A)
            grads[0] = of_x if grads[0] is None else grads[0] + of_x
            grads[1] = of_A if grads[1] is None else grads[1] + of_A
        grad_x, grad_A, grad_B, grad_values, grad_scaling, grad_base = grads
        return grad_x, grad_A, grad_B, grad_values, None, grad_scaling, grad_base, None, grad_bias, None, None, None, None


def _output(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    values: Tensor | None,
    stored: Tensor | None,
    scaling: Tensor | None,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scaling_number: float,
    dtype: torch.dtype,
    blocks: int,
    factored: bool,
) -> tuple[Tensor, Tensor]:
    """Returns y, (..., O), and x A^T, (T, R), in the given dtype; if W is built, an empty tensor instead of x A^T."""
    out_shape = (*x.shape[:-1], lora_B.shape[0])
    x_TI, bias = x.reshape(-1, x.shape[-1]).to(dtype), None if bias is None else bias.to(dtype)
    if weight is not None:
        with without_autocast(x):
            return F.linear(x_TI, weight.to(dtype), bias).view(out_shape), x_TI.new_empty(0)
    scaled_B = (plain(lora_B) * (scaling_number if scaling is None else scaling)).to(dtype)
    A = plain(lora_A).to(dtype)
    values = None if values is None else plain(values).to(dtype)
    base = None if base is None else base.to(dtype)
    part = _part(values, stored, blocks, lora_B, lora_A)
    with without_autocast(x):
        if not factored:
            weight = build_weight(A, scaled_B, values, part, scratch=True, base=base)
            return F.linear(x_TI, weight, bias).view(out_shape), x_TI.new_empty(0)
        h_TR = x_TI @ A.t()
        if part is None or values is None:
            return F.linear(h_TR, scaled_B, bias).view(out_shape), h_TR
        return part.output(h_TR, scaled_B, bias, x_TI, values).view(out_shape), h_TR


@dataclass(frozen=True)
class _Operands:
    """Tensors of a backward pass, in the dtype of the products."""

    g_TO: Tensor
    x_TI: Tensor
    A: Tensor
    B: Tensor
    scaled_B: Tensor
    values: Tensor | None
    part: SparsePart | None
    h_TR: Tensor
    base: Tensor | None
    weight: Tensor | None
    scaling_number: float  # of B's gradient; 1 if the scaling is trained, which needs the gradient without it


def _gradients(
    grad_output: Tensor,
    h_TR: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    values: Tensor | None,
    stored: Tensor | None,
    scaling: Tensor | None,
    base: Tensor | None,
    weight: Tensor | None,
    scaling_number: float,
    dtype: torch.dtype,
    blocks: int,
    factored: bool,
    needed: list[bool],
) -> list[Tensor]:
    """Returns the needed gradients of x, A, B, values, scaling and base, in this order, each in its tensor's shape and dtype."""
    lora_A, lora_B, values = plain(lora_A), plain(lora_B), None if values is None else plain(values)
    factor = scaling_number if scaling is None else scaling
    operands = _Operands(
        grad_output.reshape(-1, lora_B.shape[0]),
        x.reshape(-1, x.shape[-1]).to(dtype),
        lora_A.to(dtype),
        lora_B.to(dtype),
        (lora_B * factor).to(dtype),
        None if values is None else values.to(dtype),
        _part(values, stored, blocks, lora_B, lora_A),
        h_TR,
        None if base is None else base.to(dtype),
        # Higher derivatives need W as a function of its parts.
        None if weight is None or torch.is_grad_enabled() else weight.to(dtype),
        scaling_number if scaling is None else 1.0,
    )
    need_x, need_A, need_B, need_values, need_scaling, need_base = needed
    compute = _factored_gradients if factored else _materialised_gradients
    with without_autocast(x):
        grad_x, grad_A, grad_B, grad_values, grad_base = compute(
            operands, (need_x, need_A, need_B or need_scaling, need_values, need_base)
        )
        grads: list[tuple[Tensor | None, Tensor | None]] = [(grad_x, x), (grad_A, lora_A)]
        if need_B and grad_B is not None:
            grads.append((grad_B if scaling is None else grad_B * scaling, lora_B))
        grads.append((grad_values, values))
        if need_scaling and grad_B is not None:
            # <dW, B A> = <dW A^T, B>, summed in float32 at least.
            product = (grad_B * operands.B).sum(dtype=torch.promote_types(dtype, torch.float32))
            grads.append((product, scaling))
        grads.append((grad_base, base))
    return [grad.to(of.dtype).view(of.shape) for grad, of in grads if grad is not None and of is not None]


class _Gradients(NamedTuple):
    """Gradients of the operands, None if not needed; B's is not multiplied by a trained scaling yet."""

    x: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    values: Tensor | None = None
    base: Tensor | None = None


def _built(o: _Operands) -> Tensor:
    """Returns W; it must not stay referenced while W's gradient is computed."""
    return build_weight(o.A, o.scaled_B, o.values, o.part, scratch=True, base=o.base)


def _materialised_gradients(o: _Operands, needed: Sequence[bool]) -> _Gradients:
    """Computes gradients from W and its gradient dW = G^T x."""
    need_x, need_A, need_B, need_values, need_base = needed
    grad_x = None
    if need_x:
        grad_x = o.g_TO @ (o.weight if o.weight is not None else _built(o))
    if not (need_A or need_B or need_values or need_base):
        return _Gradients(grad_x)
    num_rows, rank = o.x_TI.shape[0], o.A.shape[0]
    if need_values and not need_base and o.part is not None and o.part.avoids_weight_gradient(num_rows, rank, o.x_TI):
        o = replace(o, h_TR=o.x_TI @ o.A.t())
        return _factored_gradients(o, (False, need_A, need_B, True, False))._replace(x=grad_x)
    # W is no longer needed here, so dW may reuse its scratch memory; as the base's gradient it is returned and needs new memory.
    grad_W = o.g_TO.t() @ o.x_TI if need_base else scratch_product(o.g_TO.t(), o.x_TI)
    grad_A = o.scaled_B.t() @ grad_W if need_A else None
    grad_B = _scaled_product(grad_W, o.A.t(), o.scaling_number) if need_B else None
    grad_values = o.part.gather(grad_W) if need_values and o.part is not None else None
    return _Gradients(grad_x, grad_A, grad_B, grad_values, grad_W if need_base else None)


def _factored_gradients(o: _Operands, needed: Sequence[bool]) -> _Gradients:
    """Computes gradients from the factors, without a base; x and A share G scaling B, and x A^T comes from the forward pass."""
    need_x, need_A, need_B, need_values, _ = needed
    grad_x = grad_A = grad_values = None
    if need_x or need_A:
        grad_h_TR = o.g_TO @ o.scaled_B
        grad_x = grad_h_TR @ o.A if need_x else None
        grad_A = grad_h_TR.t() @ o.x_TI if need_A else None
    if o.part is not None and (need_x or need_values):
        grad_values = o.part.gradients_(o.g_TO, o.x_TI, o.values, grad_x, need_values)
    grad_B = _scaled_product(o.g_TO.t(), o.h_TR, o.scaling_number) if need_B else None
    return _Gradients(grad_x, grad_A, grad_B, grad_values)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Returns scale left @ right, computed and rounded as one product."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _gradients_of_h(grad_h: Tensor, x: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and A, given the gradient of h = x A^T."""
    x_TI = x.reshape(-1, x.shape[-1]).to(grad_h.dtype)
    of_x = (grad_h @ plain(lora_A).to(grad_h.dtype)).to(x.dtype).view(x.shape)
    return of_x, (grad_h.t() @ x_TI).to(lora_A.dtype)


def _part(values: Tensor | None, stored: Tensor | None, blocks: int, lora_B: Tensor, lora_A: Tensor) -> SparsePart | None:
    return None if values is None else sparse_part(stored, blocks, values.numel(), lora_B.shape[0], lora_A.shape[1])


def sparse_part(stored: Tensor | None, blocks: int, nnz: int, out_features: int, in_features: int) -> SparsePart:
    """Returns the arithmetic of a support with these attributes; see Support."""
    if blocks:
        return BlockPart(blocks, out_features, in_features)
    if stored is None:
        raise ValueError("a support needs stored positions or blocks")
    return UniformPart(stored, nnz, out_features, in_features)


def part_of(support: Support) -> SparsePart:
    """Returns the arithmetic of `support`."""
    return sparse_part(support.stored, support.blocks, support.nnz, support.out_features, support.in_features)


# Opaque operators for torch.compile. If it traced through them, forward and backward would both compute B A in one joint graph;
# the compiler would compute it once and keep W for backward, which takes the memory of a dense model.
_output_op = torch.library.custom_op("sparse_lora::output", _output, mutates_args=())
_gradients_op = torch.library.custom_op("sparse_lora::gradients", _gradients, mutates_args=())


@_output_op.register_fake
def _output_fake(x: Tensor, lora_A: Tensor, lora_B: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype, factored = others[-3], others[-1]
    h_shape = (x.shape[:-1].numel(), lora_A.shape[0]) if factored else (0,)
    return x.new_empty((*x.shape[:-1], lora_B.shape[0]), dtype=dtype), x.new_empty(h_shape, dtype=dtype)


@_gradients_op.register_fake
def _gradients_fake(_g: Tensor, _h: Tensor, *inputs_and_settings: Any) -> list[Tensor]:
    x, lora_A, lora_B, values, _stored, scaling, base, *_, needed = inputs_and_settings
    inputs = (x, lora_A, lora_B, values, scaling, base)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needed, strict=True) if need and t is not None]


# --- Few rows without gradients, as in generating text ---
#
# Most of the time goes into reading weights, so factors and values are read once each and no matrix of W's size is built.

# Chosen, not measured: text is generated for a few prompts at a time.
MOST_FEW_ROWS = 32


def _has_few_rows(x: Tensor, support: Support | None) -> bool:
    """Tells whether `_few_rows_output` may be used: without gradients or compilation, x (..., I) short, the support prepared."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_meta or x.shape[:-1].numel() > MOST_FEW_ROWS:
        return False
    return (support is None or support.ready_for_few_rows) and not torch.is_autocast_enabled(x.device.type)


def _few_rows_output(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    sparse_value: Tensor | None,
    support: Support | None,
    scaling: Scaling,
    bias: Tensor | None,
) -> Tensor:
    """Returns x W^T + bias, (..., O); see `sparse_lowrank_linear` for the arguments."""
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO = F.linear((F.linear(x_TI, plain(lora_A)) * scaling).to(x.dtype), plain(lora_B), bias)
    if sparse_value is not None and support is not None:
        support.add_few_rows_(y_TO, x_TI, plain(sparse_value))
    return y_TO.view(*x.shape[:-1], lora_B.shape[0])


# --- Which path takes less time ---

# Products of thin blocks are limited by memory bandwidth. These are the multiplications that a large product makes while one
# element is moved. For 16-bit elements on a CPU: measured with blocks of 15 x 15 to 550 x 204 (AVX-512; docs/speed.md). On a GPU:
# assumed. An H100 multiplies 400e12 times while it moves 1.5e12 elements (3 TB/s), 267 per element, and the factored path moves
# 8 O + 4 I elements per row more than a dense layer, 4/3 of the 3 (2 O + I) that `multiplications` counts.
_PER_MOVED_ELEMENT = {"cpu": 100.0, "cuda": 356.0}
# Float32: 57 to 73 measured on a CPU with AVX2; more is taken, as AVX-512 multiplies faster. Assumed to be the same on a GPU
# without TF32 (H100: 60 by the same arithmetic as above).
_PER_MOVED_FLOAT32 = 80.0


def multiplications(
    path: str,
    num_rows: int,
    out_features: int,
    in_features: int,
    rank: int,
    kind: str,
    nnz: int,
    device_type: str | None,
    width: int,
    with_base: bool = False,
) -> float:
    """Estimates the time of forward and backward of y = x W^T with all gradients, in multiplications of large products.

    With T rows, rank r and a d x p weight:
      materialised: 3 T d p for y, dx and dW, and 4 r d p for building W twice and for dA and dB from dW.
      factored: 3 T r (d + p) for the factors, plus S. "uniform": 3 T d p, as S is multiplied as a dense matrix. "block": 3 T nnz
      plus the time to move 3 T (2 d + p) elements (inputs and outputs of the blocks in three products, and reordered outputs).
      "none": 0.
    A frozen base adds 2 T d p to the factored path, for its own product and dx; the materialised path has the base in W.
    device_type: "cpu" or "cuda"; None leaves out the time to move elements, and the result is the number of multiplications.
    width: bytes of an element in the products' dtype.
    Adding and gathering the nonzeros is left out: it takes much less time, and about the same on both paths.
    """
    dense = out_features * in_features
    if path == "materialised":
        return 3 * num_rows * dense + 4 * rank * dense
    per_moved_element = 0.0
    if device_type is not None:
        per_moved_element = _PER_MOVED_FLOAT32 if width >= 4 else _PER_MOVED_ELEMENT.get(device_type, 356.0)
    sparse = {
        "none": 0.0,
        "block": nnz + per_moved_element * (2 * out_features + in_features),
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
    width: int,
    with_base: bool = False,
) -> str:
    """Returns the path with fewer multiplications, with and without gradients, so that a recomputed forward pass takes the same.

    Few rows without gradients have their own computation (`_few_rows_output`), equal to rounding.

    Args:
        num_rows: rows of the input, all leading dimensions together.
        kind: kind of the support, "none" without a sparse part.
        nnz: number of S's entries.
        device_type: "cpu" or "cuda".
        width: bytes of an element in the products' dtype.
        with_base: True if the weight also has a dense part W0.
    """
    sizes = (num_rows, out_features, in_features, rank, kind, nnz, device_type, width, with_base)
    factored, materialised = (multiplications(path, *sizes) for path in ("factored", "materialised"))
    return "factored" if factored <= materialised else "materialised"


# --- Checks of the arguments ---


def _compute_dtype(x: Tensor, lora_A: Tensor) -> torch.dtype:
    """Returns the dtype of the products: autocast's if it is on and x is not float64, else the dtype of x and the parameters."""
    device_type = x.device.type
    # Autocast functions raise for the meta device, and torch.amp.is_autocast_available would break the graph in torch 2.11.
    if not x.is_meta and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if x.dtype != lora_A.dtype:
        raise ValueError(
            f"x is {x.dtype} and the layer's parameters are {lora_A.dtype}: convert one of them, or use torch.autocast"
        )
    return x.dtype


def _check(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    sparse_value: Tensor | None,
    support: Support | None,
    scaling: Scaling,
    bias: Tensor | None,
    path: str,
    base: Tensor | None,
) -> None:
    if path not in ("auto", *PATHS):
        raise ValueError(f"path is {path!r}, but it must be one of: auto, {', '.join(PATHS)}")
    rank, in_features = lora_A.shape
    out_features = lora_B.shape[0]
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, but its last dimension must be in_features = {in_features}")
    if lora_B.shape[1] != rank:
        raise ValueError(
            f"lora_A is {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}: they must be (rank, in) and (out, rank)"
        )
    if (sparse_value is None) != (support is None):
        raise ValueError("sparse_value and support belong together: give both, or None for both")
    if sparse_value is not None and support is not None:
        if sparse_value.shape != (support.nnz,):
            raise ValueError(f"sparse_value has shape {tuple(sparse_value.shape)}, but the support has {support.nnz} positions")
        if (support.out_features, support.in_features) != (out_features, in_features):
            raise ValueError(
                f"the support is for a {support.out_features} x {support.in_features} weight, "
                f"but this one is {out_features} x {in_features}"
            )
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        raise ValueError(f"scaling has shape {tuple(scaling.shape)}, but it must be a number or hold one element")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but out_features is {out_features}")
    if base is not None and base.shape != (out_features, in_features):
        raise ValueError(f"base has shape {tuple(base.shape)}, but the weight is ({out_features}, {in_features})")
