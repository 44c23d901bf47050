"""Finds the processes that a running torchrun has started, for tests that disturb them."""

from pathlib import Path


def ranks_below(pid: int) -> dict[int, str]:
    """Returns the ranks of torchrun's child processes, by process id, from the process table."""
    ranks = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"PPid:\t{pid}\n" in (entry / "status").read_text():
                    environment = (entry / "environ").read_text().split("\0")
                    ranks.update({int(entry.name): item[5:] for item in environment if item.startswith("RANK=")})
            except OSError:
                continue
    return ranks
