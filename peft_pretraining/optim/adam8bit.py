"""bitsandbytes' Adam with 8-bit moments, stepped in slices to avoid temporaries of the tensor's size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import bitsandbytes
import bitsandbytes.functional as kernels
import torch

from peft_pretraining.config.optimizers import BNB_BLOCK_ELEMENTS
from peft_pretraining.optim.moments import AccumulatingAdam
from peft_pretraining.optim.slices import (
    SLICE_ELEMENTS,
    GradientSlices,
    StochasticRounding,
    rounding_noise,
    slices,
    store_,
    working_values,
)

# Code books (the values that codes stand for), filled by bitsandbytes and shared by all instances.
_CODE_BOOKS: dict[str, torch.Tensor] = {}


class SlicedAdam8bit(AccumulatingAdam, bitsandbytes.optim.Adam8bit):
    """bitsandbytes' Adam8bit, stepped in slices; a parameter group with `state_bits`: 32 has 32-bit moments.

    On a CPU bitsandbytes needs 24 bytes of temporaries per element of a tensor. Its kernels work block by block, so slices of
    whole blocks give bit-identical results (tests/optim). On a GPU its kernels need no temporaries, and a tensor is stepped whole
    unless it is rounded stochastically.

    Args:
        params: parameters or parameter groups.
        names: the name of each parameter, which keys the noise of stochastic rounding.
        rounding: stochastic rounding of bfloat16 parameters; None rounds to nearest.
        settings: further arguments of bitsandbytes' Adam8bit.
    """

    quantises = True

    def __init__(
        self, params: Any, *, names: dict[torch.nn.Parameter, str], rounding: StochasticRounding | None, **settings: Any
    ):
        super().__init__(params, **settings)
        self.name2qmap = _CODE_BOOKS
        self._names, self._rounding = names, rounding
        self._sliced: dict[torch.nn.Parameter, GradientSlices] = {}

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Returns bitsandbytes' configuration of a parameter, with the number of bits of its group."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)
        config["optim_bits"] = group.get("state_bits", config["optim_bits"])
        return config

    def prepare_states(self) -> None:
        """Creates the moments of every parameter now instead of in its first step."""
        for gindex, group in enumerate(self.param_groups):
            for pindex, parameter in enumerate(group["params"]):
                self.init_state(group, parameter, gindex, pindex)

    def step_slices(self, parameter: torch.nn.Parameter, gradient: GradientSlices) -> None:
        """Steps one parameter, whose gradient is computed slice by slice."""
        self._sliced[parameter] = gradient
        # bitsandbytes steps parameters that have a gradient; this one takes the memory of one element.
        parameter.grad = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
        self.step()
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps every parameter that has a gradient; bitsandbytes' own step waits for the GPU after each of them."""
        device = self.param_groups[0]["params"][0].device
        with _default_stream(device) if device.type == "cuda" else contextlib.nullcontext():
            for gindex, group in enumerate(self.param_groups):
                for pindex, parameter in enumerate(group["params"]):
                    if parameter.grad is not None:
                        if not self.state[parameter]:
                            self.init_state(group, parameter, gindex, pindex)
                        self.update_step(group, parameter, gindex, pindex)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: torch.nn.Parameter, gindex: int, pindex: int) -> None:
        """Steps one parameter."""
        assert p.grad is not None
        state, config = self.state[p], self.get_config(gindex, pindex, group)
        state["step"] += 1
        sliced = self._sliced.pop(p, None)
        gradient = sliced or p.grad.contiguous().view(-1).__getitem__
        noise = rounding_noise(self._rounding, p, self._names[p], state)
        size = SLICE_ELEMENTS if p.device.type == "cpu" or noise is not None or sliced is not None else p.numel()
        for part in slices(p.numel(), size):
            values = working_values(p, part, noise)
            # The kernels require gradient and parameter to have the same dtype.
            _update_slice(state, config, part, values, gradient(part).to(values.dtype))
            store_(p, part, values, noise)


@contextlib.contextmanager
def _default_stream(device: torch.device) -> Iterator[None]:
    """Runs the block in the GPU's default stream: after the current stream's work, and before what follows in that stream.

    bitsandbytes launches its optimizer kernels there (0.50; they take no stream), while FSDP2 calls hooks in a stream of its own.
    """
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)


def _update_slice(state: dict[str, Any], config: dict[str, Any], part: slice, values: torch.Tensor, grad: torch.Tensor) -> None:
    first, second = (state[name].view(-1)[part] for name in ("state1", "state2"))
    (beta1, beta2), eps, lr, weight_decay = config["betas"][:2], config["eps"], config["lr"], config["weight_decay"]
    if first.dtype == torch.float32:
        kernels.optimizer_update_32bit(
            "adam", grad, values, first, beta1, eps, state["step"], lr, second, beta2, weight_decay=weight_decay
        )
        return
    blocks = slice(part.start // BNB_BLOCK_ELEMENTS, -(-part.stop // BNB_BLOCK_ELEMENTS))
    kernels.optimizer_update_8bit_blockwise(
        *("adam", grad, values, first, second, beta1, beta2, 0.0, 0.0, eps, state["step"], lr),
        *(state["qmap1"], state["qmap2"], state["absmax1"][blocks], state["absmax2"][blocks]),
        weight_decay=weight_decay,
    )
