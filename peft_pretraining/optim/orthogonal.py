"""Muon and Spectron: step matrices along their orthogonalised momentum. Other parameters are AdamW's (optim.build).

Muon (https://kellerjordan.github.io/posts/muon/; the scale by shape is that of arXiv 2502.16982) steps one matrix at a time.
Spectron (arXiv 2602.12429) steps the factors of W = s B A together, so that the spectral norm of W's change is limited.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peft_pretraining.config.optimizers import BNB_BLOCK_ELEMENTS, BNB_MIN_ELEMENTS
from peft_pretraining.optim.moments import Accumulating, moment_slices
from peft_pretraining.optim.slices import (
    SLICE_ELEMENTS,
    StochasticRounding,
    is_stored,
    rounding_noise,
    slices,
    store_,
    working_values,
)
from sparse_lora.support import plain

# Coefficients of the quintic Newton-Schulz iteration and its number of steps, as in torch.optim.Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315
NUM_ITERATIONS = 5
_SMALLEST_NORM = 1e-7


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Returns about U V^T for a matrix U S V^T, by Newton-Schulz iterations in its dtype; a zero matrix stays zero.

    Singular values end between about 0.7 and 1.2. The operations are those of torch.optim.Muon, which always uses bfloat16.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def scale_of_shape(shape: Iterable[int]) -> float:
    """Factor of the learning rate that gives an orthogonal matrix of this shape AdamW's usual step size (arXiv 2502.16982)."""
    return 0.2 * math.sqrt(max(shape))


