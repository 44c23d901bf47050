"""Held-out perplexity of SLTrain and low-rank with restarts, balanced factors and starts of other kinds, with several seeds.

`python benchmarks/restarts.py [--variants plain restart ...] [--methods sltrain] [--seeds 42 1 2] [--updates 800] [--every 200]
[--lrs 0.001 0.002 0.004] [--threads 1] --out FILE.json`

Each run is the trainer's, on the quickstart's model and text (scripts/quickstart.yaml), float32, one after another; those that
FILE.json already has are not made again. Variants, beside `plain`:

  restart    moments from zero every --every updates (`--restart_every`), 10 updates of warm-up after each
  rebalance  and balanced factors at each of them (`--rebalance`)
  svd        factors and sparse values from the decomposition of a dense initialisation (`--init svd`)
  best       svd, restart and rebalance together
  scaling    a trained scale (`--train_scaling`)
  block      blocks as the support (`--support block`)

Printed: for each method, variant and learning rate the seeds' perplexities, their mean, and the 95 % interval of the mean ratio
to the method's `plain` at the learning rate that was best for that, paired by seed (Student's t of the logarithms).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchrun_main
from benchmarks.supports import ratio_to_uniform
from peft_pretraining.run_folder import versions

ROOT = Path(__file__).resolve().parent.parent
RESTART = ["--restart_every", "{every}", "--restart_warmup_steps", "10"]
SVD = ["--init", "svd"]
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "restart": RESTART,
    "rebalance": [*RESTART, "--rebalance"],
    "svd": SVD,
    "best": [*SVD, *RESTART, "--rebalance"],
    "scaling": ["--train_scaling"],
    "block": ["--support", "block"],
}
KEYS = ("method", "variant", "lr", "seed", "updates", "every")


def train(setting: dict[str, Any], eval_tokens: int) -> dict[str, Any]:
    """One run; its last evaluation. Raises RuntimeError where the trainer fails or is stopped."""
    updates = str(setting["updates"])
    flags = ["--config", str(ROOT / "scripts/quickstart.yaml"), "--model_config", str(ROOT / "configs/llama_demo.json")]
    flags += ["--num_training_steps", updates, "--warmup_steps", str(setting["updates"] // 10), "--eval_every", updates]
    flags += ["--eval_at_start", "false", "--save_every", updates, "--eval_tokens", str(eval_tokens)]
    flags += ["--peft_model", setting["method"], "--lr", str(setting["lr"]), "--seed", str(setting["seed"])]
    flags += ["--wandb", "disabled", "--device", "cpu", "--dtype", "float32"]
    flags += [word.format(every=setting["every"]) for word in VARIANTS[setting["variant"]]]
    with tempfile.TemporaryDirectory() as folder:
        if torchrun_main.main([*flags, "--save_dir", folder]) != 0:
            raise RuntimeError(f"the run {setting} failed")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = next((row for row in reversed(rows) if "final_eval_loss" in row), None)
    if last is None or last["update_step"] != setting["updates"]:
        raise RuntimeError(f"the run {setting} was stopped before its end; the same command goes on")
    return setting | {"loss": last["final_eval_loss"], "perplexity": last["final_eval_perplexity"]}


def print_table(runs: list[dict[str, Any]]) -> None:
    """A line per method, variant and learning rate, the best mean first."""
    losses: dict[tuple[str, str, float], dict[int, float]] = {}
    for run in runs:
        losses.setdefault((run["method"], run["variant"], run["lr"]), {})[run["seed"]] = run["loss"]
    means = {key: statistics.mean(each.values()) for key, each in losses.items()}
    for key in sorted(losses, key=lambda key: (key[0], means[key])):
        plain = [other for other in losses if other[:2] == (key[0], "plain")]
        best = min(plain, key=lambda other: means[other], default=None)
        ratio = None if best in (None, key) else ratio_to_uniform(losses[key], losses[best])
        against = "" if ratio is None else "  {:.4f} of plain's [{:.4f}, {:.4f}]".format(*ratio)
        each = ", ".join(f"{math.exp(loss):.2f} ({seed})" for seed, loss in losses[key].items())
        print(f"{key[0]:<9}{key[1]:<11}lr {key[2]:<8g}{math.exp(means[key]):8.2f}  {each}{against}", flush=True)


def main() -> int:
    """Exit code 1 where a run failed or was stopped; those that were made stay in the file whatever happens afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--methods", nargs="+", choices=("sltrain", "lowrank"), default=["sltrain"])
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.002], help="learning rates (default: 0.002)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2], help="default: 42 1 2")
    parser.add_argument("--updates", type=int, default=800, help="of each run (default: %(default)s)")
    parser.add_argument("--every", type=int, default=200, help="updates between restarts (default: %(default)s)")
    parser.add_argument("--eval_tokens", type=int, default=68_000, help="held-out tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, completed run by run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {"runs": []}
    if args.out.exists():
        found = json.loads(args.out.read_text(encoding="utf-8"))
    found |= {"device": platform.processor() or platform.machine(), "threads": args.threads, "versions": versions()}
    found |= {"command": ["benchmarks/restarts.py", *sys.argv[1:]], "date": date.today().isoformat()}
    done = {tuple(run[key] for key in KEYS) for run in found["runs"]}
    for seed, method, lr, variant in itertools.product(args.seeds, args.methods, args.lrs, args.variants):
        if method == "lowrank" and variant == "block":
            continue  # it has no support
        setting = dict(zip(KEYS, (method, variant, lr, seed, args.updates, args.every), strict=True))
        if tuple(setting.values()) in done:
            continue
        try:
            found["runs"].append(train(setting, args.eval_tokens))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_table([run for run in found["runs"] if (run["updates"], run["every"]) == (args.updates, args.every)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
