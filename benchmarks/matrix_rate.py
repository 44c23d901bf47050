"""Trains with scaled steps or scaled initial values of the matrices in attention and MLP.

`python benchmarks/matrix_rate.py [--scale 0.25] [--start 0.25 [--start_names lora_B]] [flags of torchrun_main.py]`

`--scale` multiplies each step of these matrices, as alpha / rank and GaLore's scale do in their methods; `--start` multiplies
initial values. Embedding, head and norms are unchanged. Works with one process and whole updates. The comparison separates the
effect of a method from that of its learning rate and initial values (docs/results.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchrun_main
from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.model import llama
from peft_pretraining.optim.updates import WholeUpdate


def scale_steps(scale: float) -> None:
    """Scales the matrices' steps by `scale` in every later WholeUpdate of this process."""
    original = WholeUpdate.finish

    def finish(self: WholeUpdate, loss: torch.Tensor) -> Any:
        matrices = [parameter for name, parameter in self.stepped.items() if "_proj" in name]
        before = [matrix.detach().clone() for matrix in matrices]
        outcome = original(self, loss)
        with torch.no_grad():
            for matrix, start in zip(matrices, before, strict=True):
                matrix.copy_(start + (matrix - start) * scale)
        return outcome

    WholeUpdate.finish = finish  # type: ignore[method-assign]


def scale_start(scale: float, part: str) -> None:
    """Scales the initial values of parameters whose names contain `part`, in every later model of this process."""
    original = llama.prepare_to_train

    def prepare(model: torch.nn.Module, *how: Any) -> None:
        scaled = [parameter for name, parameter in model.named_parameters() if part in name]
        if not scaled:
            names = ", ".join(list(dict(model.named_parameters()))[:4])
            raise ConfigError([f"--start_names {part}: no parameter's name contains it; the names are {names}, ..."])
        with torch.no_grad():
            for parameter in scaled:
                parameter.mul_(scale)
        original(model, *how)

    llama.prepare_to_train = prepare


def record_scaling(folder: Path, scaling: dict[str, Any]) -> str | None:
    """Writes the scaling (not in run.json) to the run's folder; returns why the folder cannot be used, or None."""
    note = folder / "scaled.json"
    # A folder without run.json is unused: the previous start was refused.
    if (folder / "run.json").is_file():
        before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else "no scaling"
        if before != scaling:
            return f"--save_dir {folder}: contains a run made with {before}, not {scaling}; name another folder"
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(scaling), encoding="utf-8")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the matrices' steps (default: %(default)s)")
    parser.add_argument("--start", type=float, default=1.0, help="factor of initial values (default: %(default)s)")
    parser.add_argument("--start_names", default="_proj", help="part of the names that --start scales (default: %(default)s)")
    parser.add_argument("--save_dir", type=Path, required=True, help="the run's folder, for this scaling alone")
    own, flags = parser.parse_known_args()
    scaling = {"scale": own.scale, "start": own.start, "start_names": own.start_names}
    if (problem := record_scaling(own.save_dir, scaling)) is not None:
        parser.error(problem)
    if own.scale != 1:
        scale_steps(own.scale)
    if own.start != 1:
        scale_start(own.start, own.start_names)
    return torchrun_main.main([*flags, "--save_dir", str(own.save_dir)])


if __name__ == "__main__":
    sys.exit(main())
