"""Golden losses: 20 updates of every method, recorded once and compared by every test run.

python tests/golden/golden.py --write    records them anew (only where a change of the numbers is intended)
python tests/golden/golden.py --out F    writes the present ones to F

Runs on the CPU in float32 with one thread and the plainest instruction sets, so that the numbers are those of any machine.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).resolve().parent / "losses.json"
ROOT = FILE.parents[2]
# Kernels are chosen by the processor unless told otherwise; another choice sums in another order.
PLAIN_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
METHODS = ("full", "galore", "lowrank", "relora", "sltrain", "sltrain_scaled", "sltrain_block")
# Runs of SLTrain with other optimizers than adamw.
OPTIMIZERS = ("muon", "spectron", "stable_spam")
NUM_UPDATES = 20


def flags(method: str, per_layer: bool) -> list[str]:
    """The flags of one golden run, without model, data and folder. method: one of METHODS or of OPTIMIZERS."""
    from tiny_runs import METHODS as FLAGS

    return [
        *("--dtype", "float32", "--optimizer", "adamw", "--lr", "0.003", "--warmup_steps", "4", "--max_length", "64"),
        *("--num_training_steps", str(NUM_UPDATES), "--batch_size", "4", "--gradient_accumulation", "2"),
        *("--eval_every", str(NUM_UPDATES), "--save_every", str(NUM_UPDATES), "--wandb", "disabled"),
        *("--device", "cpu", "--workers", "0", *(["--per_layer"] if per_layer else [])),
        *(FLAGS[method] if method in FLAGS else [*FLAGS["sltrain"], "--optimizer", method]),
    ]


def measure() -> dict[str, dict[str, list[float]]]:
    """Losses and gradient norms by run; one more entry of each is the evaluation's loss at the end."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from tiny_runs import write_inputs

    import torchrun_main

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder))
        for method in (*METHODS, *OPTIMIZERS):
            for per_layer in (False, True):
                name = f"{method}{'_per_layer' if per_layer else ''}"
                run = Path(folder) / name
                assert torchrun_main.main([*inputs, *flags(method, per_layer), "--save_dir", str(run)]) == 0
                rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                found[name] = {key: [row[key] for row in rows if key in row] for key in ("loss", "gradnorm")}
                found[name]["final_eval_loss"] = [row["final_eval_loss"] for row in rows if "final_eval_loss" in row]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"record anew in {FILE.name}")
    parser.add_argument("--out", type=Path, help="write the present numbers to this file instead")
    args = parser.parse_args()
    if bool(args.out) == args.write:
        parser.error("one of --write and --out")
    if any(os.environ.get(name) != value for name, value in PLAIN_KERNELS.items()):
        # Read when torch is loaded: too late to set in this process.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | PLAIN_KERNELS)
    target = FILE if args.write else args.out
    target.write_text(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
