"""Moments that no longer belong to a parameter: made as if it had never been stepped, or pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_pretraining.distributed.parallel import part_of, rows_of_part, whole_of
from peft_pretraining.distributed.world import World, gather_objects
from sparse_lora import generator_for

# Code books of quantised moments: constants, which all parameters share.
_CODE_BOOKS = "qmap"


def reset_moments_(state: dict[str, Any]) -> None:
    """A parameter's optimizer state as it was before its first step, in place: step counts too, so that bias corrections begin
    anew. Holds for every optimizer here: zeros are what each of them starts from, in codes and scales as well."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            if not key.startswith(_CODE_BOOKS):
                value.zero_()
        elif isinstance(value, (int, float)):
            state[key] = type(value)(0)


@dataclass(frozen=True)
class Pruning:
    """Which moments ReLoRA sets to zero at a merge (arXiv 2307.05695, section 3; its repository's names).

    kind: "magnitude", the smallest of each moment, or "random". share: of a tensor's elements, in (0, 1].
    """

    kind: str
    share: float

    def prune_(self, state: dict[str, Any], parameter: nn.Parameter, seed: int, key: str, world: World) -> None:
        """Set elements of each of a parameter's moments to zero, in place; its step count stays.

        parameter: the model's, sharded or not, in which case every process calls this; `state` is that of the part that lies
        here. seed, key: of what is drawn.
        """
        names = [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.dim()]
        if not isinstance(parameter, DTensor):
            for name in names:
                state[name].mul_(self._kept(state[name], seed, f"{key}/{name}"))
            return
        # An empty part has no state, but its process takes part in gathering the others.
        for name in max(gather_objects(names, world), key=len):
            moment = state[name] if name in names else torch.zeros_like(parameter.to_local())
            kept = self._kept(whole_of(parameter, moment).full_tensor(), seed, f"{key}/{name}")
            moment.mul_(rows_of_part(kept, part_of(parameter)).view(moment.shape))

    def _kept(self, moment: torch.Tensor, seed: int, key: str) -> torch.Tensor:
        """Which elements stay, of the moment's shape."""
        if self.kind == "random":
            drawn = torch.rand(moment.shape, generator=generator_for(seed, key), device="cpu")
            return (drawn >= self.share).to(moment.device)
        sizes = moment.abs().float().flatten()
        count = int(self.share * sizes.numel())
        if count == 0:
            return torch.ones_like(moment, dtype=torch.bool)
        return (sizes > sizes.kthvalue(count).values).view(moment.shape)
