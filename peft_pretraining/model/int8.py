"""Int8Tensor: a parameter that is stored as int8 codes with a float32 scale per block, the only copy of its values.

A value is code * scale. It is computed where a parameter is used, in the parameter's dtype, and new values are rounded to codes
where an optimizer stores them (`optim.slices`). Imported only by runs with --weight_dtype int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from peft_pretraining.checkpoint.step_folder import load_tensors, tensor_index
from peft_pretraining.config.parameter_groups import group_of
from peft_pretraining.memory.counts import INT8_BLOCK_ELEMENTS as BLOCK
from peft_pretraining.memory.counts import SLICE_ELEMENTS

_LARGEST_CODE = 127
# Elements that are converted at a time on a CPU, where float32 values between codes and result are temporary: 1 MiB of them.
_CHUNK = 2**18
# End of the name under which a checkpoint holds a parameter's scales, beside its codes.
SCALES = ".scales"


class Int8Tensor(Tensor):
    """A tensor of a floating dtype whose elements are codes (int8, its shape) times scales (float32, one per block).

    A block is BLOCK consecutive elements of the flattened tensor; the last one may be shorter. Looking up rows and slicing rows
    compute these rows only, linear layers keep the codes for their backward pass, and copying values into it rounds to nearest.
    Every other operation works on its plain values; its gradients are plain tensors.
    """

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Int8Tensor:
        """codes: contiguous. dtype: of the values."""
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        made.codes, made.scales = codes, scales
        return made

    @classmethod
    def like(cls, tensor: Tensor, device: torch.device | str | None = None) -> Int8Tensor:
        """Returns an undefined one with the shape and dtype of a tensor."""
        device = tensor.device if device is None else device
        codes = torch.empty(tensor.shape, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(-(-codes.numel() // BLOCK), dtype=torch.float32, device=device), tensor.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Tensor({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @property
    def stored_parts(self) -> dict[str, Tensor]:
        """The tensors that hold it, by the end of the name under which a checkpoint holds each."""
        return {"": self.codes, SCALES: self.scales}

    @property
    def rows_at_a_time(self) -> int:
        """Rows of a matrix whose values the loss computes at a time."""
        return max(1, SLICE_ELEMENTS // self.shape[1])

    def dequantised(self) -> Tensor:
        """Returns the values as a plain tensor; differentiable."""
        if torch.is_grad_enabled() and self.requires_grad:
            values: Tensor = _Dequantised.apply(self)
            return values
        return self._values()

    def working_values(self, part: slice) -> Tensor:
        """Returns values of a slice of the flattened tensor, in float32, to be changed and given to `store_`."""
        return self._elements(part.start, part.stop, torch.float32)

    @torch.no_grad()
    def store_(self, part: slice, values: Tensor, noise: torch.Generator | None) -> None:
        """Stores float32 values of a slice that begins with a block and ends with one, or with the tensor.

        noise: rounds up or down at random, so that the mean is exact; None rounds to nearest.
        """
        codes, scales = self.codes.view(-1)[part], self.scales[part.start // BLOCK : -(-part.stop // BLOCK)]
        for (code, scale), (value, _) in zip(_in_blocks(codes, scales), _in_blocks(values, scales), strict=True):
            _quantise_(code, scale, value, noise)

    def _values(self, dtype: torch.dtype | None = None) -> Tensor:
        return _dequantise(self.codes.view(-1), self.scales, dtype or self.dtype).view(self.shape)

    def _elements(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns elements of the flattened tensor."""
        first = start // BLOCK
        scales = self.scales[first : -(-stop // BLOCK)]
        return _dequantise(self.codes.view(-1)[first * BLOCK : stop], scales, dtype or self.dtype)[start - first * BLOCK :]

    def _rows(self, indices: Tensor) -> Tensor:
        """Returns rows of a matrix, (*indices.shape, columns)."""
        columns = self.shape[1]
        codes = self.codes[indices]
        if columns % BLOCK == 0:
            scales = self.scales.view(-1, columns // BLOCK)[indices]
            return (codes.view(*scales.shape, BLOCK) * scales[..., None]).view(codes.shape).to(self.dtype)
        positions = indices[..., None] * columns + torch.arange(columns, device=indices.device)
        return (codes * self.scales[positions // BLOCK]).to(self.dtype)

    def _assign_(self, values: Tensor) -> Int8Tensor:
        if isinstance(values, Int8Tensor) and values.shape == self.shape:
            self.codes.copy_(values.codes)
            self.scales.copy_(values.scales)
            return self
        flat = values.expand(self.shape).reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            part = slice(start, min(start + _CHUNK, flat.numel()))
            self.store_(part, flat[part].to(self.device, torch.float32), None)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and isinstance(args[1], Int8Tensor):
            return _Linear.apply(*(*args, (kwargs or {}).get("bias"))[:3])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPERATIONS and (result := _OPERATIONS[func](*args, **kwargs)) is not NotImplemented:
            return result
        if func.namespace == "c10d":
            # These write to their arguments without saying so in their signature.
            raise TypeError(f"{func} needs plain tensors: send codes and scales, or the dequantised values")
        written = [tensor for tensor in _written(func, args, kwargs) if isinstance(tensor, Int8Tensor)]
        if any(tensor is not args[0] for tensor in written):
            raise TypeError(f"{func} cannot write to a parameter that is stored as int8")
        plain_args, plain_kwargs = tree_map_only(Int8Tensor, lambda tensor: tensor._values(), (args[len(written) :], kwargs))
        if written:
            return written[0]._assign_(func(written[0]._values(torch.float32), *plain_args, **plain_kwargs))
        return func(*plain_args, **plain_kwargs)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Returns the arguments to which an operator writes."""
    names = [argument.name for argument in func._schema.arguments]
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    writes = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [values[name] for name in writes if name in values]


# --- Operations that do not need all values ---


def _detach(tensor: Int8Tensor) -> Any:
    return Int8Tensor(tensor.codes, tensor.scales, tensor.dtype)


def _clone(tensor: Int8Tensor, *, memory_format: Any = None) -> Any:
    return Int8Tensor(tensor.codes.clone(), tensor.scales.clone(), tensor.dtype)


def _to_copy(tensor: Int8Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Any:
    if dtype not in (None, tensor.dtype):
        return NotImplemented
    return Int8Tensor(tensor.codes.to(device, copy=True), tensor.scales.to(device, copy=True), tensor.dtype)


def _empty_like(tensor: Int8Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Any:
    """On another device an undefined Int8Tensor, as nn.Module.to_empty needs, else an undefined plain tensor."""
    if device is not None and torch.device(device) != tensor.device:
        return Int8Tensor.like(tensor, device)
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)


def _zeros_like(tensor: Int8Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Any:
    return torch.zeros(tensor.shape, dtype=dtype or tensor.dtype, device=device or tensor.device)


def _copy_(target: Any, source: Tensor, non_blocking: bool = False) -> Any:
    return target._assign_(source) if isinstance(target, Int8Tensor) else NotImplemented


def _embedding(weight: Any, indices: Tensor, *_padding_and_gradients: Any, **options: Any) -> Any:
    return weight._rows(indices) if isinstance(weight, Int8Tensor) else NotImplemented


def _slice(tensor: Int8Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    first, last, _ = slice(start, end).indices(len(tensor))
    if dim != 0 or step != 1 or last <= first:
        return NotImplemented
    row = math.prod(tensor.shape[1:])
    return tensor._elements(first * row, last * row).view(last - first, *tensor.shape[1:])


_ATEN = torch.ops.aten
# A function returns NotImplemented if it has no better way than the plain values.
_OPERATIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.detach.default: _detach,
    _ATEN.alias.default: _detach,
    _ATEN.clone.default: _clone,
    _ATEN._to_copy.default: _to_copy,
    _ATEN.empty_like.default: _empty_like,
    _ATEN.zeros_like.default: _zeros_like,
    _ATEN.copy_.default: _copy_,
    _ATEN.embedding.default: _embedding,
    _ATEN.slice.Tensor: _slice,
}


class _Dequantised(torch.autograd.Function):
    """Returns the values of an Int8Tensor; the gradient is that of the values."""

    @staticmethod
    def forward(ctx: Any, tensor: Int8Tensor) -> Tensor:
        return tensor._values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Linear(torch.autograd.Function):
    """F.linear with a stored weight, which keeps the codes for the backward pass instead of the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight._values(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight._values() if need_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


# --- Codes and scales ---


def _in_blocks(flat: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields views of a flat tensor and its scales: one row per whole block, then the shorter last block, if there is one."""
    whole = flat.numel() // BLOCK
    yield flat[: whole * BLOCK].view(whole, BLOCK), scales[:whole, None]
    if whole < len(scales):
        yield flat[whole * BLOCK :].view(1, -1), scales[whole:, None]


def _dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns codes * scales, flat, multiplied in float32."""
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    size = _CHUNK if codes.device.type == "cpu" else max(1, codes.numel())
    for start in range(0, codes.numel(), size):
        chunk_scales = scales[start // BLOCK : (start + size) // BLOCK if start + size < codes.numel() else None]
        chunks = (_in_blocks(tensor[start : start + size], chunk_scales) for tensor in (codes, values))
        for (code, scale), (value, _) in zip(*chunks, strict=True):
            torch.mul(code, scale, out=value)
    return values


def _quantise_(codes: Tensor, scales: Tensor, values: Tensor, noise: torch.Generator | None) -> None:
    """Sets codes and scales, in place, to those of float32 values; one row per block. A block that has its values stays as it is.

    The largest value of a block gets the code 127 or -127. noise: see Int8Tensor.store_.
    """
    # In new memory any codes may lie beside a scale of zero.
    changed = (codes * scales != values).any(dim=1, keepdim=True) | (scales == 0)
    new_scales = torch.linalg.vector_norm(values, ord=torch.inf, dim=1, keepdim=True) / _LARGEST_CODE
    # A block of zeros has the scale 0, and codes 0.
    steps = values / torch.where(new_scales > 0, new_scales, 1.0)
    if noise is None:
        steps.round_()
    else:
        # Compared with the part cut off: in a sum with `steps`, float32 would lose the noise's last bits, always upwards.
        below = steps.floor()
        steps = below.add_(torch.rand(steps.shape, generator=noise, device=steps.device) >= 1 - (steps - below))
    steps.clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    codes.copy_(torch.where(changed, steps.to(torch.int8), codes))
    scales.copy_(torch.where(changed, new_scales, scales))


# --- The parameters of a model, and checkpoints ---


def quantise_parameters(model: nn.Module) -> None:
    """Replaces dense weights, factors, sparse values, embedding and head of a model, in place, by Int8Tensors with their values.

    Norms, biases and trained scales stay. On the meta device there are no values. A tied parameter stays tied.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if group_of(f"{prefix}.{name}", parameter.dim()) == "norm":
                continue
            if parameter not in made:
                stored = Int8Tensor.like(parameter)
                if not parameter.is_meta:
                    stored._assign_(parameter.detach())
                made[parameter] = nn.Parameter(stored, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])


def load_dequantised(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills plain tensors, in place, from a checkpoint; where it holds codes and scales, with their values.

    Raises:
        CheckpointError: as step_folder.load_tensors.
    """
    index = tensor_index(folder)
    stored = {name: Int8Tensor.like(tensor, "cpu") for name, tensor in tensors.items() if f"{name}{SCALES}" in index}
    parts = {f"{name}{end}": part for name, tensor in stored.items() for end, part in tensor.stored_parts.items()}
    load_tensors(folder, {**{name: tensor for name, tensor in tensors.items() if name not in stored}, **parts})
    for name, tensor in stored.items():
        tensors[name].copy_(tensor)
