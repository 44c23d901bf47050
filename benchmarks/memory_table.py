"""Compares predicted and measured memory from 9M to 7B.

`python benchmarks/memory_table.py [9m 60m 130m 350m 1b] [--out FILE.json]`. Each row makes three updates (7b: two) in a separate
process, because peak memory is measured per process. Rows: SLTrain in bfloat16 with 8-bit Adam, per-layer updates, layer
checkpointing and 1 x 256 tokens (7b: the settings of `memory_7b.py`); up to 1b also SLTrain in bfloat16 with AdamW and full-rank
AdamW in float32, both without checkpointing and with 4 x 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# size: (rank, delta)
SIZES = {
    "9m": (32, 0.03),
    "60m": (128, 0.03),
    "130m": (256, 0.03),
    "350m": (256, 0.03),
    "1b": (512, 0.03),
    "7b": (1024, 0.05),
}
SLTRAIN = "--peft_model sltrain --lora_alpha 8 --dtype bfloat16 --embedding_states 8bit --activation_checkpointing --batch_size 1"
PLAIN = "--peft_model sltrain --lora_alpha 8 --dtype bfloat16 --optimizer adamw --batch_size 4"
EIGHT_GB = "--per_layer --weight_dtype int8 --head_gradient slices --embedding_states 4bit"
FULL = "--peft_model full --dtype float32 --optimizer adamw --batch_size 4"


def settings(size: str) -> dict[str, list[str]]:
    """Returns the trainer's arguments for each row of a size."""
    config = ["--model_config", f"configs/llama_{size}.json"]
    rank, sparsity = SIZES[size]
    layer = ["--rank", str(rank), "--sp_ratio", str(sparsity)]
    rows = {"sltrain, adam8bit_per_layer": [*config, *SLTRAIN.split(), *layer, "--optimizer", "adam8bit_per_layer"]}
    if size == "7b":
        rows["sltrain, adamw4bit_per_layer"] = [*config, *SLTRAIN.split(), *layer, "--optimizer", "adamw4bit_per_layer"]
        in_int8 = [*config, *SLTRAIN.split(), *layer, *EIGHT_GB.split()]
        for optimizer in ("adamw4bit", "muon4bit", "spectron4bit"):
            rows[f"sltrain, int8, {optimizer}"] = [*in_int8, "--optimizer", optimizer]
        eight = ["--total_batch_size", "8", "--accumulate", "moments"]
        rows["sltrain, int8, adamw4bit, 8 micro-batches"] = [*in_int8, "--optimizer", "adamw4bit", *eight]
    else:
        rows["sltrain, adamw"] = [*config, *PLAIN.split(), *layer]
        rows["full, adamw"] = [*config, *FULL.split()]
    return rows


def measure(argv: list[str], num_updates: int) -> dict:
    """Runs memory.py in a separate process and returns its figures. Raises RuntimeError with its message."""
    command = [sys.executable, str(HERE / "memory.py"), "--updates", str(num_updates), "--json", *argv]
    ended = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(ended.stderr.strip().splitlines()[-1])
    return json.loads(ended.stdout.splitlines()[-1])


def run(sizes: list[str], out: Path | None, chosen: list[str] | None = None) -> None:
    """Measures the sizes, prints a Markdown table and writes JSON. chosen: names of settings; default: all."""
    rows = []
    print("| model | setting | parameters | support | optimizer | peak predicted | peak measured | predicted / measured |")
    print("|---|---|---|---|---|---|---|---|")
    for size in sizes:
        for name, argv in settings(size).items():
            if chosen and name not in chosen:
                continue
            row = measure(argv, num_updates=2 if size == "7b" else 3)
            rows.append({"size": size, "setting": name, **row})
            gib = [row["measured"][key] / 2**30 for key in ("parameters", "support", "optimizer")]
            gib += [row["peak_predicted"] / 2**30, row["peak_measured"] / 2**30]
            ratio = f"{row['predicted_to_measured']:.3f}"
            print(f"| {size} | {name} |", " | ".join(f"{value:.2f}" for value in gib), f"| {ratio} |", flush=True)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    """Measures and prints the table, in GiB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=["9m", "60m", "130m", "350m", "1b"], help=", ".join(SIZES))
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    args = parser.parse_args()
    if unknown := set(args.sizes) - set(SIZES):
        parser.error(f"{', '.join(sorted(unknown))}: sizes are {', '.join(SIZES)}")
    run(args.sizes, args.out)


if __name__ == "__main__":
    main()
