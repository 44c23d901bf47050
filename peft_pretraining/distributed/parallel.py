"""Distributes a model over processes: replicated on each (DDP) or with every parameter sharded over all (FSDP2)."""

import contextlib
import inspect
import warnings
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
    """Settings of FSDP2.

    compute_dtype: dtype of gathered parameters and of the arithmetic, None for the parameters' dtype.
    reduce_dtype: dtype in which gradients are summed, None for compute_dtype.
    reshard_after_forward: free a layer's gathered parameters after its forward pass and gather them again for the backward pass.
    """

    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True


def shard(module: nn.Module, units: Iterable[nn.Module], device: torch.device, sharding: Sharding) -> None:
    """Shards every parameter of `module` by rows over all processes, in place; each of `units` is gathered separately.

    module: the module whose forward is called. On the meta device no process ever holds more than its part.
    Parameters outside all units stay gathered from the forward pass to the end of the backward pass.
    """
    # A compiled layer returns a view, which is safe here: neither the layers nor the loss change their input in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=sharding.reduce_dtype)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=sharding.reshard_after_forward)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def settle_shards(module: nn.Module, device: torch.device) -> None:
    """Runs one forward pass, in which FSDP2 pads uneven parts and thereby replaces the parameters' storage.

    Call it before optimizers take the local parts, and before activation checkpointing and compilation.
    """
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.no_grad():
        module(tokens, tokens)
    free_gathered(module)


def free_gathered(module: nn.Module) -> None:
    """Frees gathered FSDP2 parameters, so that each process holds only its parts; does nothing without FSDP2.

    A forward pass in evaluation may leave parameters gathered, and values written to them would be lost. Every process calls it.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def assign_(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Copies `values`, of the parameter's whole shape and on any device, into it; into this process's part if it is sharded."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(values)
        return
    mesh = parameter.device_mesh
    parts = torch.chunk(values, mesh.size(), dim=0)
    if mesh.get_local_rank() < len(parts):
        parameter.to_local().copy_(parts[mesh.get_local_rank()])


def is_sharded(module: nn.Module) -> bool:
    """Tells whether `shard` was applied; a forward pass is then a collective operation of all processes."""
    return isinstance(module, FSDPModule)


def replicate(module: nn.Module, world: World, device: torch.device, reduce_dtype: torch.dtype | None = None) -> nn.Module:
    """Wraps a module in DistributedDataParallel, which averages gradients; returns it unchanged for a single process.

    module: maps (input_ids, labels), both (B, T) int64, to a loss.
    reduce_dtype: dtype in which gradients are summed, None for the gradients' dtype.
    """
    if world.size == 1:
        return module
    device_ids = [device.index] if device.type == "cuda" else None
    # Buffers (supports, rotary tables) never change, so broadcasting them is switched off. torch 2.13 renamed the argument.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    # Every process draws or reads the same parameters; DDP's broadcast knows plain ones only.
    options["init_sync"] = not any(hasattr(parameter, "stored_parts") for parameter in module.parameters())
    wrapped = DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True, **options)
    if reduce_dtype is not None:
        wrapped.register_comm_hook((world, reduce_dtype), _average_in_dtype)
    if world.size > 2:
        _settle_buckets(wrapped, device)
    return wrapped


def _average_in_dtype(state: tuple[World, torch.dtype], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A DDP hook that averages a bucket of gradients in another dtype than the gradients'."""
    world, dtype = state
    gradients = bucket.buffer()
    # Divide before summing, as DDP itself does.
    converted = gradients.to(dtype, copy=True).div_(world.size)

    def copy_back(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        return gradients.copy_(future.value()[0])

    averaged: torch.futures.Future[torch.Tensor] = dist.all_reduce(converted, async_op=True).get_future().then(copy_back)
    return averaged


def _settle_buckets(module: DistributedDataParallel, device: torch.device) -> None:
    """Runs a backward pass with zero gradients, after which DDP fixes its buckets.

    DDP rebuilds its buckets after the first backward pass, in the order in which gradients arrived. Without this call a resumed
    run's first update would use other buckets, and with three or more processes its sums would not be bit-identical.
    """
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    (module(tokens, tokens) * 0).backward()


def average_(gradient: torch.Tensor, world: World, reduce_dtype: torch.dtype | None = None) -> None:
    """Averages a gradient over all processes, in place, summing in reduce_dtype (None for the gradient's dtype)."""
    if reduce_dtype is None or reduce_dtype == gradient.dtype:
        all_reduce_sum_(gradient, world).div_(world.size)
    else:
        gradient.copy_(all_reduce_sum_(gradient.to(reduce_dtype), world).div_(world.size))


def gradient_sync(module: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """Returns the context of one micro-batch; processes exchange gradients only if `enabled`, on an update's last micro-batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
    elif isinstance(module, DistributedDataParallel) and not enabled:
        return module.no_sync()
    return contextlib.nullcontext()


# --- Sharded parameters (DTensors) and this process's local parts, which optimizers step as plain tensors ---
#
# The libraries' 8-bit kernels do not support DTensors. Stepping the local parts is bit-identical to stepping the whole parameter
# for every optimizer that works elementwise, or in blocks that no part's boundary cuts.


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this process's part of a sharded tensor, sharing its storage; returns any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def stored_parts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the tensors that hold a tensor, by name: itself, or a parameter's int8 codes and scales (model.int8)."""
    parts: dict[str, torch.Tensor] = getattr(tensor, "stored_parts", {"": tensor})
    return {f"{name}{end}": part for end, part in parts.items()}


def local_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Replaces each sharded parameter by a parameter over its local part, sharing storage; keeps other parameters."""
    return {
        name: nn.Parameter(local(parameter.detach())) if isinstance(parameter, DTensor) else parameter
        for name, parameter in parameters.items()
    }


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
