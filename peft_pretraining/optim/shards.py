"""Parameters sharded by FSDP2 as optimizers see them: each process's own part, a plain tensor.

The libraries' 8-bit kernels do not know DTensors. For every optimizer that works element by element, or by blocks that no shard's
boundary cuts, stepping the parts gives the bits of stepping the whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_pretraining.distributed import World, all_reduce_sum_


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, sharing its storage; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """A parameter on the local part of each sharded one, sharing its storage; others themselves."""
    return {
        name: nn.Parameter(local(parameter.detach())) if isinstance(parameter, DTensor) else parameter
        for name, parameter in parameters.items()
    }


def gradient_norms(gradients: list[torch.Tensor], world: World) -> torch.Tensor:
    """L2 norm of each tensor's gradient, all of them sharded or none: (tensors,) float32, the same on every process.

    Summed in float32: a bfloat16 sum of squares would keep three digits.
    """
    norms = torch.stack([torch.linalg.vector_norm(local(gradient), dtype=torch.float32) for gradient in gradients])
    if world.size > 1 and isinstance(gradients[0], DTensor):
        return all_reduce_sum_(norms.square_(), world).sqrt_()
    return norms
