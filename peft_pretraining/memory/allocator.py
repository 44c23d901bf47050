"""How a CPU's memory is allocated; no torch, which must not have allocated anything yet."""

import contextlib
import ctypes
import os

# Of glibc's malloc.h. Blocks from 4 MiB on are the system's as soon as they are freed; what smaller ones leave at the heap's end
# stays up to 64 MiB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
LARGE_BLOCK_BYTES, _KEPT_BYTES = 4 * 2**20, 64 * 2**20


def set_allocator() -> None:
    """Give large freed blocks back to the system, and take huge pages for large tensors. A choice in the environment stands.

    Left to itself glibc raises its threshold up to 32 MB as it sees such blocks freed, and keeps smaller ones: activations and
    dense weights that come and go leave gaps which the next ones do not fit (at 7B 2.5 to 5 GB that nothing used), and yet it
    gives back so much that an update fetches half a million pages anew, up to a third of its time. With huge pages fetching a
    block costs next to nothing (docs/decisions.md has the figures). Elsewhere than on Linux with glibc nothing happens.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it allocates its first tensor
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
            libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
            libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
