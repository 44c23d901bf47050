"""What a run's tensors really take, by class: the measured side of the memory account."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from peft_pretraining.distributed import DeviceMemory
from peft_pretraining.optim import HasState
from peft_pretraining.optim.shards import local
from sparse_lora import Support

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# Blocks from 4 MiB on are the system's as soon as they are freed; what smaller ones leave at the heap's end stays up to 64 MiB,
# since page faults for each of them would cost more than they save.
_TIGHT = {_M_MMAP_THRESHOLD: 4 * 2**20, _M_TRIM_THRESHOLD: 64 * 2**20}
# Every block is of the heap, and the heap never shrinks.
_AMPLE = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}


def set_allocator(peak: int, available: DeviceMemory, sharded: bool = False) -> None:
    """Tell the C library what to do with freed blocks on a CPU: keep them, or where memory is tight (more than a third of it
    will be needed, or it is for the memory that a model is sharded) give large ones back.

    Left to itself glibc gives back what lies at the heap's end and blocks above a threshold that moves up to 32 MB; an update
    then fetches half a million pages anew, up to a third of its time, and the peak is the same as when all is kept. Where the
    whole machine will be needed, activations and dense weights that come and go leave gaps which the next ones do not fit; at 7B
    that was 2.5 to 5 GB which nothing used. With a threshold of 1 MiB updates of 60M to 1B took 1.2 to 2 times as long, with 4
    MiB those of 1B no longer than without. Elsewhere than on glibc nothing happens.
    """
    if available.device_type != "cpu":
        return
    tight = sharded or peak > available.num_bytes / 3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in (_TIGHT if tight else _AMPLE).items():
            libc.mallopt(option, value)


def measured_bytes(model: nn.Module, optimizer: HasState) -> dict[str, int]:
    """Bytes of parameters, support, gradients (those alive now) and optimizer states; shared storage counts once.

    Of what FSDP2 shards, this process's parts.
    """
    parameters = [local(parameter.detach()) for parameter in model.parameters()]
    gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    supports = [buffer for module in model.modules() if isinstance(module, Support) for buffer in module.buffers()]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "parameters": _storage_bytes(parameters),
        "support": _storage_bytes(supports),
        "gradients": _storage_bytes(gradients),
        "optimizer": _storage_bytes(value for value in states if isinstance(value, torch.Tensor)),
    }


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    here = [local(tensor) for tensor in tensors]  # of sharded tensors this process's parts
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in here if t.numel()}
    return sum(storages.values())


def comparison(
    predicted: Mapping[str, int], measured: Mapping[str, int], peak: int, device_type: str
) -> dict[str, int]:
    """Predicted beside measured bytes as keys of the record: memory_<class>_predicted, memory_<class>_measured.

    A GPU's peak is what torch has allocated, without the CUDA context that the account counts as "runtime".
    """
    row: dict[str, int] = {}
    for name in ("parameters", "support", "optimizer"):
        row |= {f"memory_{name}_predicted": predicted[name], f"memory_{name}_measured": measured[name]}
    outside = predicted["runtime"] if device_type == "cuda" else 0
    return row | {"memory_peak_predicted": predicted["peak"] - outside, "memory_peak_measured": peak}
