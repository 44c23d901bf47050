"""Stepping a large tensor in slices, so that an optimizer's temporaries stay small, and rounding to bfloat16 without bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparse_lora import generator_for

# 2M elements: a multiple of every quantisation block, and the libraries' float32 temporaries of a slice take some 50 MB.
SLICE_ELEMENTS = 2**21
# bitsandbytes keeps float32 states below this size; a slice must not be mistaken for such a tensor.
SMALLEST_SLICE = 4096


def slices(num_elements: int, size: int) -> Iterator[slice]:
    """Slices that cover 0 .. num_elements - 1, all of `size` elements but the last; a short rest joins the one before it."""
    start = 0
    while start < num_elements:
        end = start + size
        if num_elements - end < SMALLEST_SLICE:
            end = num_elements
        yield slice(start, end)
        start = end


@dataclass(frozen=True)
class StochasticRounding:
    """Rounds new bfloat16 parameters up or down at random, with the probabilities that make the mean right.

    Nearest rounding loses every update below half of a bfloat16's spacing (1/256 of the value): at lr 1e-4 most of them.
    The noise is keyed by (seed, update, tensor), so that replicas on several processes round alike and a resumed run goes on
    as it would have.
    """

    seed: int

    def generator(self, name: str, step: int, device: torch.device) -> torch.Generator:
        """The noise of one tensor's update."""
        keyed = generator_for(self.seed, f"rounding/{name}/{step}")
        return keyed if device.type == "cpu" else torch.Generator(device).manual_seed(keyed.initial_seed())


def round_stochastically_(target: torch.Tensor, source: torch.Tensor, generator: torch.Generator) -> None:
    """target (bfloat16) <- source (float32), both of one shape: up with the probability of the share that is cut off."""
    bits = source.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    # Sign and magnitude: adding to the bits moves away from zero for either sign. What remains are bfloat16's 16 bits.
    target.copy_(((bits + noise) & -(1 << 16)).view(torch.float32))
