"""The processes of a run: their ranks, their process group and small collectives.

This is the only module that reads torchrun's rank variables. torch is imported inside the functions, so that
`World.from_environment` works without loading it.
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


# Parts of the error messages of torch's collectives when a peer has ended or does not answer.
_LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Timed out waiting",
    "connectFullMesh failed",
    "Read error",
)


class LostProcess(RuntimeError):
    """Raised when another process of the run ends while this one waits for it."""


@dataclass(frozen=True)
class World:
    """This process's position among all processes: `rank` of `size`, and `local_rank` of `local_size` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on rank 0, the process that prints, logs and writes files."""
        return self.rank == 0

    @staticmethod
    def from_environment() -> World:
        """Returns the world described by torchrun's environment variables, or a single process without torchrun."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return World()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local_rank, local_size = (
            int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)
        )
        return World(rank, size, local_rank, local_size)


@contextlib.contextmanager
def process_group(world: World, device: torch.device, timeout_s: float) -> Iterator[None]:
    """Joins the process group for the duration of the block; does nothing for a single process. Raises LostProcess."""
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size == 1:
        yield
        return
    # One group with two backends: NCCL for gradients, gloo for small objects of checkpoints and data states.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, timeout=timeout, **_meeting_place(world, timeout))
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in _LOST_PEER_SIGNS):
            raise LostProcess(
                f"another process of this run has ended; see its error message ({str(error).splitlines()[0][:200]})"
            ) from None
        raise
    # Not after a failure: other processes may still wait in a collective, and destroying the group would wait for them.
    dist.destroy_process_group()


def _meeting_place(world: World, timeout: datetime.timedelta) -> dict[str, Any]:
    """Returns the store in which processes exchange addresses, as arguments of init_process_group.

    torchrun (torch 2.13) keeps one store for all restarts, in which a fast process may read the address of a process of the
    previous start ("connection refused"). On a single machine a prefix with the restart's number separates the starts. Several
    machines count restarts separately; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (scripts/setup.sh) makes torchrun open a new
    store.
    """
    import torch.distributed as dist

    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or world.local_size < world.size:
        return {}
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return {"store": dist.PrefixStore(f"restart_{restart}", store), "rank": rank, "world_size": size}


def all_reduce_sum_(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Sums a tensor over all processes, in place; returns it."""
    if world.size > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def broadcast_(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Copies rank 0's contiguous tensor to every process, in place; returns it."""
    if world.size > 1:
        import torch.distributed as dist

        dist.broadcast(tensor, src=0)
    return tensor


def totals(values: Sequence[int], world: World) -> list[int]:
    """Returns the sums of values over all processes, on every process; computed on the host, without waiting for a GPU."""
    if world.size == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    box = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(box, op=dist.ReduceOp.SUM)
    return [int(total) for total in box]


def largest(value: int, world: World) -> int:
    """Returns the maximum over all processes, on every process; computed on the host, without waiting for a GPU."""
    if world.size == 1:
        return value
    import torch
    import torch.distributed as dist

    box = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def gather_objects(value: Any, world: World, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns every process's `value` (small, picklable) in rank order, on every process. group: None for the default one."""
    if world.size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


def own_group(world: World, timeout_s: float) -> dist.ProcessGroup | None:
    """Creates a gloo group of all processes (objects and CPU tensors) for use by one thread; every process calls it."""
    if world.size == 1:
        return None
    import torch.distributed as dist

    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    return group


def broadcast_object(value: Any, world: World) -> Any:
    """Returns rank 0's `value` on every process."""
    if world.size == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
