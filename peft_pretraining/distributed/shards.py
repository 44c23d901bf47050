"""Converts between sharded parameters (DTensors) and this process's local parts, which optimizers step as plain tensors.

The libraries' 8-bit kernels do not support DTensors. Stepping the local parts is bit-identical to stepping the whole parameter
for every optimizer that works elementwise, or in blocks that no part's boundary cuts.
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
    """Returns this process's part of a sharded tensor, sharing its storage; returns any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Replaces each sharded parameter by a parameter over its local part, sharing storage; keeps other parameters."""
    return {
        name: nn.Parameter(local(parameter.detach())) if isinstance(parameter, DTensor) else parameter
        for name, parameter in parameters.items()
    }


def gradient_norms(gradients: list[torch.Tensor], world: World) -> torch.Tensor:
    """Returns the L2 norm of each gradient, shape (len(gradients),) float32, the same on every process.

    gradients: all sharded or all not. Squares are summed in float32, because a bfloat16 sum keeps only about three digits.
    """
    norms = torch.stack([torch.linalg.vector_norm(local(gradient), dtype=torch.float32) for gradient in gradients])
    if world.size > 1 and isinstance(gradients[0], DTensor):
        return all_reduce_sum_(norms.square_(), world).sqrt_()
    return norms


class Part(NamedTuple):
    """Part number `rank` of the `size` parts of a tensor. FSDP2 divides rows as torch.chunk does, so the last may be empty."""

    rank: int
    size: int


def part_of(parameter: DTensor) -> Part:
    """Returns which part of a sharded parameter this process holds."""
    return Part(parameter.device_mesh.get_local_rank(), parameter.device_mesh.size())


def rows_of_part(whole: torch.Tensor, part: Part) -> torch.Tensor:
    """Returns a view of the rows that make up a part."""
    parts = torch.chunk(whole, part.size, dim=0)
    return parts[part.rank] if part.rank < len(parts) else whole[:0]


def whole_of(parameter: DTensor, part: torch.Tensor) -> DTensor:
    """Returns a DTensor sharded like `parameter`, of which this process holds `part`; shares storage with `part`."""
    return DTensor.from_local(
        part.view(parameter.to_local().shape),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def on_cpu(divided: DTensor, part: torch.Tensor) -> DTensor:
    """Returns a DTensor in host memory, sharded like `divided`, of which this process holds `part`."""
    mesh = divided.device_mesh if divided.device_mesh.device_type == "cpu" else _cpu_mesh(divided.device_mesh.size())
    return DTensor.from_local(part, mesh, divided.placements, run_check=False, shape=divided.shape, stride=divided.stride())


@lru_cache
def _cpu_mesh(size: int) -> DeviceMesh:
    """Returns the device mesh of all processes for host memory; created once, collectively."""
    return init_device_mesh("cpu", (size,))
