"""Measures the memory of two updates of LLaMA 7B with SLTrain on this machine.

`python benchmarks/memory_7b.py [--settings NAME ...] [--out FILE.json]`: r = 1024, delta = .05, bfloat16, 1 x 256 tokens, layer
checkpointing and per-layer updates; with 8-bit and 4-bit moments, and with weights in int8 and gradients of embedding and head in
slices. Prints GiB; in bfloat16 a setting takes about a quarter of an hour on two cores, and the first one 14 GiB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memory_table import run, settings


def main() -> None:
    """Measures and prints a row for each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(settings("7b"))
    parser.add_argument("--settings", nargs="+", choices=names, metavar="NAME", help=f"default: all of {'; '.join(names)}")
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    args = parser.parse_args()
    run(["7b"], args.out, args.settings)


if __name__ == "__main__":
    main()
