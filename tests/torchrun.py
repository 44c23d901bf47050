"""What a running torchrun has started, for tests that disturb it."""

from pathlib import Path


def ranks_below(pid: int) -> dict[int, str]:
    """Rank processes of torchrun `pid`: their ids with their ranks, from the process table."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"PPid:\t{pid}\n" in (entry / "status").read_text():
                    environment = (entry / "environ").read_text().split("\0")
                    found.update({int(entry.name): item[5:] for item in environment if item.startswith("RANK=")})
            except OSError:
                continue
    return found
