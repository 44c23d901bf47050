"""Measures how far runs deviate that should be equal: `python benchmarks/compare_runs.py RUN OTHER...` (run folders).

For each OTHER, compared with RUN: the largest relative deviation of the logged losses, gradient norms and evaluation losses, and
the largest relative L2 distance of a parameter in the newest checkpoints.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.checkpoint.step_folder import resolve, tensor_index
from peft_pretraining.model.int8 import SCALES, load_dequantised
from peft_pretraining.record.summary import read_metrics

KEYS = ("loss", "gradnorm", "final_eval_loss")


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """Returns the model's floating-point tensors from a run's newest checkpoint, those stored in int8 as float32."""
    path = resolve(run)
    index = tensor_index(path)
    tensors = {
        name: torch.empty(size, dtype=dtype if dtype.is_floating_point else torch.float32)
        for name, (size, dtype) in index.items()
        if name.startswith("model/") and (dtype.is_floating_point or f"{name}{SCALES}" in index) and not name.endswith(SCALES)
    }
    load_dequantised(path, tensors)
    return tensors


def deviations(run: Path, other: Path) -> dict[str, float]:
    """Returns the largest relative deviation of each key and of the parameters. Raises ValueError if the rows do not match."""
    rows, other_rows = read_metrics(run), read_metrics(other)
    if [_step_and_keys(row) for row in rows] != [_step_and_keys(row) for row in other_rows]:
        raise ValueError(f"{run} and {other} did not log the same updates and evaluations")
    pairs = list(zip(rows, other_rows, strict=True))
    largest = {key: max((_relative(a[key], b[key]) for a, b in pairs if key in a), default=0.0) for key in KEYS}
    left, right = parameters(run), parameters(other)
    if left.keys() != right.keys():
        raise ValueError(f"{run} and {other} have different parameters")
    distances = [
        float((right[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12))
        for name, tensor in left.items()
    ]
    return largest | {"parameters": max(distances)}


def _relative(figure: float | None, other: float | None) -> float:
    """The relative difference of two figures, infinite if it is undefined; None is a figure that was not finite."""
    if figure == other:
        return 0.0
    return abs(other - figure) / abs(figure) if figure and other is not None else math.inf


def _step_and_keys(row: dict[str, Any]) -> tuple[int, set[str]]:
    """Returns a row's update step and which of the compared keys it has."""
    return row["update_step"], row.keys() & set(KEYS)


def main() -> None:
    """Prints one line per run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run to compare with")
    parser.add_argument("others", type=Path, nargs="+", help="runs that should equal the first")
    args = parser.parse_args()
    for other in args.others:
        print(other.name, "  ".join(f"{name} {value:.1e}" for name, value in deviations(args.run, other).items()))


if __name__ == "__main__":
    main()
