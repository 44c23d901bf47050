"""How the processes of a run share a model: each with all of it (DDP), or with a part of every parameter (FSDP2)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from peft_pretraining.distributed.world import World, all_reduce_sum_


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 gathers and reduces.

    compute_dtype: of gathered parameters and the arithmetic, None for the parameters' own. reduce_dtype: in which gradients
    are summed, None for that of the arithmetic. reshard_after_forward: gather a layer again for its backward pass.
    """

    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True


def shard(module: nn.Module, units: Iterable[nn.Module], device: torch.device, sharding: Sharding) -> None:
    """Divide every parameter of `module` over all processes, in place, rows by rows; each of `units` is gathered by itself.

    module: the one whose forward is called. It may be on the meta device: no process ever holds more than its part then.
    What belongs to none of the units stays gathered from the forward to the end of the backward pass.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=sharding.reduce_dtype)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=sharding.reshard_after_forward)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def settle_shards(module: nn.Module, device: torch.device) -> None:
    """Let FSDP2 take its final hold of the parameters' storage: it pads uneven parts in the first forward pass.

    What steps parameters by their local parts must see those that stay. Before activation checkpointing and compilation.
    """
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.no_grad():
        module(tokens, tokens)
    free_gathered(module)


def free_gathered(module: nn.Module) -> None:
    """Leave of every parameter that FSDP2 shards this process's part alone: a forward pass in evaluation may leave it gathered,
    and what is written to it then is lost. Every process calls it; elsewhere nothing happens."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def assign_(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """parameter <- values of its whole shape, on any device; of a sharded parameter, the part that lies here."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(values)
        return
    mesh = parameter.device_mesh
    parts = torch.chunk(values, mesh.size(), dim=0)
    if mesh.get_local_rank() < len(parts):
        parameter.to_local().copy_(parts[mesh.get_local_rank()])


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied: a forward pass is then one of all processes together."""
    return isinstance(module, FSDPModule)


def replicate(module: nn.Module, world: World, device: torch.device, reduce_dtype: torch.dtype | None = None) -> nn.Module:
    """Wrap a module in DistributedDataParallel where there is more than one process (gradients are averaged).

    module: maps (input_ids, labels), both (B, T) int64, to a loss. reduce_dtype: in which gradients are summed, None for
    their own.
    """
    if world.size == 1:
        return module
    device_ids = [device.index] if device.type == "cuda" else None
    # Supports and rotary tables never change: broadcasting buffers at every forward would only cost time. The argument
    # has another name from torch 2.13 on.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True, **options)
    if reduce_dtype is not None:
        wrapped.register_comm_hook((world, reduce_dtype), _average_in_dtype)
    if world.size > 2:
        _settle_buckets(wrapped, device)
    return wrapped


def _average_in_dtype(state: tuple[World, torch.dtype], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's average of a bucket, summed in another dtype than the gradients'."""
    world, dtype = state
    gradients = bucket.buffer()
    # Divided first: a sum of many bfloat16 gradients could not overflow, but would lose what the division brings back.
    wide = gradients.to(dtype, copy=True).div_(world.size)

    def back(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        return gradients.copy_(future.value()[0])

    averaged: torch.futures.Future[torch.Tensor] = dist.all_reduce(wide, async_op=True).get_future().then(back)
    return averaged


def _settle_buckets(module: DistributedDataParallel, device: torch.device) -> None:
    """Run a backward pass whose gradients are zero, so that DDP divides them into buckets for good before the first update.

    It does so after its first backward pass, in the order in which gradients came. A run that goes on would otherwise make its
    first update with other buckets than the run before: in three or more processes other sums, and other bits.
    """
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    (module(tokens, tokens) * 0).backward()


def average_(gradient: torch.Tensor, world: World, reduce_dtype: torch.dtype | None = None) -> None:
    """The mean of a gradient over all processes, in place."""
    if reduce_dtype is None or reduce_dtype == gradient.dtype:
        all_reduce_sum_(gradient, world).div_(world.size)
    else:
        gradient.copy_(all_reduce_sum_(gradient.to(reduce_dtype), world).div_(world.size))


def gradient_sync(module: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """Context of one micro-batch: processes exchange gradients only where `enabled`, i.e. on the update's last micro-batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
    elif isinstance(module, DistributedDataParallel) and not enabled:
        return module.no_sync()
    return contextlib.nullcontext()


# --- Sharded tensors as optimizers see them: each process's own part, a plain tensor ---
#
# The libraries' 8-bit kernels do not know DTensors. For every optimizer that works element by element, or by blocks that no
# shard's boundary cuts, stepping the parts is bit-identical to stepping the whole.


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
