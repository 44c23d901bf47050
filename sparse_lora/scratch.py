"""Memory for one matrix at a time that is given back at once: a CPU's allocator returns large blocks to the system, and fetching
90 MB anew took as long as a tenth of the product it was for (4096 x 11008, 2,048 rows).

A GPU's allocator keeps what is freed, and a C library's what is below LARGE_BYTES: nothing is kept here for those.
"""

import math
import threading

import torch
from torch import Tensor

# From here on the trainer's allocator gives blocks back (peft_pretraining/allocator.py); glibc by itself does from 128 KiB to
# 32 MiB on, depending on what was freed before.
LARGE_BYTES = 4 * 2**20


class _Kept(threading.local):
    """A thread's own memory: a backward pass may run in another thread than the forward pass of the next model."""

    memory: Tensor | None = None


_kept = _Kept()


def scratch_matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns), undefined, of the dtype and on the device of `like`; the last one's memory where that is worth it.

    Valid until the next call in the same thread: nothing that outlives its product may be in it. Where autograd records, memory
    of its own is given, which may be saved.
    """
    num_bytes = rows * columns * like.element_size()
    if like.device.type != "cpu" or num_bytes < LARGE_BYTES or torch.is_grad_enabled():
        return like.new_empty(rows, columns)
    if _kept.memory is None or _kept.memory.numel() < num_bytes:
        _kept.memory = None  # the smaller one goes first
        _kept.memory = torch.empty(num_bytes, dtype=torch.uint8)
    return _kept.memory[:num_bytes].view(like.dtype).view(rows, columns)


def passing_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in such memory: gone with the next one."""
    if torch.is_grad_enabled():
        return left @ right
    return torch.mm(left, right, out=scratch_matrix(left.shape[0], right.shape[1], left))


def large_bytes(shape: tuple[int, int], width: int) -> int:
    """Bytes that stay in use after a matrix of this shape, `width` bytes per entry, on a CPU."""
    num_bytes = math.prod(shape) * width
    return num_bytes if num_bytes >= LARGE_BYTES else 0
