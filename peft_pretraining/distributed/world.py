"""The processes of a run: who they are, how they meet, what they sum. The only reader of torchrun's rank variables.

torch is imported inside the functions: `World.from_environment` answers before anything heavy is loaded.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


# What torch's collectives say when the other end of a connection is gone or silent.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Timed out waiting",
    "connectFullMesh failed",
    "Read error",
)


class LostProcess(RuntimeError):
    """Another process of the run has ended while this one needed it."""


@dataclass(frozen=True)
class World:
    """This process's place among all: `rank` of `size`, `local_rank` of `local_size` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one process that prints, records and writes."""
        return self.rank == 0

    @staticmethod
    def from_environment() -> World:
        """The world that torchrun describes, or one process where it did not start us."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return World()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local_rank, local_size = (
            int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)
        )
        return World(rank, size, local_rank, local_size)


@contextlib.contextmanager
def process_group(world: World, device: torch.device, timeout_s: float) -> Iterator[None]:
    """Join the other processes for the duration of the block; nothing to do for a single one."""
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size == 1:
        yield
        return
    # Both backends under one group: NCCL moves gradients, gloo the small objects of checkpoints and data states.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, timeout=timeout, **_meeting_place(world, timeout))
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in _LOST):
            raise LostProcess(
                f"another process of this run has ended, its own message says why ({str(error).splitlines()[0][:200]})"
            ) from None
        raise
    # Only when all went well: after a failure the others may still wait in a collective, and closing would wait for them.
    dist.destroy_process_group()


def _meeting_place(world: World, timeout: datetime.timedelta) -> dict[str, Any]:
    """Where the processes find each other's addresses, as arguments of init_process_group.

    torchrun keeps one store for all of its restarts (torch 2.13), in which a quick process finds the address of a slow one's
    predecessor: "connection refused", in every restart. On one machine the number of the restart keeps them apart. Machines
    count their own restarts: there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (scripts/setup.sh) makes torchrun open a new store.
    """
    import torch.distributed as dist

    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or world.local_size < world.size:
        return {}
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return {"store": dist.PrefixStore(f"restart_{restart}", store), "rank": rank, "world_size": size}


def all_reduce_sum_(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Sum a tensor over all processes, in place; returns it."""
    if world.size > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def broadcast_(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Rank 0's contiguous tensor on every process, in place; returns it."""
    if world.size > 1:
        import torch.distributed as dist

        dist.broadcast(tensor, src=0)
    return tensor


def totals(values: Sequence[int], world: World) -> list[int]:
    """Each value summed over all processes, on every process; on the host, so that no GPU is waited for."""
    if world.size == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    box = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(box, op=dist.ReduceOp.SUM)
    return [int(total) for total in box]


def largest(value: int, world: World) -> int:
    """The largest of all processes' values, on every process; on the host, so that no GPU is waited for."""
    if world.size == 1:
        return value
    import torch
    import torch.distributed as dist

    box = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def gather_objects(value: Any, world: World, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every process's `value` (small, picklable), in rank order, on every process; over the default group if none is given."""
    if world.size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


def own_group(world: World, timeout_s: float) -> dist.ProcessGroup | None:
    """A group of all processes for one thread's use (gloo: objects and CPU tensors); every process calls it."""
    if world.size == 1:
        return None
    import torch.distributed as dist

    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    return group


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's `value` on every process."""
    if world.size == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
