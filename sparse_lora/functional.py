"""y = x W^T + bias with W = scaling * B A + S, without keeping W or its gradient; plain autograd beside it.

Shapes: T rows (all leading dimensions of x together), I in_features, O out_features, R rank, N nonzeros of S.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .support import Support, decode

Scaling = float | Tensor


def sparse_lowrank_linear(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    sparse_value: Tensor | None,
    support: Support | None,
    scaling: Scaling,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias with W = scaling * B A + S (arXiv 2406.02214, section 3.2); saves no dense weight for backward.

    Saved are x, A, B, the values and the stored support; backward rebuilds W. At most one matrix of W's size is alive
    at a time, in forward and in backward, compiled or not. Under autocast the products run in the autocast dtype, as
    nn.Linear's do; x and the parameters are then saved in their own dtype, without a copy.

    Args:
        x: (..., I), any number of leading dimensions.
        lora_A: (R, I).
        lora_B: (O, R).
        sparse_value: (N,) values of S in the order of the support's positions; None for W = scaling * B A.
        support: positions of the values; None exactly when sparse_value is.
        scaling: factor of B A, a number or a tensor of one element (which then gets a gradient).
        bias: (O,) or None.

    Returns:
        (..., O) in x's dtype, or in the autocast dtype under autocast.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    _check(x, lora_A, lora_B, sparse_value, support, scaling, bias)
    dtype = _compute_dtype(x, lora_A)
    code = None if support is None else support.code
    tensor, number = (scaling, 1.0) if isinstance(scaling, Tensor) else (None, float(scaling))
    y: Tensor = _SparseLowRankLinear.apply(x, lora_A, lora_B, sparse_value, code, tensor, bias, number, dtype)
    return y


def dense_reference(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    sparse_value: Tensor | None,
    support: Support | None,
    scaling: Scaling,
    bias: Tensor | None = None,
) -> Tensor:
    """The same value as `sparse_lowrank_linear`, by plain autograd that keeps W: what the tests compare with."""
    weight = scaling * (lora_B @ lora_A)
    if sparse_value is not None and support is not None:
        zeros = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        weight = weight + zeros.index_put((support.flat_indices(),), sparse_value).view_as(weight)
    return F.linear(x, weight, bias)


def build_weight(lora_A: Tensor, scaled_B: Tensor, values: Tensor | None, code: Tensor | None) -> Tensor:
    """W = scaled_B A + S, (O, I); S is added in place, which spares a second matrix. All values of one dtype."""
    weight = scaled_B @ lora_A
    if values is not None and code is not None:
        weight.view(-1).index_add_(0, decode(code, values.numel(), weight.numel()), values)
    return weight


def multiply_apart(num_rows: int, in_features: int, out_features: int, rank: int, sparse: bool) -> bool:
    """Whether x A^T B^T (plus x S^T) takes fewer multiplications than building W and multiplying by it.

    Apart: T R (I + O) and, with a sparse part, T I O for S as a dense matrix. Together: R I O + T I O. With a sparse
    part, apart wins for few rows (generation); without one it wins whenever the rank is small, and builds no matrix.
    """
    apart = num_rows * rank * (in_features + out_features)
    together = (rank + num_rows) * in_features * out_features
    return apart + (num_rows * in_features * out_features if sparse else 0) < together


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off on the tensor's device: for products whose dtype is already decided."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class _SparseLowRankLinear(torch.autograd.Function):
    """Not marked once_differentiable: in eager mode backward is made of differentiable operations, so that higher
    derivatives come out right too (at the price of saving what they need)."""

    @staticmethod
    def forward(
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        values: Tensor | None,
        code: Tensor | None,
        scaling: Tensor | None,
        bias: Tensor | None,
        scaling_number: float,
        dtype: torch.dtype,
    ) -> Tensor:
        compute = _output_op if torch.compiler.is_compiling() else _output
        return compute(x, lora_A, lora_B, values, code, scaling, bias, scaling_number, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, bias, ctx.scaling_number, ctx.dtype = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        compute: Callable[..., list[Tensor]] = _gradients_op if torch.compiler.is_compiling() else _gradients
        grad_output = grad_outputs[0]
        need_x, need_A, need_B, need_values, _, need_scaling, need_bias, *_ = ctx.needs_input_grad
        needed = [need_x, need_A, need_B, need_values, need_scaling]
        found = iter(compute(grad_output, *ctx.saved_tensors, ctx.scaling_number, ctx.dtype, needed))
        grad_x, grad_A, grad_B, grad_values, grad_scaling = (next(found) if need else None for need in needed)
        grad_bias = None
        if need_bias:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_A, grad_B, grad_values, None, grad_scaling, grad_bias, None, None


def _output(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    values: Tensor | None,
    code: Tensor | None,
    scaling: Tensor | None,
    bias: Tensor | None,
    scaling_number: float,
    dtype: torch.dtype,
) -> Tensor:
    """y, (..., O), of the given dtype."""
    scaled_B = (lora_B * (scaling_number if scaling is None else scaling)).to(dtype)
    x, A = x.to(dtype), lora_A.to(dtype)
    values = None if values is None else values.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with without_autocast(x):
        if not _apart(x, lora_A, lora_B, values):
            return F.linear(x, build_weight(A, scaled_B, values, code), bias)
        y = F.linear(F.linear(x, A), scaled_B, bias)
        if values is not None and code is not None:
            y += F.linear(x, _sparse_as_dense(values, code, lora_B.shape[0], lora_A.shape[1]))
        return y


def _gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    values: Tensor | None,
    code: Tensor | None,
    scaling: Tensor | None,
    scaling_number: float,
    dtype: torch.dtype,
    needed: list[bool],
) -> list[Tensor]:
    """Those of the gradients of x, A, B, values and scaling that are needed, each in its tensor's shape and dtype."""
    need_x, need_A, need_B, need_values, need_scaling = needed
    factor = scaling_number if scaling is None else scaling
    g_TO = grad_output.reshape(-1, lora_B.shape[0])
    x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
    A, B, scaled_B = lora_A.to(dtype), lora_B.to(dtype), (lora_B * factor).to(dtype)
    grads: list[Tensor] = []
    with without_autocast(x):
        if need_x:
            grad_x = _grad_input(g_TO, A, scaled_B, None if values is None else values.to(dtype), code)
            grads.append(grad_x.view(x.shape).to(x.dtype))
            del grad_x
        # dW = G^T x: only now, when the W of _grad_input is gone, and only where it is used.
        apart = _apart(x_TI, A, B, values)
        grad_W = g_TO.t() @ x_TI if need_values or (not apart and any(needed[1:])) else None
        if need_A:
            Bt_grad_W = (g_TO @ B).t() @ x_TI if apart or grad_W is None else B.t() @ grad_W
            grads.append((Bt_grad_W * factor).to(lora_A.dtype))
        if need_B or need_scaling:
            grad_W_At = g_TO.t() @ (x_TI @ A.t()) if apart or grad_W is None else grad_W @ A.t()
        if need_B:
            grads.append((grad_W_At * factor).to(lora_B.dtype))
        if need_values and values is not None and code is not None and grad_W is not None:
            positions = decode(code, values.numel(), grad_W.numel())
            grads.append(grad_W.view(-1).index_select(0, positions).to(values.dtype))
        if need_scaling and scaling is not None:
            # <dW, B A> = <dW A^T, B>, summed in float32 at least.
            product = (grad_W_At * B).sum(dtype=torch.promote_types(dtype, torch.float32))
            grads.append(product.to(scaling.dtype).reshape(scaling.shape))
    return grads


