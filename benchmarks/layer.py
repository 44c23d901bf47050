"""Times the forward and backward pass of single linears relative to nn.Linear, for every path, support and shape of the configs.

`python benchmarks/layer.py [--configs 60m 350m 1b 7b] [--tokens N] [--sp_ratio S] [--threads 1] [--dtype bfloat16] [--rounds 5]
[--device cpu] [--out FILE.json]`

All variants of a shape take turns in one process; a round's times are divided by nn.Linear's time of that round. The output is
the median ratio and, in the JSON, quartiles. On a GPU a variant's turn is as many calls as take about 50 ms, without waiting
between them, because a single call would measure how fast the host launches kernels. "floor" is the ratio of multiplications to
the dense layer's, for T tokens, rank r, weight d x p: 1 + 8 r / (6 T) if W is built, 1 + r (d + p) / (d p) if S is multiplied as
a dense matrix, and (r (d + p) + nnz) / (d p) if S is blocks. "cached": with what --linear_cache keeps. "chosen" is the path of
`--linear_path auto`, "slower" its excess over the fastest path. "all" is the seven linears of a decoder layer together.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gpu.timing import pipelined_seconds, repeats_for
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.config.model_config import linear_shapes, load_model_config
from peft_pretraining.distributed.device import set_allocator
from peft_pretraining.run.folder import versions
from sparse_lora import SparseLowRankLinear
from sparse_lora.cache import cache_positions
from sparse_lora.functional import PATHS, cheaper_path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# (rank, share of nonzeros, tokens per micro-batch); the first two as published (arXiv 2406.02214, tables 2 and 4).
SETTINGS = {
    "60m": (128, 0.03, 4096),
    "130m": (256, 0.03, 4096),
    "350m": (256, 0.03, 4096),
    "1b": (512, 0.03, 4096),
    "7b": (1024, 0.05, 2048),
}
# Rows of the input on a GPU, for which 4,096 are too few to keep it busy.
GPU_TOKENS = 16384
SUPPORTS = ("uniform", "block", "none")
# What --linear_cache keeps for uniform supports; measured with W built, without the time in which it is filled.
CACHES = ("positions", "weights")


@dataclass(frozen=True)
class Shape:
    """A weight (out, in) that a decoder layer has `count` times, with the rank, sparsity and tokens of its measurement."""

    out_features: int
    in_features: int
    count: int
    rank: int
    sparsity: float
    tokens: int

    @property
    def entries(self) -> int:
        """Number of entries of the weight."""
        return self.out_features * self.in_features


def shapes_of(config: str, tokens: int | None, sparsity: float | None = None) -> list[Shape]:
    """Returns the distinct linears of a config's decoder layer. Raises KeyError for a config without settings.

    tokens, sparsity: None for those of SETTINGS.
    """
    rank, usual_sparsity, usual = SETTINGS[config]
    all_shapes = linear_shapes(load_model_config(str(CONFIGS / f"llama_{config}.json")))
    others = (rank, sparsity or usual_sparsity, tokens or usual)
    return [Shape(*shape, all_shapes.count(shape), *others) for shape in dict.fromkeys(all_shapes)]


@dataclass(frozen=True)
class Passes:
    """A call makes a forward and a backward pass of a layer, with gradients of x and of all parameters."""

    layer: nn.Module
    x: Tensor
    grad: Tensor

    def __call__(self) -> None:
        torch.autograd.grad(self.layer(self.x), [self.x, *self.layer.parameters()], self.grad)


def variants(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[tuple[str, str], Passes]:
    """Returns the passes of each (support, path); ("dense", "") is nn.Linear."""
    x = torch.randn(shape.tokens, shape.in_features, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(shape.tokens, shape.out_features, dtype=dtype, device=device)
    dense = nn.Linear(shape.in_features, shape.out_features, bias=False, dtype=dtype, device=device)
    steps = {("dense", ""): Passes(dense, x, grad)}
    for support in SUPPORTS:
        sparsity = 0.0 if support == "none" else shape.sparsity
        kind = "uniform" if support == "none" else support
        for path in PATHS:
            layer = SparseLowRankLinear(
                shape.in_features,
                shape.out_features,
                shape.rank,
                sparsity,
                support=kind,
                path=path,
                seed=1,
                dtype=dtype,
                device=device,
            )
            steps[support, path] = Passes(layer, x, grad)
    for kept in CACHES:
        layer = copy.deepcopy(steps["uniform", "materialised"].layer)
        cache_positions(layer)
        if kept == "weights":
            layer.cached_weight = layer.dense_weight().detach()
        steps["uniform", kept] = Passes(layer, x, grad)
    return steps


def time_in_turns(
    steps: dict[tuple[str, str], Passes], rounds: int, device: torch.device, seconds: float = 0.05
) -> dict[tuple[str, str], list[float]]:
    """Returns the seconds of each step in each round, after a warm-up; on a GPU of calls in a row that take `seconds`."""
    repeats = {name: repeats_for(step, device, seconds) if device.type == "cuda" else 1 for name, step in steps.items()}
    times: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            taken = pipelined_seconds(step, device, repeats[name])
            if number:
                times[name].append(taken)
    return times


def floor(shape: Shape, support: str, nnz: int) -> float:
    """Returns the smaller number of multiplications of the two paths, relative to the dense layer's."""
    low_rank = shape.rank * (shape.out_features + shape.in_features) / shape.entries
    sparse = {"uniform": 1.0, "block": nnz / shape.entries, "none": 0.0}[support]
    return min(low_rank + sparse, 1 + 8 * shape.rank / (6 * shape.tokens))


