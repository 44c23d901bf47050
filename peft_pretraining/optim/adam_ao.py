"""Adam with torchao's arithmetic, stepped in slices: 4- and 8-bit moments, and stochastic rounding of bfloat16 parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torchao
from torch import nn
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit

from peft_pretraining.config.optimizers import AO_KINDS
from peft_pretraining.optim.moments import AccumulatingAdam, moment_slices
from peft_pretraining.optim.slices import (
    SMALLEST_SLICE,
    GradientSlices,
    StochasticRounding,
    rounding_noise,
    store_,
    working_values,
)

if "dtype" not in inspect.signature(OptimState4bit.__new__).parameters:
    raise ImportError(f"torchao {torchao.__version__} is too old, 0.17 or newer is needed")

# bits -> torchao's quantised moment
_CLASSES: dict[int, Any] = {4: OptimState4bit, 8: OptimState8bit}


class SlicedAdam(AccumulatingAdam, torch.optim.Optimizer):
    """Adam or AdamW with moments of 4 bits (arXiv 2309.01507), 8 bits, 32 bits, or the parameter's dtype.

    Moments of an incomplete last block, and of tensors with fewer than 4,096 elements, stay in float32. The state consists of
    plain tensors, so that any checkpoint can store it.

    Args:
        params: parameters or groups; a group's `state_bits` is 4, 8, 32, or None for the parameter's dtype.
        names: the name of each parameter, which keys the noise of stochastic rounding.
        lr: learning rate.
        weight_decay: coefficient of weight decay.
        decoupled: True for AdamW's weight decay; False adds it to the gradient.
        state_bits: bits of the moments of groups without `state_bits`.
        rounding: stochastic rounding of bfloat16 parameters; None rounds to nearest.
        betas: decay rates of the first and second moment.
        eps: term added to the denominator.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        names: dict[nn.Parameter, str],
        lr: float,
        weight_decay: float,
        decoupled: bool,
        state_bits: int | None,
        rounding: StochasticRounding | None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "state_bits": state_bits}
        super().__init__(params, defaults)
        self._names, self._decoupled, self._rounding = names, decoupled, rounding
        self.decays_gradient = not decoupled
        self.quantises = any(group["state_bits"] in _CLASSES for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad.reshape(-1).__getitem__, group)

    @torch.no_grad()
    def step_slices(self, parameter: nn.Parameter, gradient: GradientSlices) -> None:
        """Steps one parameter, whose gradient is computed slice by slice."""
        group = next(group for group in self.param_groups if any(member is parameter for member in group["params"]))
        self._step_one(parameter, gradient, group)

    def prepare_states(self) -> None:
        """Creates the moments of every parameter now instead of in its first step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].update(_new_state(parameter, group["state_bits"]))

    def _step_one(self, parameter: nn.Parameter, gradient: GradientSlices, group: dict[str, Any]) -> None:
        state, bits = self.state[parameter], group["state_bits"]
        if not state:
            state.update(_new_state(parameter, bits))
        state["step"] += 1
        noise = rounding_noise(self._rounding, parameter, self._names[parameter], state)
        hyperparameters = (*group["betas"], group["weight_decay"], group["eps"], self._decoupled, False)
        for (part, first), (_, second) in zip(moment_slices(state, 1), moment_slices(state, 2), strict=True):
            values = working_values(parameter, part, noise)
            # torchao's function takes step and learning rate as tensors; its sixth argument is AMSGrad's maximum.
            step, lr = torch.tensor(float(state["step"])), torch.tensor(group["lr"], dtype=torch.float32)
            single_param_adam(values, gradient(part), step, first.tensor(), second.tensor(), None, lr, *hyperparameters)
            store_(parameter, part, values, noise)


def quantised_elements(num_elements: int, bits: int | None) -> int:
    """Returns how many elements of a tensor have quantised moments: those in whole blocks, none of a small tensor."""
    if bits not in AO_KINDS or num_elements < SMALLEST_SLICE:
        return 0
    return num_elements - num_elements % AO_KINDS[bits][0]


def _new_state(parameter: nn.Parameter, bits: int | None) -> dict[str, Any]:
    return {"step": 0, **new_moment(parameter, 1, bits), **new_moment(parameter, 2, bits)}


def new_moment(parameter: nn.Parameter, number: int, bits: int | None) -> dict[str, torch.Tensor]:
    """Returns a first or second moment of zeros: codes and scales for the whole blocks, plain numbers for the rest."""
    quantised = quantised_elements(parameter.numel(), bits)
    moment: dict[str, torch.Tensor] = {}
    if bits is not None and quantised:
        zeros = _CLASSES[bits].zeros((quantised,), number == 1, AO_KINDS[bits][0], parameter.device)
        moment |= {f"codes{number}": zeros.codes, f"scale{number}": zeros.scale, f"qmap{number}": zeros.qmap}
    dtype = torch.float32 if bits else parameter.dtype
    shape = (parameter.numel() - quantised,) if quantised else parameter.shape
    return moment | {f"moment{number}": torch.zeros(shape, dtype=dtype, device=parameter.device)}
