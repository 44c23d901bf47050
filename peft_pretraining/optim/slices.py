"""Divides large tensors into slices, so that an optimizer's temporaries stay small, and rounds new values stochastically."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch

from sparse_lora import generator_for

# 2M elements, a multiple of every quantisation block; the libraries' float32 temporaries of a slice take about 50 MB.
SLICE_ELEMENTS = 2**21
# bitsandbytes keeps float32 states for tensors below this size, so no slice may be smaller.
SMALLEST_SLICE = 4096


def slices(num_elements: int, size: int) -> Iterator[slice]:
    """Yields slices of `size` elements that cover the tensor; a remainder below SMALLEST_SLICE extends the last slice."""
    start = 0
    while start < num_elements:
        end = start + size
        if num_elements - end < SMALLEST_SLICE:
            end = num_elements
        yield slice(start, end)
        start = end


# Returns a slice of a parameter's flattened gradient.
GradientSlices = Callable[[slice], torch.Tensor]


@runtime_checkable
class StepsSlices(Protocol):
    """An optimizer that needs a slice of a gradient at a time, so that the whole gradient need not exist."""

    def step_slices(self, parameter: torch.nn.Parameter, gradient: GradientSlices) -> None:
        """Steps one parameter as by the whole gradient; asks for each slice once, in order."""


@dataclass(frozen=True)
class StochasticRounding:
    """Random source for stochastic rounding of bfloat16 and int8 parameters: up or down at random so that the mean is exact.

    Rounding to nearest loses every update below half of bfloat16's spacing (1/256 of the value): at lr 1e-4 most of them.
    The generator is keyed by (seed, update, tensor), so that all processes round alike and resumed runs are bit-identical.
    """

    seed: int

    def generator(self, name: str, step: int, device: torch.device) -> torch.Generator:
        """Returns the generator for one update of one tensor."""
        keyed = generator_for(self.seed, f"rounding/{name}/{step}")
        return keyed if device.type == "cpu" else torch.Generator(device).manual_seed(keyed.initial_seed())


class Stored(Protocol):
    """A parameter that is stored as int8 (model.int8), so that it cannot be changed in place."""

    def working_values(self, part: slice) -> torch.Tensor:
        """Returns a float32 copy of a slice of the flattened parameter."""

    def store_(self, part: slice, values: torch.Tensor, noise: torch.Generator | None) -> None:
        """Stores float32 values of a slice, rounded."""


def is_stored(parameter: object) -> TypeGuard[Stored]:
    """Whether a parameter is stored as int8."""
    return hasattr(parameter, "working_values")


def num_steps(state: Mapping[str, Any]) -> int:
    """Returns the number of steps that a parameter has made, before and after resets of its moments."""
    return int(state["step"]) + int(state.get("steps_before_reset", 0))


def rounding_noise(
    rounding: StochasticRounding | None, parameter: torch.Tensor, name: str, state: Mapping[str, Any]
) -> torch.Generator | None:
    """Returns the generator for one update of a parameter; None if it is not rounded stochastically.

    state: the parameter's optimizer state, whose step is counted already.
    """
    if rounding is None or not (parameter.dtype == torch.bfloat16 or is_stored(parameter)):
        return None
    return rounding.generator(name, num_steps(state), parameter.device)


def round_stochastically_(target: torch.Tensor, source: torch.Tensor, generator: torch.Generator) -> None:
    """Rounds source (float32) to target (bfloat16, same shape): away from zero with probability equal to the part cut off."""
    bits = source.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    # Floats are stored as sign and magnitude, so adding to the bits moves away from zero; the mask keeps bfloat16's 16 bits.
    target.copy_(((bits + noise) & -(1 << 16)).view(torch.float32))


def working_values(parameter: torch.Tensor, part: slice, noise: torch.Generator | None) -> torch.Tensor:
    """Returns a slice of the flattened parameter to step: a float32 copy, to be stored by `store_`, with `noise` or of int8.

    Otherwise a view of the parameter.
    """
    if is_stored(parameter):
        return parameter.working_values(part)
    values = parameter.view(-1)[part]
    return values if noise is None else values.float()


def store_(parameter: torch.Tensor, part: slice, values: torch.Tensor, noise: torch.Generator | None) -> None:
    """Stores the stepped values of a slice, given by `working_values`; a view of the parameter is stored already."""
    if is_stored(parameter):
        parameter.store_(part, values, noise)
    elif noise is not None:
        round_stochastically_(parameter.view(-1)[part], values, noise)