def measure(
    shape: Shape, steps: dict[tuple[str, str], Passes], device: torch.device, rounds: int, seconds_each: float = 0.05
) -> dict[str, Any]:
    """Measures all variants of one shape, as `variants` returns them; returns the shape's row."""
    seconds = time_in_turns(steps, rounds, device, seconds_each)
    dense = seconds.pop(("dense", ""))
    row: dict[str, Any] = {"out": shape.out_features, "in": shape.in_features, "count": shape.count}
    row |= {"rank": shape.rank, "sparsity": shape.sparsity, "tokens": shape.tokens}
    row |= {
        "dense_seconds": dense,
        "dense_flops_per_second": 6 * shape.tokens * shape.entries / statistics.median(dense),
    }
    for support in SUPPORTS:
        nnz = _nnz(shape, support)
        ratios = {path: [one / whole for one, whole in zip(seconds[support, path], dense, strict=True)] for path in PATHS}
        medians = {path: statistics.median(ratios[path]) for path in PATHS}
        sizes = (shape.tokens, shape.out_features, shape.in_features, shape.rank)
        chosen = cheaper_path(*sizes, support, nnz, device.type, steps["uniform", "factored"].x.dtype.itemsize)
        row[support] = {
            "floor": floor(shape, support, nnz),
            "chosen": chosen,
            "ratio": medians[chosen],
            "slower_than_best": medians[chosen] / min(medians.values()) - 1,
            "paths": {path: _spread(ratios[path]) for path in PATHS},
            "seconds": {path: seconds[support, path] for path in PATHS},
        }
    cached = {kept: [one / whole for one, whole in zip(seconds["uniform", kept], dense, strict=True)] for kept in CACHES}
    row["uniform"]["cached"] = {kept: _spread(ratios) for kept, ratios in cached.items()}
    return row


def _nnz(shape: Shape, support: str) -> int:
    if support == "none":
        return 0
    with torch.device("meta"):
        sizes = (shape.in_features, shape.out_features, shape.rank, shape.sparsity)
        layer = SparseLowRankLinear(*sizes, support=support)
    return 0 if layer.support is None else layer.support.nnz


def _spread(ratios: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {"median": statistics.median(ratios), "lower_quartile": quartiles[0], "upper_quartile": quartiles[2]}


def whole_layer(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the ratios of all linears of a decoder layer together: of sums of median seconds, and of multiplications."""
    dense = sum(row["count"] * statistics.median(row["dense_seconds"]) for row in rows)
    dense_products = sum(row["count"] * row["out"] * row["in"] for row in rows)
    ratios = {}
    for support in SUPPORTS:
        seconds = sum(row["count"] * row[support]["ratio"] * statistics.median(row["dense_seconds"]) for row in rows)
        products = sum(row["count"] * row["out"] * row["in"] * row[support]["floor"] for row in rows)
        ratios[support] = {"ratio": seconds / dense, "floor": products / dense_products}
    return ratios


def print_config(config: str, rows: list[dict[str, Any]], together: dict[str, Any]) -> None:
    """Prints a line per shape and support."""
    for row in rows:
        print(f"{config} {row['out']} x {row['in']}, r {row['rank']}, {row['tokens']} tokens")
        for support in SUPPORTS:
            figures = row[support]
            paths = ", ".join(f"{path} {figures['paths'][path]['median']:.3f}" for path in PATHS)
            print(
                f"  {support:<8} {figures['ratio']:.3f} of nn.Linear (floor {figures['floor']:.3f}), chosen {figures['chosen']}, "
                f"slower by {100 * figures['slower_than_best']:.0f} %: {paths}"
            )
        cached = row["uniform"]["cached"]
        print("  uniform, materialised, with cached " + ", ".join(f"{kept} {cached[kept]['median']:.3f}" for kept in CACHES))
    print(
        f"{config} all: " + ", ".join(f"{s} {together[s]['ratio']:.3f} (floor {together[s]['floor']:.3f})" for s in SUPPORTS),
        flush=True,
    )


def main() -> int:
    """Measures and prints; returns exit code 2 for invalid arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--configs", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="default: all")
    parser.add_argument("--tokens", type=int, help="rows of the input (default: 4096, 2048 for 7b; 16384 on a GPU)")
    parser.add_argument("--sp_ratio", type=float, help="share of nonzeros (default: as published)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU; use --device cpu", file=sys.stderr)
        return 2
    set_allocator()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    figures: dict[str, Any] = {
        "command": ["benchmarks/layer.py", *sys.argv[1:]],
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "threads": args.threads,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "versions": versions(),
        "date": date.today().isoformat(),
        "configs": {},
    }
    for config in args.configs:
        rows = []
        for shape in shapes_of(config, args.tokens or (GPU_TOKENS if args.device == "cuda" else None), args.sp_ratio):
            rows.append(measure(shape, variants(shape, getattr(torch, args.dtype), device), device, args.rounds))
        figures["configs"][config] = {"shapes": rows, "all": whole_layer(rows)}
        print_config(config, rows, figures["configs"][config]["all"])
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
