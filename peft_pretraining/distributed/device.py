"""Chooses the device a process computes on and its dtype, and reports the device's memory.

`set_allocator` must run before torch allocates memory, so this module does not import torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_pretraining.distributed.world import World

if TYPE_CHECKING:
    import torch


# oneDNN computes bfloat16 products on an x86 CPU that has one of these sets of features: AVX-512 with extensions, or bfloat16
# instructions.
_X86_BFLOAT16 = ({"avx512bw", "avx512vl", "avx512dq"}, {"amx_bf16"}, {"avx512_bf16"}, {"avx_ne_convert"})
# Values of ONEDNN_MAX_CPU_ISA that forbid all of these.
_ISA_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI")
# Memory of the CUDA context and of the kernels loaded into it. Assumed, not measured.
CUDA_CONTEXT_BYTES = 500 * 10**6
# Less memory that is missing is not put down to other programs: contexts differ in size.
_NOTICED_BYTES = 2**30


class DeviceError(ValueError):
    """Raised when the requested device is not available."""


@dataclass(frozen=True)
class DeviceMemory:
    """The memory available to one process. name: for messages. num_bytes: its size. device_type: cpu or cuda."""

    name: str
    num_bytes: int
    device_type: str


def device_memory(device: torch.device, world: World) -> DeviceMemory:
    """Returns the GPU's memory that other programs leave, or the machine's (or container's) divided by its processes."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        # The plan counts what this process has: its context and what torch has reserved.
        size = min(total, free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT_BYTES)
        name = torch.cuda.get_device_name(device)
        if total - size > _NOTICED_BYTES:
            name += f", of whose {total / 2**30:.1f} GiB other programs use {(total - size) / 2**30:.1f},"
        return DeviceMemory(name, size, "cuda")
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        # The file may be absent, or contain "max" for no limit.
        with contextlib.suppress(OSError, ValueError), open(limit, encoding="ascii") as file:
            size = min(size, int(file.read()))
    return _shared("this machine's memory", size, world)


def planned_memory(name: str, num_bytes: int, world: World) -> DeviceMemory:
    """Returns the memory of a device that need not be here. name: as for --device; auto is a GPU."""
    if name == "cpu":
        return _shared("the planned machine's memory", num_bytes, world)
    return DeviceMemory("the planned GPU", num_bytes, "cuda")


def _shared(name: str, num_bytes: int, world: World) -> DeviceMemory:
    share = f" for each of {world.local_size} processes" if world.local_size > 1 else ""
    return DeviceMemory(f"{name}{share}", num_bytes // world.local_size, "cpu")


def default_dtype(device_type: str) -> str:
    """Returns the dtype of a run for which none is given: bfloat16 on a GPU, which is taken to have it."""
    return "bfloat16" if device_type == "cuda" else "float32"


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo"), environ: Mapping[str, str] = os.environ) -> bool | None:
    """Tells whether oneDNN has fast bfloat16 products on this CPU; None if that is unknown.

    Otherwise oneDNN uses a slow reference kernel: with ONEDNN_MAX_CPU_ISA=AVX2 a product of 512 x 512 matrices took 101 ms in
    bfloat16 and 2.5 ms in float32; without it 0.6 and 2.6 ms. ATEN_CPU_CAPABILITY has no influence. (torch 2.13, AMD EPYC with
    AVX-512, 2026-11-28: OMP_NUM_THREADS=1 python -m timeit -n 10 -s "import torch; a = torch.randn(512, 512).to(torch.bfloat16)"
    "a @ a")
    """
    highest = environ.get("ONEDNN_MAX_CPU_ISA", environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if highest in _ISA_WITHOUT_BFLOAT16:
        return False
    features = cpu_features(cpuinfo)
    if not features:
        return None
    return "bf16" in features or any(needed <= features for needed in _X86_BFLOAT16)


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Returns the CPU's instruction-set extensions as the kernel names them; empty if they are not known."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(line[1].split()) if line else frozenset()


def allocation_failure(error: BaseException) -> str | None:
    """Returns the allocator's message if memory ran out on a CPU or a GPU; None for other errors. Needs no torch."""
    on_cpu = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    if not (on_cpu or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):
        return None
    return str(error).strip().partition("\n")[0] or type(error).__name__


def pick_device(name: str, world: World) -> torch.device:
    """Returns the torch device for `--device NAME`; auto is this rank's GPU if available, else the CPU. Raises DeviceError."""
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if available else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if not available:
        raise DeviceError(
            f"--device {name}: torch {torch.__version__} finds no GPU; use --device cpu, or plan for another machine's with "
            "--dry_run --memory 80GB"
        )
    number = int(index) if index else world.local_rank
    # Raised on every process, including those whose local rank has a GPU.
    if not index and world.local_size > available:
        raise DeviceError(
            f"--device {name}: {world.local_size} processes run on this machine, which has {available} GPUs; start at most "
            f"{available} (torchrun --nproc_per_node {available}, NPROC={available} for the scripts)"
        )
    if number >= available:
        raise DeviceError(f"--device {name}: GPU {number} does not exist; this machine's GPUs are numbered 0 to {available - 1}")
    if index and world.local_size > 1:
        raise DeviceError(f"--device {name}: {world.local_size} processes cannot share one GPU; use --device cuda")
    return torch.device("cuda", number)


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype named bfloat16 or float32."""
    import torch

    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def resolve_dtype(name: str | None, device: torch.device) -> str:
    """Returns `name` if given, otherwise bfloat16 on a GPU that supports it and float32 elsewhere."""
    if name is not None:
        return name
    import torch

    # Emulated bfloat16, as on a T4, is slower than float32.
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if supported else "float32"


def allow_tf32() -> None:
    """Lets GPUs compute float32 products of matrices in TF32."""
    import torch

    # After the newer `fp32_precision = "tf32"`, torch.compile fails where it reads the older setting (torch 2.11 to 2.13).
    torch.set_float32_matmul_precision("high")


# Options of glibc's mallopt. Freed blocks of 4 MiB or more are returned to the system at once; of smaller blocks up to 64 MiB
# stay at the end of the heap.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
LARGE_BLOCK_BYTES, _KEPT_BYTES = 4 * 2**20, 64 * 2**20


def set_allocator() -> None:
    """Sets up the allocators of host and GPU memory, before torch is imported. Settings in the environment take precedence.

    On a GPU torch maps memory into segments that grow, so that freed blocks of one size can serve requests of another. On a CPU
    glibc returns large freed blocks to the system, and torch uses huge pages.

    By default glibc raises its threshold up to 32 MB as such blocks are freed, and keeps smaller blocks. Activations and dense
    weights then leave gaps that later ones do not fit (2.5 to 5 GB of unused memory at 7B), and page faults for returned memory
    take up to a third of an update's time. With huge pages these faults are cheap (figures in docs/decisions.md). Does nothing
    on systems other than Linux with glibc.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys() and os.name == "posix":
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # torch reads this variable when it allocates its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
            libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
            libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def trim_heap() -> None:
    """Returns the freed memory of glibc's heap to the system, also between blocks in use; does nothing on other systems.

    Blocks below LARGE_BLOCK_BYTES stay in the process when freed, and gaps among longer-lived ones are not reused.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