def _grad_input(g_TO: Tensor, A: Tensor, scaled_B: Tensor, values: Tensor | None, code: Tensor | None) -> Tensor:
    """dx = G W, (T, I); W is gone on return."""
    if not _apart(g_TO, A, scaled_B, values):
        return g_TO @ build_weight(A, scaled_B, values, code)
    grad_x = g_TO @ scaled_B @ A
    if values is not None and code is not None:
        grad_x += g_TO @ _sparse_as_dense(values, code, scaled_B.shape[0], A.shape[1])
    return grad_x


def _apart(rows: Tensor, lora_A: Tensor, lora_B: Tensor, values: Tensor | None) -> bool:
    num_rows = rows.shape[:-1].numel()
    return multiply_apart(num_rows, lora_A.shape[1], lora_B.shape[0], lora_A.shape[0], values is not None)


def _sparse_as_dense(values: Tensor, code: Tensor, out_features: int, in_features: int) -> Tensor:
    """S as an (O, I) matrix of the values' dtype."""
    flat = torch.zeros(out_features * in_features, dtype=values.dtype, device=values.device)
    return flat.index_add_(0, decode(code, values.numel(), flat.numel()), values).view(out_features, in_features)


# torch.compile sees the two computations as opaque operators. Traced through, forward and backward would compute the
# same B A in one joint graph, and the compiler would compute it once and keep W for backward: the memory of a dense model.
_output_op = torch.library.custom_op("sparse_lora::output", _output, mutates_args=())
_gradients_op = torch.library.custom_op("sparse_lora::gradients", _gradients, mutates_args=())


@_output_op.register_fake
def _output_fake(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    values: Tensor | None,
    code: Tensor | None,
    scaling: Tensor | None,
    bias: Tensor | None,
    scaling_number: float,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], lora_B.shape[0]), dtype=dtype)


@_gradients_op.register_fake
def _gradients_fake(
    grad_output: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    values: Tensor | None,
    code: Tensor | None,
    scaling: Tensor | None,
    scaling_number: float,
    dtype: torch.dtype,
    needed: list[bool],
) -> list[Tensor]:
    inputs = (x, lora_A, lora_B, values, scaling)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needed, strict=True) if need and t is not None]


def _compute_dtype(x: Tensor, lora_A: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on (it leaves float64 alone), else that of x and parameters."""
    device_type = x.device.type
    # Meta tensors know no autocast and raise; torch.amp.is_autocast_available would break the graph in torch 2.11.
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
) -> None:
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
            raise ValueError(
                f"sparse_value has shape {tuple(sparse_value.shape)}, but the support has {support.nnz} positions"
            )
        if support.numel != out_features * in_features:
            raise ValueError(
                f"the support is for {support.numel} entries, but the weight is {out_features} x {in_features}"
            )
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        raise ValueError(f"scaling has shape {tuple(scaling.shape)}, but it must be a number or hold one element")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but out_features is {out_features}")
