"""Moments in optimizers' states, read and written slice by slice, and accumulation of gradients in them.

Layouts: plain numbers; bitsandbytes' 8-bit codes; torchao's 8- and 4-bit codes, with plain numbers after the last whole block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_pretraining.config.optimizers import AO_KINDS, BNB_BLOCK_ELEMENTS
from peft_pretraining.optim.slices import (
    SLICE_ELEMENTS,
    GradientSlices,
    StochasticRounding,
    num_steps,
    round_stochastically_,
    rounding_noise,
    slices,
    store_,
    working_values,
)


@dataclass(frozen=True)
class Moment:
    """A slice of one moment, a view of an optimizer's state.

    values: (n,) numbers; (n,) uint8 codes; or (n / 2,) uint8, each two 4-bit codes.
    scale, book: of codes only: float32 scale of each block, and the numbers in [-1, 1] that codes stand for, ascending.
    bits: of a code. signed: False for second moments. by_torchao: whose rounding to nearest `write_` uses.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    book: torch.Tensor | None = None
    bits: int = 8
    signed: bool = True
    by_torchao: bool = False

    def read(self) -> torch.Tensor:
        """Returns the numbers, shape (n,): float32 ones that codes stand for, or a view of plain ones."""
        if self.scale is None or self.book is None:
            return self.values
        codes = self.values
        if self.bits == 4:
            codes = torch.stack([codes >> 4, codes & 0b1111], dim=-1).view(-1)
        numbers = self.book[codes.int()]
        for part, block in _blocks(numbers, self.scale, self._block):
            part.mul_(block)
        return numbers

    def write_(self, numbers: torch.Tensor, noise: torch.Generator | None = None) -> None:
        """Stores numbers, shape (n,), rounded to nearest; with `noise` up or down at random, so that the mean is exact."""
        if self.scale is None or self.book is None:
            if noise is not None and self.values.dtype == torch.bfloat16:
                round_stochastically_(self.values, numbers, noise)
            else:
                self.values.copy_(numbers)
        elif noise is not None:
            self._write_at_random_(numbers, self.scale, self.book, noise)
        elif self.by_torchao:
            self.tensor().copy_(numbers)
        else:
            import bitsandbytes.functional as kernels

            codes, scales = kernels.quantize_blockwise(numbers.contiguous(), code=self.book, blocksize=BNB_BLOCK_ELEMENTS)
            self.values.copy_(codes.view(-1))
            self.scale.copy_(scales.absmax)

    def tensor(self) -> torch.Tensor:
        """Returns the plain numbers, or torchao's codes as its tensor class; shares storage."""
        if self.scale is None or self.book is None:
            return self.values
        from torchao.optim.subclass_4bit import OptimState4bit
        from torchao.optim.subclass_8bit import OptimState8bit

        view: torch.Tensor
        if self.bits == 8:
            view = OptimState8bit(self.values, self.scale, self.book, self.signed, dtype=torch.float32)
        else:
            size = (2 * self.values.numel(),)
            view = OptimState4bit(self.values, self.scale, self.book, self.signed, size, dtype=torch.float32)
        return view

    @property
    def _block(self) -> int:
        return AO_KINDS[self.bits][0] if self.by_torchao else BNB_BLOCK_ELEMENTS

    def _write_at_random_(self, numbers: torch.Tensor, scale: torch.Tensor, book: torch.Tensor, noise: torch.Generator) -> None:
        # Nearest rounding clips what lies below the book's lowest code; repeated in every micro-batch, much of them is lost.
        lowest = book[0] if self.signed else book[book > 0][0]
        scaled = torch.empty_like(numbers)
        for (part, block), (target, _) in zip(
            _blocks(numbers, scale, self._block), _blocks(scaled, scale, self._block), strict=True
        ):
            largest = part.amax(1) / book[-1]
            block.copy_((torch.maximum(largest, part.amin(1) / lowest) if self.signed else largest)[:, None])
            torch.div(part, block.clamp(min=torch.finfo(torch.float32).tiny), out=target)
        # A second moment of zero beside a first moment that is not zero would make a step of any size.
        scaled.clamp_(lowest, book[-1])
        upper = torch.bucketize(scaled, book, out_int32=True).clamp_(1, len(book) - 1)
        low, high = book[upper - 1], book[upper]
        share = torch.rand(scaled.shape, generator=noise, device=scaled.device)
        codes = (upper - (share >= (scaled - low) / (high - low)).int()).to(torch.uint8)
        self.values.copy_((codes[::2] << 4) | codes[1::2] if self.bits == 4 else codes)