class Muon(Accumulating, torch.optim.Optimizer):
    """Muon with Nesterov momentum; weight decay is decoupled. In bfloat16 its steps equal torch.optim.Muon's bit for bit.

    M <- mu M + (1 - mu) G;  W <- (1 - lr * decay) W - lr * 0.2 sqrt(max(out, in)) * orthogonalised(mu M + (1 - mu) G)

    After `accumulate`, which leaves no G, the step is along orthogonalised(M): momentum without Nesterov's look ahead.

    Args:
        params: matrices, or groups of them.
        names: the name of each matrix, which keys the noise of stochastic rounding.
        lr: learning rate.
        weight_decay: coefficient of weight decay.
        momentum: mu.
        state_bits: 8 for a momentum of one byte per element with a float32 scale per 256 elements (bitsandbytes' code book), 4
            for half a byte and a scale per 128 (torchao's); of matrices with fewer than 4,096 elements it stays float32. None for
            the matrices' dtype.
        rounding: stochastic rounding of bfloat16 matrices; None rounds to nearest.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        names: Mapping[nn.Parameter, str],
        lr: float,
        weight_decay: float,
        momentum: float,
        state_bits: int | None,
        rounding: StochasticRounding | None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.quantises, self._state_bits = state_bits is not None, state_bits
        self._names, self._momentum, self._rounding = names, momentum, rounding

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step_along(matrix, self._next_momentum(matrix, nesterov=True), group)

    def decays(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Returns mu."""
        return (self._momentum,)

    @torch.no_grad()
    def step_from_moments(self, num_micro_batches: int) -> None:
        """Steps every matrix along its momentum, to which all micro-batches of the update were added."""
        for group in self.param_groups:
            for matrix in group["params"]:
                self._step_along(matrix, self._present_momentum(matrix), group)

    def _step_along(self, matrix: nn.Parameter, momentum: torch.Tensor, group: Mapping[str, Any]) -> None:
        rate = group["lr"] * scale_of_shape(matrix.shape)
        self._move(matrix, orthogonalised(momentum), rate, 1 - group["lr"] * group["weight_decay"])

    def prepare_states(self) -> None:
        """Creates the momentum of every matrix now instead of in its first step."""
        for group in self.param_groups:
            for matrix in group["params"]:
                self.state[matrix].update(self._new_state(matrix))

    def _new_state(self, matrix: nn.Parameter) -> dict[str, Any]:
        if not self.quantises:
            return {"step": 0, "momentum_buffer": torch.zeros_like(matrix)}
        if matrix.numel() < BNB_MIN_ELEMENTS:
            return {"step": 0, "momentum_buffer": torch.zeros_like(matrix, dtype=torch.float32)}
        if self._state_bits == 4:
            from peft_pretraining.optim.adam_ao import new_moment

            return {"step": 0, **new_moment(matrix, 1, 4)}
        blocks = -(-matrix.numel() // BNB_BLOCK_ELEMENTS)
        return {
            "step": 0,
            "state1": torch.zeros(matrix.shape, dtype=torch.uint8, device=matrix.device),
            "absmax1": torch.zeros(blocks, dtype=torch.float32, device=matrix.device),
            "qmap1": _code_book(matrix.device),
        }

    def _next_momentum(self, matrix: nn.Parameter, nesterov: bool) -> torch.Tensor:
        """Adds the gradient to the momentum; returns it (the tensor of the state itself if not quantised) in the matrix's dtype.

        nesterov: return the momentum after one more step with the same gradient instead.
        """
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state.update(self._new_state(matrix))
        state["step"] += 1
        if "momentum_buffer" in state:
            momentum: torch.Tensor = state["momentum_buffer"]
            momentum.lerp_(matrix.grad.to(momentum.dtype), 1 - self._momentum)
            if nesterov:
                momentum = matrix.grad.to(momentum.dtype).lerp(momentum, self._momentum)
            return momentum.to(matrix.dtype)
        result = torch.empty_like(matrix)
        for part, moment in moment_slices(state, 1):
            gradient = matrix.grad.reshape(-1)[part].float()
            numbers = moment.read().lerp(gradient, 1 - self._momentum)
            moment.write_(numbers)
            result.view(-1)[part] = gradient.lerp(numbers, self._momentum) if nesterov else numbers
        return result

    def _present_momentum(self, matrix: nn.Parameter) -> torch.Tensor:
        """Returns the momentum in the matrix's dtype; the tensor of the state itself if it has that dtype."""
        if "momentum_buffer" in self.state[matrix]:
            momentum: torch.Tensor = self.state[matrix]["momentum_buffer"]
            return momentum.to(matrix.dtype)
        result = torch.empty_like(matrix)
        for part, moment in moment_slices(self.state[matrix], 1):
            result.view(-1)[part] = moment.read()
        return result

    def _move(self, matrix: nn.Parameter, direction: torch.Tensor, rate: float | torch.Tensor, kept: float) -> None:
        """Sets matrix <- kept * matrix - rate * direction, in place; a rate that is a tensor stays on the device."""
        noise = rounding_noise(self._rounding, matrix, self._names[matrix], self.state[matrix])
        if noise is not None or is_stored(matrix):
            for part in slices(matrix.numel(), SLICE_ELEMENTS):
                values = working_values(matrix, part, noise).mul_(kept)
                store_(matrix, part, values.sub_(direction.reshape(-1)[part].float() * rate), noise)
        elif isinstance(rate, torch.Tensor):
            matrix.mul_(kept).sub_(direction * rate.to(direction.dtype))
        else:
            matrix.mul_(kept).add_(direction, alpha=-rate)


class Spectron(Muon):
    """Steps the factors of s B A together, along their orthogonalised momenta O_B and O_A (arXiv 2602.12429).

    rho = eta / (s (|B| + |A| + 1)) with spectral norms |.|; B <- B - rho O_B, A <- A - rho O_A. The spectral norm of the change
    of s B A is then at most about eta = lr * 0.2 sqrt(max(out, in)), the same as of Muon's step of a dense matrix (out, in).
    Spectral norms come from one power step per update from a kept vector.

    Args:
        pairs: (A of shape (r, in), B of shape (out, r)) of every linear; both are in `params`.
        scale: s = alpha / r.
        params and others: as for Muon.
    """

    def __init__(self, params: Any, *, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]], scale: float, **settings: Any):
        super().__init__(params, **settings)
        self._pairs, self._scale = list(pairs), scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps every pair of factors that both have a gradient."""
        for pair in self._pairs:
            if all(factor.grad is not None for factor in pair):
                self._step_pair(pair, [orthogonalised(self._next_momentum(factor, nesterov=False)) for factor in pair])

    @torch.no_grad()
    def step_from_moments(self, num_micro_batches: int) -> None:
        """Steps every pair of factors along their momenta, to which all micro-batches of the update were added."""
        for pair in self._pairs:
            self._step_pair(pair, [orthogonalised(self._present_momentum(factor)) for factor in pair])

    def _step_pair(self, pair: tuple[nn.Parameter, nn.Parameter], directions: list[torch.Tensor]) -> None:
        groups = {factor: group for group in self.param_groups for factor in group["params"]}
        lora_A, lora_B = pair
        norms = sum(_spectral_norm(plain(factor), self.state[factor]["power_vector"]) for factor in pair)
        for factor, direction in zip(pair, directions, strict=True):
            lr, weight_decay = groups[factor]["lr"], groups[factor]["weight_decay"]
            largest_change = lr * scale_of_shape((lora_B.shape[0], lora_A.shape[1]))
            self._move(factor, direction, largest_change / (self._scale * (norms + 1)), 1 - lr * weight_decay)

    def _new_state(self, matrix: nn.Parameter) -> dict[str, Any]:
        vector = torch.zeros(matrix.shape[0], dtype=torch.float32, device=matrix.device)
        return super()._new_state(matrix) | {"power_vector": vector}


def _spectral_norm(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Estimates a matrix's largest singular value by one power step; updates `vector` (rows,), near its left singular vector.

    A zero `vector` is not used: the power step then starts from a vector of equal entries. Nothing waits for the device.
    """
    start = torch.where(vector.any(), vector, torch.full_like(vector, len(vector) ** -0.5))
    columns = matrix.t() @ start.to(matrix.dtype)
    columns = columns / columns.norm().clamp(min=_SMALLEST_NORM)
    rows = (matrix @ columns).float()
    norm: torch.Tensor = rows.norm()
    vector.copy_(torch.where(norm > _SMALLEST_NORM, rows / norm.clamp(min=_SMALLEST_NORM), start))
    return norm


def pairs_of_factors(parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, str]]:
    """Names (A, B) of the factors of each low-rank linear among these parameters."""
    names = [name.removesuffix("lora_A") for name in parameters if name.endswith("lora_A")]
    return [(f"{name}lora_A", f"{name}lora_B") for name in names if f"{name}lora_B" in parameters]


_CODE_BOOKS: dict[torch.device, torch.Tensor] = {}


def _code_book(device: torch.device) -> torch.Tensor:
    """bitsandbytes' signed dynamic code book, 256 values in [-1, 1]; one tensor per device, shared by all states."""
    if device not in _CODE_BOOKS:
        import bitsandbytes.functional as kernels

        _CODE_BOOKS[device] = kernels.create_dynamic_map(signed=True).to(device)
    return _CODE_BOOKS[device]
