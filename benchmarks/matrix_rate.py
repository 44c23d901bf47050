"""Training with scaled steps, or a scaled start, of attention's and the MLP's matrices.

`python benchmarks/matrix_rate.py [--scale 0.25] [--start 0.25 [--start_names lora_B]] [flags of torchrun_main.py]`

After each update every such matrix is moved to where `scale` times its step leads, as alpha / rank and GaLore's scale do for
theirs; `start` multiplies initial values. Embedding, head and norms are as they are. For one process and whole updates. It exists
to tell methods from their rates and starts (docs/results.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchrun_main
from peft_pretraining import build
from peft_pretraining.optim.updates import WholeUpdate


def scale_steps(scale: float) -> None:
    """From now on in every WholeUpdate of this process."""
    honest = WholeUpdate.finish

    def finish(self: WholeUpdate, loss: torch.Tensor) -> Any:
        matrices = [parameter for name, parameter in self.stepped.items() if "_proj" in name]
        before = [matrix.detach().clone() for matrix in matrices]
        outcome = honest(self, loss)
        with torch.no_grad():
            for matrix, start in zip(matrices, before, strict=True):
                matrix.copy_(start + (matrix - start) * scale)
        return outcome

    WholeUpdate.finish = finish  # type: ignore[method-assign]


def scale_start(scale: float, part: str) -> None:
    """From now on, of the parameters whose names hold `part`, in every model that this process initialises."""
    honest = build.initialize

    def initialize(model: torch.nn.Module, seed: int) -> None:
        honest(model, seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if part in name:
                    parameter.mul_(scale)

    build.initialize = initialize


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--scale", type=float, default=1.0, help="of the matrices' steps (default: %(default)s)")
    parser.add_argument("--start", type=float, default=1.0, help="of initial values (default: %(default)s)")
    parser.add_argument(
        "--start_names", default="_proj", help="part of the names of what --start scales (default: %(default)s)"
    )
    own, flags = parser.parse_known_args()
    if own.scale != 1:
        scale_steps(own.scale)
    scale_start(own.start, own.start_names)
    return torchrun_main.main(flags)


if __name__ == "__main__":
    sys.exit(main())