def _blocks(numbers: torch.Tensor, scale: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields views of all whole blocks, (blocks, elements), then of an incomplete last one; each with scales (blocks, 1)."""
    whole = numbers.numel() - numbers.numel() % size
    if whole:
        yield numbers[:whole].view(-1, size), scale[: whole // size, None]
    if whole < numbers.numel():
        yield numbers[None, whole:], scale[-1:, None]


def moment_slices(state: Mapping[str, Any], number: int) -> Iterator[tuple[slice, Moment]]:
    """Yields the slices of the first or second moment of one parameter's state, with their place in the flat parameter.

    Raises KeyError if the state has no such moment.
    """
    signed, start = number == 1, 0
    if f"codes{number}" in state:
        codes, scale, book = (state[f"{part}{number}"] for part in ("codes", "scale", "qmap"))
        bits = 8 if book.numel() == AO_KINDS[8][2] else 4
        block, per_byte, _ = AO_KINDS[bits]
        start = codes.numel() * per_byte
        for part in slices(start, SLICE_ELEMENTS):
            place = slice(part.start // per_byte, part.stop // per_byte)
            blocks = slice(part.start // block, part.stop // block)
            yield part, Moment(codes[place], scale[blocks], book, bits, signed, by_torchao=True)
    name = f"state{number}" if f"state{number}" in state else f"moment{number}"
    rest = state[name if name in state or number > 1 else "momentum_buffer"].view(-1)
    for part in slices(rest.numel(), SLICE_ELEMENTS):
        place = slice(start + part.start, start + part.stop)
        if rest.dtype == torch.uint8:
            blocks = slice(part.start // BNB_BLOCK_ELEMENTS, -(-part.stop // BNB_BLOCK_ELEMENTS))
            yield place, Moment(rest[part], state[f"absmax{number}"][blocks], state[f"qmap{number}"], 8, signed)
        else:
            yield place, Moment(rest[part])


class Accumulating:
    """Adds gradients of single micro-batches to an optimizer's moments, which the optimizer steps from afterwards.

    For gradients g_1 ... g_N of the micro-batches, whose sum is the update's gradient (AdamA, arXiv 2305.19982):
    m <- beta1 m + (1 - beta1) sum g_i, as with the whole gradient, and v <- beta2 v + (1 - beta2) sum g_i^2, in place of the
    square of the sum. Moments of fewer than 32 bits are rounded at random: rounded to nearest, additions below their spacing
    would be lost.
    """

    state: Any
    param_groups: list[dict[str, Any]]
    # Whether weight decay is added to the gradient.
    decays_gradient = False

    def decays(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Returns the decay rates of a group's moments."""
        raise NotImplementedError

    def step_from_moments(self, num_micro_batches: int) -> None:
        """Steps every parameter from its moments, to which all `num_micro_batches` micro-batches of the update were added."""
        raise NotImplementedError

    def accumulate(
        self, parameter: nn.Parameter, gradient: GradientSlices, *, first: bool, share: float, noise: StochasticRounding, key: str
    ) -> None:
        """Adds a gradient to the moments of a parameter; the `first` one of an update lets them decay and counts the step.

        gradient: asked for each slice once, in order. share: of the update's weight decay, if that is added to gradients. noise,
        key: the source of random rounding, and what it is keyed by besides the number of the step.
        """
        (group,) = (group for group in self.param_groups if any(parameter is member for member in group["params"]))
        state = self.state[parameter]
        state["step"] += int(first)
        generator = noise.generator(key, num_steps(state), parameter.device)
        weight_decay = share * group["weight_decay"] if self.decays_gradient else 0.0
        decays = self.decays(group)
        for slices_of_moments in zip(*(moment_slices(state, number) for number in range(1, len(decays) + 1)), strict=True):
            part = slices_of_moments[0][0]
            added = _at_least_float32(gradient(part))
            if weight_decay:
                added = added.add(working_values(parameter, part, None).to(added.dtype), alpha=weight_decay)
            for power, ((_, moment), decay) in enumerate(zip(slices_of_moments, decays, strict=True), 1):
                numbers = _at_least_float32(moment.read())
                if first:
                    numbers = numbers.mul_(decay)
                other = added.to(numbers.dtype)
                numbers = numbers.add_(other, alpha=1 - decay) if power == 1 else numbers.addcmul_(other, other, value=1 - decay)
                moment.write_(numbers, generator)


class AccumulatingAdam(Accumulating):
    """Steps of Adam and AdamW from moments to which micro-batches were added.

    With N micro-batches of gradients (G + noise) / N, the sum of squares lacks (1 - 1 / N) G^2 of the expected square of the sum,
    so that where gradients agree a step would be sqrt(N) times too large. The step adds that part, estimated by the first moment:
    W <- W - lr * m^ / (sqrt(v^ + (1 - 1 / N) m^^2) + eps), with bias-corrected m^ and v^; for N = 1 it is Adam's.
    """

    _names: Mapping[nn.Parameter, str]
    _rounding: StochasticRounding | None

    def decays(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Returns beta1 and beta2."""
        return tuple(group["betas"][:2])

    @torch.no_grad()
    def step_from_moments(self, num_micro_batches: int) -> None:
        """Steps every parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step_from_moments(parameter, group, num_micro_batches)

    def _step_from_moments(self, parameter: nn.Parameter, group: Mapping[str, Any], num_micro_batches: int) -> None:
        state, lr = self.state[parameter], group["lr"]
        kept = 1.0 if self.decays_gradient else 1 - lr * group["weight_decay"]
        corrections = [1 - decay ** state["step"] for decay in self.decays(group)]
        noise = rounding_noise(self._rounding, parameter, self._names[parameter], state)
        for (part, first), (_, second) in zip(moment_slices(state, 1), moment_slices(state, 2), strict=True):
            mean, square = (
                _at_least_float32(moment.read()) / correction
                for moment, correction in zip((first, second), corrections, strict=True)
            )
            root = square.addcmul_(mean, mean, value=1 - 1 / num_micro_batches).sqrt_().add_(group["eps"])
            values = working_values(parameter, part, noise)
            values.copy_(values.to(mean.dtype).mul(kept).addcdiv_(mean, root, value=-lr))
            store_(parameter, part, values, noise)


def _at_least_float32(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))
