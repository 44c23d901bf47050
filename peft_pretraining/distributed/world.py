"""The processes of a run: their ranks, their process group, small collectives, stop signals and output.

This is the only module that reads torchrun's rank variables. torch is imported inside the functions, so that
`World.from_environment` works without loading it.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

from peft_pretraining.config.arguments import ConfigError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

# Set by launch.py, which ends without torchrun's traceback after a signal.
LAUNCHED = "SLTRAIN_LAUNCHED"
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")
_STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
# Parts of the error messages of torch's collectives when a peer has ended or does not answer.
_LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "closed by remote peer",
    "Broken pipe",
    "ncclRemoteError",
    "remote process exited",
    "communicator was aborted",
    "Watchdog caught collective operation timeout",
    "Timed out waiting",
    "Read error",
)
# Parts of NCCL's other error messages, and the way out.
_NCCL_ADVICE = {
    "shared memory segment": "/dev/shm is too small; start the container with --shm-size 1g or --ipc host",
    "no socket interface": "set NCCL_SOCKET_IFNAME to one of the network interfaces that `ip -brief address` lists",
    "Duplicate GPU": "every process needs a GPU of its own; start at most as many processes as this machine has GPUs",
    "out of memory": "NCCL's buffers do not fit into the GPU; use a lower --batch_size, or end other programs that use the GPU",
    "doesn't have NCCL built in": "install a build of torch for CUDA, or use --device cpu",
}


class GroupError(RuntimeError):
    """Raised when the processes of a run cannot exchange data."""


class LostProcess(GroupError):
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
        """Returns the world described by torchrun's environment variables, or a single process without torchrun.

        An empty variable counts as not set, and is removed, because libraries read it as a number. Raises ConfigError for values
        that contradict one another.
        """
        for name in (*_RANKS, *_MEETING_PLACE):
            if not os.environ.get(name, "").strip():
                os.environ.pop(name, None)
        given = {name: os.environ[name].strip() for name in (*_RANKS, *_MEETING_PLACE) if name in os.environ}
        if (problem := _world_problem(given)) is not None:
            way_out = f"start several processes with torchrun, which sets them, or a single one after: unset {' '.join(given)}"
            raise ConfigError([f"{problem}; {way_out}"])
        rank, size, local_rank, local_size = (int(given.get(name, default)) for name, default in zip(_RANKS, "0101", strict=True))
        return World(rank, size, local_rank, local_size)

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Prints a line above the progress bar, on rank 0 only. file: sys.stderr by default."""
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(text, file=file or sys.stderr)


def _world_problem(given: Mapping[str, str]) -> str | None:
    """Returns what is wrong with the rank variables, or None. given: those that are set and not empty."""
    for name in (*_RANKS, "MASTER_PORT"):
        if name in given and not (given[name].isascii() and given[name].isdigit()):
            return f"{name}={given[name]} in the environment: must be a whole number, 0 or more"
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if int(given.get(rank, 0)) >= int(given.get(size, 1)) or (rank not in given and int(given.get(size, 1)) > 1):
            return f"{_shown(rank, given)} and {_shown(size, given)} in the environment: the rank must be set and below the size"
    if int(given.get("LOCAL_WORLD_SIZE", 1)) > int(given.get("WORLD_SIZE", 1)):
        return f"{_shown('LOCAL_WORLD_SIZE', given)} in the environment is more than {_shown('WORLD_SIZE', given)}"
    if int(given.get("WORLD_SIZE", 1)) == 1:
        return None
    if ("LOCAL_RANK" in given) != ("LOCAL_WORLD_SIZE" in given):
        return f"{_shown('LOCAL_RANK', given)} and {_shown('LOCAL_WORLD_SIZE', given)} in the environment: set both or neither"
    if missing := [name for name in _MEETING_PLACE if name not in given]:
        processes = f"WORLD_SIZE={given['WORLD_SIZE']} in the environment: the processes have no meeting place"
        return f"{processes}, {' and '.join(missing)} not set"
    if not 0 < int(given["MASTER_PORT"]) < 2**16:
        return f"MASTER_PORT={given['MASTER_PORT']} in the environment: must be a port, 1 to 65535"
    return None


def _shown(name: str, given: Mapping[str, str]) -> str:
    return f"{name}={given[name]}" if name in given else f"{name} (not set)"


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that ask a run to save and stop.

    SIGHUP is left out where it is ignored (nohup), because a closed terminal must not end that run. Others count even if ignored:
    a script's shell ignores SIGINT and SIGQUIT for what it starts with `&`, and `kill -INT` is to save there too.
    """
    numbers = [signal.Signals(getattr(signal, name)) for name in _STOP_SIGNALS if hasattr(signal, name)]
    return [number for number in numbers if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN]


class _LastingStream:
    """A text stream on which writing to a closed terminal or pipe, or a full disk, has no effect instead of raising OSError."""

    def __init__(self, stream: TextIO | None):
        """stream: None if the process was started without it, which leaves its descriptor to the next file that is opened."""
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 # open as long as the process

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, operation: Callable[..., object], *arguments: str) -> None:
        try:
            operation(*arguments)
        except OSError as error:
            # Libraries, and the interpreter at its end, write to the descriptor itself.
            if error.errno in (errno.EIO, errno.EPIPE):
                with open(os.devnull, "w", encoding="utf-8") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Lets the block go on when its terminal is closed or the program that reads its output ends (`| tee`)."""
    streams = [cast(TextIO, _LastingStream(stream)) for stream in (sys.stdout, sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield


@contextlib.contextmanager
def process_group(world: World, device: torch.device, timeout_s: float) -> Iterator[None]:
    """Joins the process group for the duration of the block; does nothing for a single process. Raises GroupError."""
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
        if (explained := _explained(error, world)) is not None:
            raise explained from None
        raise
    # Not after a failure: other processes may still wait in a collective, and destroying the group would wait for them.
    dist.destroy_process_group()


def _explained(error: RuntimeError, world: World) -> GroupError | None:
    """Returns the message for an error of torch's process group; None for other errors."""
    import torch.distributed as dist

    text = str(error)
    reason = text.splitlines()[0][:200] if text else type(error).__name__
    if "connectFullMesh failed" in text:
        return LostProcess(
            f"the processes cannot reach each other ({reason}): one has ended (see its error message), or gloo uses the wrong "
            "network interface (set GLOO_SOCKET_IFNAME to one that `ip -brief address` lists on every machine)"
        )
    if any(sign in text for sign in _LOST_PEER_SIGNS):
        return LostProcess(f"another process of this run has ended; see its error message ({reason})")
    if "NCCL" in text:
        # The first line is general; the cause follows after "Last error:".
        cause = text.partition("Last error:")[2].strip().partition("\n")[0].strip()[:200] or reason
        advice = (advice for sign, advice in _NCCL_ADVICE.items() if sign in text)
        return GroupError(f"NCCL failed: {cause}; {next(advice, 'NCCL_DEBUG=INFO in the environment shows more')}")
    if isinstance(error, dist.DistError) and not dist.is_initialized():
        place = ":".join(os.environ.get(name, "") for name in _MEETING_PLACE) + " (MASTER_ADDR:MASTER_PORT)"
        return LostProcess(
            f"the {world.size} processes did not meet at {place}: {reason.rstrip('.')}; start all of them, or let torchrun "
            "start them"
        )
    return None


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
