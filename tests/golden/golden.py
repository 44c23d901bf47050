"""Golden losses: losses of 20 updates of every method, recorded once and compared by every test run.

python tests/golden/golden.py --write    records them again (only if a change of the losses is intended)
python tests/golden/golden.py --out F    writes the current ones to F

Runs on the CPU in float32 with one thread and the smallest instruction sets, so that every machine gives the same numbers.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).resolve().parent / "losses.json"
ROOT = FILE.parents[2]
# Without these variables libraries choose kernels by the processor, and different kernels sum in different orders.
PLAIN_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
METHODS = ("full", "galore", "lowrank", "relora", "sltrain", "sltrain_scaled", "sltrain_block", "sltrain_int8")
# Runs of SLTrain with other optimizers than adamw: what follows --optimizer.
OPTIMIZERS = {
    "muon": ["muon"],
    "muon_conditioned": ["muon", "--condition_gradients"],
    "spectron": ["spectron"],
    "stable_spam": ["stable_spam"],
}
# Of which the form with per-layer updates is recorded too; it has the same losses and norms.
PER_LAYER = ("galore", "relora", "sltrain_block", "sltrain_int8", "spectron", "muon_conditioned")
NUM_UPDATES = 20


def flags(method: str, per_layer: bool) -> list[str]:
    """Returns the flags of one golden run, without model, data and folder. method: one of METHODS or of OPTIMIZERS."""
    from tiny_runs import METHODS as FLAGS

    return [
        *("--dtype", "float32", "--optimizer", "adamw", "--lr", "0.003", "--warmup_steps", "4", "--max_length", "64"),
        *("--num_training_steps", str(NUM_UPDATES), "--batch_size", "4", "--gradient_accumulation", "2"),
        *("--eval_every", str(NUM_UPDATES), "--save_every", str(NUM_UPDATES), "--wandb", "disabled"),
        *("--device", "cpu", "--workers", "0", *(["--per_layer"] if per_layer else [])),
        *(FLAGS[method] if method in FLAGS else [*FLAGS["sltrain"], "--optimizer", *OPTIMIZERS[method]]),
    ]


def measure() -> dict[str, dict[str, list[float]]]:
    """Returns losses, gradient norms and the last evaluation's loss of every run, by its name."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from tiny_runs import write_inputs

    import torchrun_main

    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder))
        for method in (*METHODS, *OPTIMIZERS):
            for per_layer in (False, True) if method in PER_LAYER else (False,):
                name = f"{method}{'_per_layer' if per_layer else ''}"
                run = Path(folder) / name
                assert torchrun_main.main([*inputs, *flags(method, per_layer), "--save_dir", str(run)]) == 0
                rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                losses[name] = {key: [row[key] for row in rows if key in row] for key in ("loss", "gradnorm")}
                losses[name]["final_eval_loss"] = [row["final_eval_loss"] for row in rows if "final_eval_loss" in row]
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write the losses to {FILE.name}")
    parser.add_argument("--out", type=Path, help="write the losses to this file instead")
    args = parser.parse_args()
    if bool(args.out) == args.write:
        parser.error("give either --write or --out")
    if any(os.environ.get(name) != value for name, value in PLAIN_KERNELS.items()):
        # The variables are read when libraries are loaded, so the program starts again with them.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | PLAIN_KERNELS)
    target = FILE if args.write else args.out
    target.write_text(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
