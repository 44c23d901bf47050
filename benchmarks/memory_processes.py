"""Compares predicted and measured memory of a process under `--parallel fsdp`, by runs of torchrun_main.py on a CPU.

`python benchmarks/memory_processes.py [ROW ...] [--out FILE.json]`: three updates of packed demo text (two at 1b), 1 x 256
tokens per process and micro-batch. The measured figure is the largest resident size of process 0, whose shards are the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FULL = "--peft_model full --optimizer adamw --dtype float32"
# row: (model, processes, flags)
ROWS = {
    "60m-full-1": ("60m", 1, FULL),
    "60m-full-2": ("60m", 2, FULL),
    "60m-full-4": ("60m", 4, FULL),
    "130m-full-1": ("130m", 1, FULL),
    "130m-full-2": ("130m", 2, FULL),
    "130m-full-4": ("130m", 4, FULL),
    "130m-sltrain-mixed-2": (
        *("130m", 2),
        "--peft_model sltrain --rank 256 --sp_ratio 0.03 --optimizer adamw --dtype float32 --compute_dtype bfloat16",
    ),
    "350m-sltrain-per-layer-2": (
        *("350m", 2),
        "--peft_model sltrain --rank 256 --sp_ratio 0.03 --optimizer adam8bit_per_layer --dtype bfloat16 "
        "--activation_checkpointing",
    ),
    "350m-sltrain-2": ("350m", 2, "--peft_model sltrain --rank 256 --sp_ratio 0.03 --optimizer adamw --dtype bfloat16"),
    "1b-sltrain-4": ("1b", 4, "--peft_model sltrain --rank 512 --sp_ratio 0.03 --optimizer adamw --dtype bfloat16"),
}
COMMON = (
    "--device cpu --dataset demo --packing --batch_size 1 --max_length 256 --lora_alpha 32 --lr 0.001 --warmup_steps 1 "
    "--workers 0 --data_lanes 24 --eval_tokens 1000 --eval_every 100 --save_every 100 "
    "--wandb disabled --resume never --parallel fsdp"
)


def measure(name: str) -> dict:
    """Runs the program with a row's flags; returns its figures. Raises RuntimeError with the program's last line."""
    model, processes, flags = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        program = ["torchrun_main.py", "--model_config", f"configs/llama_{model}.json", "--save_dir", f"{folder}/run"]
        length = ["--num_training_steps", "2" if model == "1b" else "3"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        argv = [*command, *program, *COMMON.split(), *flags.split(), *length]
        ended = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{name}: {ended.stderr.strip().splitlines()[-1]}")
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    measured = max(row["max_memory"] for row in rows if "max_memory" in row)
    predicted = rows[0]["memory_peak_predicted"]
    exact = {key: value for key, value in rows[0].items() if key.startswith("memory_")}
    return {"row": name, "model": model, "processes": processes, "flags": flags, **exact, "peak_measured": measured} | {
        "predicted_to_measured": predicted / measured
    }


def main() -> None:
    """Measures the rows and prints a Markdown table, in units of 10^9 bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"{', '.join(sorted(unknown))}: rows are {', '.join(ROWS)}")
    import torch

    machine = {
        "date": str(date.today()),
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    measured = []
    print("| model | setting | processes | predicted | measured | predicted / measured |\n|---|---|---|---|---|---|")
    for name in args.rows:
        row = measure(name)
        measured.append(row)
        peaks = (row["memory_peak_predicted"] / 1e9, row["peak_measured"] / 1e9, row["predicted_to_measured"])
        figures = " | ".join(f"{value:.2f}" for value in peaks)
        print(f"| {row['model']} | `{row['flags']}` | {row['processes']} | {figures} |", flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps({"machine": machine, "rows": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
