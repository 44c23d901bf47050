"""Restarts: changes of factors and moments between two updates, such as ReLoRA's merges and resets of all moments.

The method defines what a restart does and its interval (methods.method.Restart); it takes place after every multiple of that
many finished updates. Random numbers are keyed by (seed, name, number of the restart), so restarts need no saved state. A
checkpoint taken at a restart boundary is from before the restart; the resumed run performs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_pretraining.config.arguments import Arguments, reset_interval
from peft_pretraining.distributed.parallel import assign_, free_gathered, local
from peft_pretraining.distributed.world import World, broadcast_
from peft_pretraining.methods import METHODS
from peft_pretraining.methods.method import Restart
from peft_pretraining.model.llama import balanced
from peft_pretraining.optim.slices import SLICE_ELEMENTS, StochasticRounding, round_stochastically_
from peft_pretraining.optim.state import Pruning, reset_descriptions_, reset_moments_
from peft_pretraining.optim.updates import Updates
from sparse_lora import ReLoRALinear, SparseLowRankLinear
from sparse_lora.support import plain

Layer = TypeVar("Layer", bound=nn.Module)


class Restarts:
    """Schedules and performs a run's restarts; all processes call `before_update` before each update."""

    def __init__(self, args: Arguments, model: nn.Module, updates: Updates, world: World):
        """model: with its method's layers. updates: of its parameters, which are all on one device."""
        # None for a run without restarts of its method.
        self._restart = METHODS[args.peft_model].restart(args)
        self._reset_every = reset_interval(args)
        self._args, self._model, self._updates, self._world = args, model, updates, world
        self._rounding = StochasticRounding(args.seed) if args.stochastic_rounding else None

    @property
    def any(self) -> bool:
        """Whether anything is ever done between updates of this run."""
        return self._restart is not None or self._reset_every is not None

    @torch.no_grad()
    def before_update(self, update_step: int) -> bool:
        """Performs what is due after `update_step` finished updates, if anything; returns True if it did."""
        resets = bool(self._reset_every and update_step and update_step % self._reset_every == 0)
        if resets:
            for name in self._updates.stepped:
                reset_moments_(self._state_of(name))
        restart = self._restart
        if restart is None or update_step == 0 or update_step % restart.every:
            return resets
        free_gathered(self._model)
        number = update_step // restart.every
        if restart.merge:
            self._merge(restart, number)
            return True
        if restart.rebalance:
            self._rebalance()
        names = self._factors() if restart.act is None else restart.act(self._model, number, self._world)
        for name in names:
            balanced_now = restart.rebalance and name.endswith(("lora_A", "lora_B"))
            self._reset(name, replaced=balanced_now or restart.act is not None)
        return True

    def _factors(self) -> list[str]:
        """Returns the names of the parameters of the factored linears, whose moments are reset.

        The moments of embedding, head and norms are kept: with second moments near zero, rows of rare tokens would take steps of
        full size, which raises the loss (docs/results.md).
        """
        return [
            f"{name}.{own}"
            for name, layer in self._layers(SparseLowRankLinear)
            for own, _ in layer.named_parameters(recurse=False)
        ]

    def _merge(self, restart: Restart, number: int) -> None:
        """Adds scaling B A to W0, draws a new A, sets B = 0, and resets or prunes the factors' moments (arXiv 2307.05695)."""
        parameters = dict(self._model.named_parameters())
        for name, layer in self._layers(ReLoRALinear):
            noise = None
            if self._rounding is not None and layer.weight.dtype == torch.bfloat16:
                noise = self._rounding.generator(f"{name}.weight/merge", number, local(layer.weight).device)
            add_product_(layer, noise)
            if not isinstance(layer.weight, DTensor):
                # Frozen weights are never synchronised later, and two machines may round a product differently.
                broadcast_(layer.weight, self._world)
            for factor, values in layer.initial_values(self._args.seed, name, restart=number):
                assign_(layer.get_parameter(factor), values)
                qualified = f"{name}.{factor}"
                if restart.moments == "zero":
                    self._reset(qualified, replaced=True)
                    continue
                self._forget_old_values(qualified)
                if restart.moments != "keep":
                    key = f"{qualified}/pruning/{number}"
                    state, parameter = self._state_of(qualified), parameters[qualified]
                    Pruning(restart.moments, restart.share).prune_(state, parameter, self._args.seed, key, self._world)

    def _rebalance(self) -> None:
        """Replaces the factors of every layer by balanced factors of the same product.

        Process 0 computes and broadcasts them, since the signs of singular vectors are arbitrary.
        """
        for _, layer in self._layers(SparseLowRankLinear):
            # As plain tensors, which is what processes can send each other.
            lora_B, lora_A = (plain(_whole(factor)) for factor in (layer.lora_B, layer.lora_A))
            factors = balanced(lora_B, lora_A) if self._world.is_main else (lora_B.float(), lora_A.float())
            for factor, values in zip((layer.lora_B, layer.lora_A), factors, strict=True):
                assign_(factor, broadcast_(values.contiguous(), self._world).to(factor.dtype))

    def _layers(self, kind: type[Layer]) -> Iterator[tuple[str, Layer]]:
        for name, module in self._model.named_modules():
            if isinstance(module, kind):
                yield name, module

    def _state_of(self, name: str) -> dict[str, torch.Tensor]:
        """Returns the optimizer's state of a parameter; empty before its first step."""
        state: dict[str, torch.Tensor] = self._updates.optimizer.state.get(self._updates.stepped[name], {})
        return state

    def _reset(self, name: str, replaced: bool) -> None:
        """Sets a parameter's moments to zero. replaced: whether the parameter has new values."""
        reset_moments_(self._state_of(name))
        if replaced:
            self._forget_old_values(name)

    def _forget_old_values(self, name: str) -> None:
        """Resets what is no moment, but describes the values that a parameter had before, or their gradients."""
        reset_descriptions_(self._state_of(name))
        if self._updates.growth is not None:
            # A replaced factor has gradients of another magnitude, so the next gradient is not limited.
            self._updates.growth.previous[list(self._updates.stepped).index(name)] = 0


@torch.no_grad()
def add_product_(layer: ReLoRALinear, noise: torch.Generator | None = None) -> None:
    """Adds scaling B A to W0, in float32 with one rounding; in a sharded layer, to this process's rows.

    noise: generator for stochastic rounding of a bfloat16 weight; None rounds to nearest.
    """
    weight, lora_B, lora_A = local(layer.weight), local(layer.lora_B), _whole(layer.lora_A)
    scaling = layer.effective_scaling()
    scale = float(_whole(scaling)) if isinstance(scaling, torch.Tensor) else scaling
    # By slices of rows, because the whole product would take the weight's size in float32.
    rows = max(1, SLICE_ELEMENTS // weight.shape[1])
    for part, factor in zip(weight.split(rows), lora_B.split(rows), strict=True):
        merged = part.float().addmm(factor.float(), lora_A.float(), alpha=scale)
        if noise is None:
            part.copy_(merged)
        else:
            round_stochastically_(part, merged, noise)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a tensor if it is sharded, else returns it; every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
