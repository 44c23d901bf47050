"""Resets or prunes the moments of parameters whose values were replaced by a restart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_pretraining.distributed.parallel import part_of, rows_of_part, whole_of
from peft_pretraining.distributed.world import World, gather_objects
from sparse_lora import generator_for

# Prefix of the keys of code books, which are constants shared by all parameters.
_CODE_BOOKS = "qmap"


def reset_moments_(state: dict[str, Any]) -> None:
    """Resets a parameter's optimizer state, in place, to its state before the first step.

    Every optimizer here starts from zeros, in codes and scales too. Step counts are reset, so bias correction starts again.
    """
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            if not key.startswith(_CODE_BOOKS):
                value.zero_()
        elif isinstance(value, (int, float)):
            state[key] = type(value)(0)


@dataclass(frozen=True)
class Pruning:
    """Sets a share of the moments to zero when ReLoRA merges its factors (arXiv 2307.05695, section 3; its repository's names).

    kind: "magnitude" zeroes the smallest elements of each moment, "random" random ones.
    share: share of a tensor's elements that become zero, in (0, 1].
    """

    kind: str
    share: float

    def prune_(self, state: dict[str, Any], parameter: nn.Parameter, seed: int, key: str, world: World) -> None:
        """Sets elements of each of a parameter's moments to zero, in place; the step count stays.

        state: optimizer state of this process's part of the parameter. parameter: the model's; if it is sharded, every process
        calls this. seed, key: identify the random draw.
        """
        names = [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.dim()]
        if not isinstance(parameter, DTensor):
            for name in names:
                state[name].mul_(self._kept(state[name], seed, f"{key}/{name}"))
            return
        # An empty part has no state, but its process must take part in the collective gathering.
        for name in max(gather_objects(names, world), key=len):
            moment = state[name] if name in names else torch.zeros_like(parameter.to_local())
            kept = self._kept(whole_of(parameter, moment).full_tensor(), seed, f"{key}/{name}")
            moment.mul_(rows_of_part(kept, part_of(parameter)).view(moment.shape))

    def _kept(self, moment: torch.Tensor, seed: int, key: str) -> torch.Tensor:
        """Returns a boolean mask, of the moment's shape, of the elements that are kept."""
        if self.kind == "random":
            drawn = torch.rand(moment.shape, generator=generator_for(seed, key), device="cpu")
            return (drawn >= self.share).to(moment.device)
        sizes = moment.abs().float().flatten()
        count = int(self.share * sizes.numel())
        if count == 0:
            return torch.ones_like(moment, dtype=torch.bool)
        return (sizes > sizes.kthvalue(count).values).view(moment.shape)
