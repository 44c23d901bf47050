"""Measures the memory of two updates of LLaMA 7B with SLTrain on this machine, with 8-bit and with 4-bit moments.

`python benchmarks/memory_7b.py [--out FILE.json]`: r = 1024, delta = .05, bfloat16, 1 x 256 tokens, layer checkpointing and
per-layer updates. Prints GiB; needs half an hour and 14 GiB on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memory_table import run


def main() -> None:
    """Measures and prints a row for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    run(["7b"], parser.parse_args().out)


if __name__ == "__main__":
    main()
