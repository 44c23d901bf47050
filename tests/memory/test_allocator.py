"""set_allocator makes the C library return large freed blocks to the system; tested in separate processes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from peft_pretraining.distributed.device import set_allocator

ROOT = Path(__file__).resolve().parents[2]
# Allocates 40 blocks of 8 MiB with small ones between them, as in a training step, then frees the large ones.
PROGRAM = """
import os, sys
from peft_pretraining.distributed.device import set_allocator
if sys.argv[1] == "set":
    set_allocator()
import torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.ones(31 * 2**18).sum()  # glibc raises its own threshold to the largest block it has seen freed
large, small = [], []
for _ in range(40):
    large.append(torch.ones(2 * 2**20))
    small.append(torch.ones(2**14))
before = resident()
large.clear()
print((before - resident()) / (40 * 8 * 2**20), os.environ.get("THP_MEM_ALLOC_ENABLE"))
"""


def returned_share(mode: str, **environment: str) -> tuple[float, str]:
    """Returns the share of freed memory returned to the system, and the value that tells torch to use huge pages."""
    command = [sys.executable, "-c", PROGRAM, mode]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_", "GLIBC_"))}
    ended = subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True)
    share, huge = ended.stdout.split()
    return float(share), huge


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set_allocator configures glibc's malloc")
def test_large_freed_blocks_are_returned_to_the_system():
    """By default glibc would keep them, because of the small blocks between them."""
    share, huge = returned_share("set")
    assert share > 0.9
    assert huge == "1"
    assert returned_share("leave")[0] < 0.1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set_allocator configures glibc's malloc")
def test_settings_in_the_environment_are_kept():
    """The user's environment variables take precedence."""
    thresholds = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    share, huge = returned_share("set", THP_MEM_ALLOC_ENABLE="0", **thresholds)
    assert share < 0.1
    assert huge == "0"


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_segments_of_a_gpu_s_allocator_grow_unless_the_user_has_set_it_up(monkeypatch, name):
    own = dict.fromkeys([name] if name else [], "max_split_size_mb:256")
    monkeypatch.setattr(os, "environ", own)
    set_allocator()
    settings = {key: value for key, value in own.items() if key.startswith("PYTORCH")}
    assert settings == ({name: "max_split_size_mb:256"} if name else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
