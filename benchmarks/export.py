"""Measures an export's peak memory and size, and checks its keys.

`python benchmarks/export.py [--config 7b] [--folder FOLDER] [--out FILE.json]`. The trainer makes a checkpoint after one update
of 1 x 64 tokens (bfloat16, 8-bit Adam per layer, layer checkpointing). It is exported dense and with its factors, each in a
separate process whose ru_maxrss is the peak. Plain transformers, in a process without this project's code, then loads the dense
folder on the meta device (which requires `accelerate`), and the exported keys are compared with the model's. 7b writes 33 GB.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from memory_table import SIZES, SLTRAIN

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.run.folder import versions

ROOT = Path(__file__).resolve().parent.parent
ONE_UPDATE = "--optimizer adam8bit_per_layer --max_length 64 --total_batch_size 1 --num_training_steps 1 --warmup_steps 0"
DATA = "--dataset demo --eval_tokens 64 --workers 0 --wandb disabled"
META = """
import json, sys, torch
from pathlib import Path
from safetensors import safe_open
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, device_map="meta")
expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
exported = {}
for file in folder.glob("*.safetensors"):
    with safe_open(file, framework="pt") as opened:
        exported |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}
info = {key: sorted(map(str, value)) for key, value in info.items() if value}
print(json.dumps({"keys": len(expected), "equal": expected == exported, **info}))
"""


def command(*argv: str) -> tuple[float, int]:
    """Runs Python with the arguments; returns the seconds and the process's peak in bytes. Exits with its output if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode(errors="replace")[-3000:])
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def make_checkpoint(config: str, run: Path) -> None:
    """Makes a run of one update in the folder `run`."""
    rank, sparsity = SIZES[config]
    words = f"--model_config configs/llama_{config}.json {SLTRAIN} --rank {rank} --sp_ratio {sparsity} {ONE_UPDATE} {DATA}"
    command("torchrun_main.py", *words.split(), "--save_dir", str(run))


def measure(config: str, folder: Path) -> dict[str, Any]:
    """Measures a config and returns its row; the run and the exports stay in the folder."""
    run = folder / "run"
    if not (run / "run.json").is_file():
        make_checkpoint(config, run)
    row: dict[str, Any] = {"config": config}
    for form, flags in (("dense", []), ("factored", ["--keep_factors"])):
        out = folder / form
        seconds, peak = command("-m", "peft_pretraining", "export", "--checkpoint", str(run), "--out", str(out), *flags)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        row[form] = {"bytes": size, "peak": peak, "seconds": round(seconds, 1)}
        print(
            f"{config} {form}: {size / 2**30:.2f} GiB written in {seconds:.0f} s, peak {peak / 2**30:.2f} GiB",
            flush=True,
        )
    done = subprocess.run([sys.executable, "-c", META, str(folder / "dense")], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    row["meta"] = json.loads(done.stdout.splitlines()[-1])
    print(f"{config} factored / dense: {row['factored']['bytes'] / row['dense']['bytes']:.3f}; on meta: {row['meta']}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", choices=list(SIZES), default="7b")
    parser.add_argument("--folder", type=Path, help="folder in which run and exports are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    own = parser.parse_args()
    if importlib.util.find_spec("accelerate") is None:
        parser.error("transformers needs accelerate to load on the meta device: pip install accelerate")
    figures = {
        "command": ["benchmarks/export.py", "--config", own.config],
        "versions": versions(),
        "date": date.today().isoformat(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        figures |= measure(own.config, own.folder or Path(scratch))
    if own.out is not None:
        own.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
