"""--init svd: factors and sparse values from the singular value decomposition of a dense initialisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from peft_pretraining.distributed.parallel import assign_
from peft_pretraining.distributed.world import World, broadcast_
from sparse_lora import SparseLowRankLinear, generator_for
from sparse_lora.decomposition import best_low_rank


@torch.no_grad()
def start_from_svd(model: nn.Module, std: float, seed: int, world: World) -> None:
    """Set A, B and sparse values of every low-rank (plus sparse) layer, in place; the supports are drawn, every process calls it.

    The dense weight W is N(0, std^2), drawn as full-rank training with this seed draws it. scaling B A is its best rank-r part,
    by balanced factors, and S is what that leaves of W at the support. On the CPU; process 0's result for all, since signs of
    singular vectors are arbitrary.
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseLowRankLinear):
            for parameter_name, values in _values(module, name, std, seed, world):
                assign_(module.get_parameter(parameter_name), broadcast_(values, world))


def _values(layer: SparseLowRankLinear, name: str, std: float, seed: int, world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """(parameter name, float32 CPU tensor) of a layer; undefined on other processes than the first."""
    if not world.is_main:
        for parameter_name in ("lora_B", "lora_A", *(["sparse_value"] if layer.support is not None else [])):
            yield parameter_name, torch.empty(layer.get_parameter(parameter_name).shape)
        return
    dense = torch.empty(layer.out_features, layer.in_features)
    dense.normal_(0.0, std, generator=generator_for(seed, f"{name}.weight"))
    left, right = best_low_rank(dense, layer.rank)
    share = layer.initial_scaling() ** -0.5
    yield "lora_B", (share * left).contiguous()
    yield "lora_A", (share * right).contiguous()
    if layer.support is not None:
        rest = dense.addmm_(left, right, alpha=-1)
        yield "sparse_value", rest.flatten()[layer.support.flat_indices().cpu()]
