"""Configures the memory allocator on a CPU. Must run before torch allocates memory, so this module does not import torch."""

import contextlib
import ctypes
import os

# Options of glibc's mallopt. Freed blocks of 4 MiB or more are returned to the system at once; of smaller blocks up to 64 MiB
# stay at the end of the heap.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
LARGE_BLOCK_BYTES, _KEPT_BYTES = 4 * 2**20, 64 * 2**20


def set_allocator() -> None:
    """Makes glibc return large freed blocks to the system, and torch use huge pages. Settings in the environment take precedence.

    By default glibc raises its threshold up to 32 MB as such blocks are freed, and keeps smaller blocks. Activations and dense
    weights then leave gaps that later ones do not fit (2.5 to 5 GB of unused memory at 7B), and page faults for returned memory
    take up to a third of an update's time. With huge pages these faults are cheap (figures in docs/decisions.md). Does nothing
    on systems other than Linux with glibc.
    """
    # torch reads this variable when it allocates its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
            libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
            libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
