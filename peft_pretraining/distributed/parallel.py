"""Distributes a model over processes: replicated on each (DDP) or with every parameter sharded over all (FSDP2)."""

import contextlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
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
