"""Parameters sharded by FSDP2 as optimizers see them: each process's own part, a plain tensor.

The libraries' 8-bit kernels do not know DTensors. For every optimizer that works element by element, or by blocks that no shard's
boundary cuts, stepping the parts gives the bits of stepping the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from peft_pretraining.distributed.world import World, all_reduce_sum_


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


class Part(NamedTuple):
    """Part `rank` of the `size` parts of a tensor: FSDP2 divides rows as torch.chunk does, so that late parts may be empty."""

    rank: int
    size: int


def part_of(parameter: DTensor) -> Part:
    """The part of a sharded parameter that lies here."""
    return Part(parameter.device_mesh.get_local_rank(), parameter.device_mesh.size())


def rows_of_part(whole: torch.Tensor, part: Part) -> torch.Tensor:
    """A view of the rows that make up a part."""
    parts = torch.chunk(whole, part.size, dim=0)
    return parts[part.rank] if part.rank < len(parts) else whole[:0]


def whole_of(parameter: DTensor, part: torch.Tensor) -> DTensor:
    """The tensor of a sharded parameter's shape, divided like it, of which `part` lies here; shares its storage."""
    return DTensor.from_local(
        part.view(parameter.to_local().shape),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def on_cpu(divided: DTensor, part: torch.Tensor) -> DTensor:
    """A tensor divided like `divided` in memory of the CPU, of which `part` lies here."""
    mesh = divided.device_mesh if divided.device_mesh.device_type == "cpu" else _cpu_mesh(divided.device_mesh.size())
    return DTensor.from_local(part, mesh, divided.placements, run_check=False, shape=divided.shape, stride=divided.stride())


@lru_cache
def _cpu_mesh(size: int) -> DeviceMesh:
    """All processes, for tensors in memory of the CPU; made once, by all of them together."""
    return init_device_mesh("cpu", (size,))
