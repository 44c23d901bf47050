"""Compares held-out perplexity of different patterns of S's support, with equal parameters and updates, over several seeds.

`python benchmarks/supports.py [--patterns uniform block ...] [--seeds 42 1 2] [--updates 600] [--threads 1] --out FILE.json`

Runs use the trainer with the demo's model and text (scripts/demo.yaml: learning rate .002, gradient norm clipped to
1) in float32, one after another; runs that FILE.json already contains are skipped. S has int(delta * out * in) values in all
patterns except "block", whose slices give up to 2 % more. Patterns, k = round(1 / delta):

  uniform      random positions, as published (`--support uniform`)
  block        k blocks: rows b, b + k, b + 2 k, ... by consecutive columns (`--support block`)
  consecutive  k blocks on the diagonal: consecutive rows by consecutive columns
  attention    block in attention's square weights, whose rows belong to heads, and consecutive in the others
  matched      like consecutive, but the pairing of row slices and column slices is drawn for each matrix
  permuted     k blocks after a random permutation of the rows and one of the columns, drawn for each matrix
  diagonals    4 k smaller blocks in each direction; each row of blocks has four of them, by random matchings
  granules1    like block with k = 32, a power of two; granules2, granules4: 2 or 4 neighbouring rows read the same columns
  columns      the same delta * in columns in every row, drawn for each matrix (as in LOST, arXiv 2508.02668)
  balanced     delta * in random entries in each row

Output for each pattern: the seeds' perplexities, their mean, and the 95 % interval of the mean ratio to uniform, paired by seed
(Student's t of the logarithms). Only uniform and block are patterns of the program; the others exist for this comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchrun_main
from peft_pretraining.record.intervals import ratio_interval
from peft_pretraining.run.folder import versions
from sparse_lora import uniform
from sparse_lora.uniform import Layout

ROOT = Path(__file__).resolve().parent.parent
DELTA = 0.03
# The patterns that the program has as --support.
PROGRAM_SUPPORTS = ("uniform", "block")


Pattern = Callable[[int, int, torch.Generator], Tensor]


def consecutive(size: int, count: int) -> Tensor:
    """Returns for each of `size` indices the number of its slice, for `count` consecutive slices of nearly equal size."""
    return torch.arange(size) * count // size


def on_the_diagonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    blocks = round(1 / DELTA)
    return consecutive(rows, blocks)[:, None] == consecutive(columns, blocks)[None, :]


def attention(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    if rows != columns:
        return on_the_diagonal(rows, columns, generator)
    blocks = round(1 / DELTA)
    return (torch.arange(rows) % blocks)[:, None] == consecutive(columns, blocks)[None, :]


def matched(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    blocks = round(1 / DELTA)
    partner = torch.randperm(blocks, generator=generator)
    return partner[consecutive(rows, blocks)][:, None] == consecutive(columns, blocks)[None, :]


def permuted(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    blocks = round(1 / DELTA)
    shuffled = [consecutive(n, blocks)[torch.randperm(n, generator=generator)] for n in (rows, columns)]
    return shuffled[0][:, None] == shuffled[1][None, :]


def diagonals(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    blocks = 4 * round(1 / DELTA)
    row_place, column_order = (torch.randperm(blocks, generator=generator) for _ in range(2))
    places, numbers = row_place[consecutive(rows, blocks)], consecutive(columns, blocks)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for shift in range(4):
        mask |= column_order[(places + shift) % blocks][:, None] == numbers[None, :]
    return mask


def granules(size: int) -> Pattern:
    """Returns 32 blocks to which `size` neighbouring rows at a time belong in turn."""

    def pattern(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        return (torch.arange(rows) // size % 32)[:, None] == consecutive(columns, 32)[None, :]

    return pattern


def columns_alone(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[:, torch.randperm(columns, generator=generator)[: math.ceil(DELTA * columns)]] = True
    return mask


def balanced(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(columns, generator=generator)[: math.ceil(DELTA * columns)]] = True
    return mask


PATTERNS: dict[str, Pattern] = {
    "consecutive": on_the_diagonal,
    "attention": attention,
    "matched": matched,
    "permuted": permuted,
    "diagonals": diagonals,
    "granules1": granules(1),
    "granules2": granules(2),
    "granules4": granules(4),
    "columns": columns_alone,
    "balanced": balanced,
}


def positions(pattern: Pattern, rows: int, columns: int, nnz: int, generator: torch.Generator) -> Tensor:
    """Returns `nnz` sorted positions of the pattern; entries are removed or added at random until the number is right."""
    mask = pattern(rows, columns, generator).flatten()
    while (missing := nnz - int(mask.sum())) != 0:
        candidates = (mask if missing < 0 else ~mask).nonzero().squeeze(1)
        mask[candidates[torch.randperm(len(candidates), generator=generator)[: abs(missing)]]] = missing > 0
    return mask.nonzero().squeeze(1)


@contextlib.contextmanager
def supports_of(name: str) -> Iterator[None]:
    """Makes `--support uniform` draw the named pattern in the with-block, stored as int32: gaps may be too large to encode."""
    if name in PROGRAM_SUPPORTS:
        yield
        return
    pattern, layout_for = PATTERNS[name], uniform.layout_for

    def draw(self: uniform.UniformSupport, generator: torch.Generator) -> None:
        drawn = positions(pattern, self.out_features, self.in_features, self.nnz, generator)
        self.code.copy_(drawn.to(torch.int32).view(torch.uint8))

    original = uniform.UniformSupport.draw_
    uniform.layout_for = lambda nnz, numel: Layout(nnz, numel, 4)  # type: ignore[assignment]
    uniform.UniformSupport.draw_ = draw  # type: ignore[method-assign]
    try:
        yield
    finally:
        uniform.layout_for, uniform.UniformSupport.draw_ = layout_for, original  # type: ignore[method-assign]


def train(pattern: str, seed: int, updates: int, eval_tokens: int) -> dict[str, Any]:
    """Makes one run; returns its last evaluation and number of parameters. Raises RuntimeError if the trainer fails."""
    with tempfile.TemporaryDirectory() as folder, supports_of(pattern):
        argv = [
            "--config",
            str(ROOT / "scripts/demo.yaml"),
            "--model_config",
            str(ROOT / "configs/llama_demo.json"),
        ]
        argv += ["--num_training_steps", str(updates), "--warmup_steps", str(updates // 10)]
        argv += ["--eval_every", str(updates), "--eval_at_start", "false", "--save_every", str(updates)]
        argv += ["--eval_tokens", str(eval_tokens), "--sp_ratio", str(DELTA), "--seed", str(seed)]
        argv += ["--support", pattern if pattern in PROGRAM_SUPPORTS else "uniform", "--save_dir", folder]
        argv += ["--wandb", "disabled", "--device", "cpu", "--dtype", "float32"]
        if torchrun_main.main(argv) != 0:
            raise RuntimeError(f"the run of {pattern}, seed {seed} failed")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        parameters = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))["plan"]["parameters"]
    last = next((row for row in reversed(rows) if row.get("final_eval_loss") and row["update_step"] == updates), None)
    if last is None:
        raise RuntimeError(f"the run of {pattern}, seed {seed} was stopped before its end; run the same command again")
    return {
        "pattern": pattern,
        "seed": seed,
        "updates": updates,
        "loss": last["final_eval_loss"],
        "perplexity": last["final_eval_perplexity"],
        "eval_tokens": last["final_eval_tokens"],
        "parameters": parameters,
    }


def print_table(runs: list[dict[str, Any]]) -> None:
    """Prints a line per pattern, the best mean first."""
    perplexities: dict[str, dict[int, float]] = {}
    for run in runs:
        perplexities.setdefault(run["pattern"], {})[run["seed"]] = run["perplexity"]
    baseline = perplexities.get("uniform", {})
    for pattern in sorted(perplexities, key=lambda name: statistics.geometric_mean(perplexities[name].values())):
        by_seed = perplexities[pattern]
        each = ", ".join(f"{perplexity:.2f} ({seed})" for seed, perplexity in by_seed.items())
        line = f"{pattern:<12}{statistics.geometric_mean(by_seed.values()):8.2f}  {each}"
        pairs = [(by_seed[seed], baseline[seed]) for seed in by_seed.keys() & baseline.keys()]
        if pattern != "uniform" and len(pairs) > 1:
            ratio = ratio_interval(pairs)
            line += f"  {ratio.mean:.4f} of uniform's [{ratio.low:.4f}, {ratio.high:.4f}]"
        print(line, flush=True)


def main() -> int:
    """Makes the runs and prints the table; returns exit code 1 if a run fails or is stopped. Finished runs stay in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    names = [*PROGRAM_SUPPORTS, *PATTERNS]
    parser.add_argument("--patterns", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2], help="default: 42 1 2")
    parser.add_argument("--updates", type=int, default=600, help="updates of each run (default: %(default)s)")
    parser.add_argument("--eval_tokens", type=int, default=68_000, help="held-out tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after each run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"runs": []}
    if args.out.exists():
        figures = json.loads(args.out.read_text(encoding="utf-8"))
    figures |= {"device": platform.processor() or platform.machine(), "threads": args.threads, "versions": versions()}
    figures |= {"command": ["benchmarks/supports.py", *sys.argv[1:]], "date": date.today().isoformat()}
    done = {(run["pattern"], run["seed"], run["updates"]) for run in figures["runs"]}
    for seed in args.seeds:
        for pattern in args.patterns:
            if (pattern, seed, args.updates) in done:
                continue
            try:
                figures["runs"].append(train(pattern, seed, args.updates, args.eval_tokens))
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return 1
            args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            print_table([run for run in figures["runs"] if run["updates"] == args.updates])
    print_table([run for run in figures["runs"] if run["updates"] == args.updates])
    return 0


if __name__ == "__main__":
    sys.exit(main())
