"""Compares whole updates of every method with full-rank ones, or (--steps) the steps of several optimizers.

`python benchmarks/train.py [--configs 60m 350m] [--methods uniform block lowrank galore] [--optimizers adamw] [--batch_size 8]
[--sp_ratio S] [--linear_cache positions] [--rounds 5] [--warm_up 3] [--threads 1] [--device cpu] [--dtype bfloat16] [--compile]
[--steps] [--out FILE.json]`

Each update has one micro-batch of random tokens and uses the trainer's model, loss and optimizer. The method and
full-rank training run in two processes that take turns, --updates_per_round updates each, without waiting between them.

throughput  full-rank's seconds divided by the method's, median over the rounds. The first --warm_up updates are not counted,
            because a new process still allocates memory in them.
of floor    the fastest possible time of an update divided by the measured time. The fastest possible time is full-rank's, with
            its linears' time (measured separately) multiplied by the floor of benchmarks/layer.py and its optimizer step's time
            multiplied by the ratio of parameters. Not computed for GaLore, whose linears are dense.
mfu         floating-point operations that the full-rank model needs for the tokens, per second, divided by those of the fastest
            large matrix product of --dtype timed on the device (on a GPU use --peak_flops, 989e12 for an H100's dense bfloat16).

GaLore computes SVDs in the first update only, which is not counted. Its extra time, divided by --update_proj_gap, is added to
each update. Peak memory is that of the method's process.

--steps: the optimizers step the same parameters with the same random gradients, in turns in one process.
step        an optimizer's seconds divided by those of the first one of --optimizers, median over the rounds.
update      the same for a whole update: of these tokens, whose forward and backward pass are measured once per round with the
            first optimizer, and of 16,384 tokens, with the time of these passes scaled by the tokens.
products    floating-point operations of the orthogonalisation, 5 (4 m^2 n + 2 m^3) for each matrix with sides m <= n that Muon or
            Spectron steps, divided by model_flops of 16,384 tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from gpu.timing import pipelined_seconds, repeats_for
from layer import SETTINGS, Passes, Shape, floor, shapes_of
from memory import load_what_the_trainer_loads, time_steps, updater

from peft_pretraining.config.model_config import linear_shapes
from peft_pretraining.config.supports import SUPPORTS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.config.parameter_groups import group_of
from peft_pretraining.distributed.device import pick_device, resolve_dtype, set_allocator
from peft_pretraining.distributed.world import World
from peft_pretraining.optim.orthogonal import NUM_ITERATIONS
from peft_pretraining.plan.checks import check
from peft_pretraining.plan.plan import make_plan
from peft_pretraining.record.recorder import peak_memory_bytes
from peft_pretraining.run.build import build_updates
from peft_pretraining.run.folder import versions

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "full": ["--peft_model", "full"],
    "uniform": ["--peft_model", "sltrain", "--support", "uniform"],
    "block": ["--peft_model", "sltrain", "--support", "block"],
    "lowrank": ["--peft_model", "lowrank"],
    "galore": ["--peft_model", "galore"],
}
# Tokens of an update for which --steps scales forward and backward pass.
_LARGE_UPDATE = 16_384
# Support of the methods that replace nn.Linear.
SUPPORT_OF = {"uniform": "uniform", "block": "block", "lowrank": "none"}


def trainer_flags(config: str, method: str, optimizer: str, own: argparse.Namespace) -> list[str]:
    """Returns the trainer's flags for these settings."""
    rank, sparsity, _ = SETTINGS[config]
    flags = [
        *("--model_config", f"configs/llama_{config}.json", *METHODS[method], "--optimizer", optimizer),
        *("--batch_size", str(own.batch_size), "--max_length", str(own.max_length), "--dtype", own.dtype),
        *("--lr", "0.001", "--lora_alpha", "8", "--device", own.device, "--force"),
    ]
    if method != "full":
        flags += ["--rank", str(rank)]
    if method in ("uniform", "block"):
        flags += ["--sp_ratio", str(own.sp_ratio or sparsity), "--linear_cache", own.linear_cache]
    return [*flags, "--compile"] if own.compile else flags


def work(pipe: Connection, argv: list[str], threads: int) -> None:
    """Main function of a worker process: builds the run, sends facts about it, and answers requests until "end".

    A number of updates is answered with the seconds of each and of its optimizer step, "memory" with the peak in bytes.
    """
    set_allocator()
    torch.set_num_threads(threads)
    os.chdir(ROOT)
    args = parse_args(argv)
    device = pick_device(args.device, World())
    plan = make_plan(args, World(), resolve_dtype(args.dtype, device), device.type)
    load_what_the_trainer_loads()
    parts, update = updater(args, plan, device)
    stopwatch = time_steps(parts, device)
    facts = {"parameters": plan.parameters, "peak_predicted": plan.bytes["peak"]}
    pipe.send(facts | ({"update_proj_gap": args.update_proj_gap} if args.peft_model == "galore" else {}))
    while (order := pipe.recv()) != "end":
        if order == "memory":
            pipe.send(peak_memory_bytes(device))
        else:
            pipe.send((update(order), stopwatch.take() / order))


class Worker:
    """A process that makes updates on request."""

    def __init__(self, argv: list[str], threads: int):
        """Starts the process and waits until its model is built."""
        self.argv = argv
        self._pipe, other = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=work, args=(other, argv, threads))
        self._process.start()
        other.close()
        self.facts: dict[str, Any] = self._pipe.recv()

    def update(self, count: int = 1) -> tuple[float, float]:
        """Makes updates without waiting between them; returns the seconds of each and of its optimizer step, on average."""
        return self._ask(count)

    def peak(self) -> int:
        """Returns the process's peak memory so far, bytes."""
        return self._ask("memory")

    def _ask(self, order: str | int) -> Any:
        self._pipe.send(order)
        return self._pipe.recv()

    def end(self) -> None:
        """Ends the process."""
        self._pipe.send("end")
        self._process.join()


def seconds_of_linears(config: str, rows: int, dtype: torch.dtype, device: torch.device, rounds: int) -> float:
    """Returns the seconds of forward and backward pass of all dense linears in the model's decoder layers."""
    total = 0.0
    layers = load_model_config(str(ROOT / f"configs/llama_{config}.json")).num_hidden_layers
    for shape in shapes_of(config, rows):
        x = torch.randn(rows, shape.in_features, dtype=dtype, device=device, requires_grad=True)
        grad = torch.randn(rows, shape.out_features, dtype=dtype, device=device)
        layer = torch.nn.Linear(shape.in_features, shape.out_features, bias=False, dtype=dtype, device=device)
        step = Passes(layer, x, grad)
        repeats = repeats_for(step, device, 0.05) if device.type == "cuda" else 1
        times = [pipelined_seconds(step, device, repeats) for _ in range(rounds + 1)]
        total += layers * shape.count * statistics.median(times[1:])
    return total


def floor_of_linears(config: str, method: str, rows: int, sparsity: float | None) -> float:
    """Returns the floor of a decoder layer's seven linears together, relative to dense ones; see benchmarks/layer.py."""
    shapes = shapes_of(config, rows, sparsity)
    work_of = {shape: shape.count * shape.entries for shape in shapes}
    return sum(floor(shape, SUPPORT_OF[method], _nnz(method, shape)) * work_of[shape] for shape in shapes) / sum(work_of.values())


def _nnz(method: str, shape: Shape) -> int:
    kind = SUPPORT_OF[method]
    return 0 if kind == "none" else SUPPORTS[kind].nonzeros(shape.out_features, shape.in_features, shape.sparsity)


def model_flops(config: str, batch_size: int, length: int) -> float:
    """Returns the floating-point operations of the full-rank model's update.

    6 per token and weight of a matrix product, and 12 L h T per token for attention, halved because of the causal mask
    (L layers, h hidden size, T sequence length).
    """
    cfg = load_model_config(str(ROOT / f"configs/llama_{config}.json"))
    weights = cfg.num_hidden_layers * sum(o * i for o, i in linear_shapes(cfg)) + cfg.vocab_size * cfg.hidden_size
    attention = 12 * cfg.num_hidden_layers * cfg.hidden_size * length / 2
    return batch_size * length * (6 * weights + attention)


def fastest_product(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the floating-point operations per second of a 4096^3 product, the best of five timings."""
    left, right = (torch.randn(4096, 4096, dtype=dtype, device=device) for _ in range(2))
    times = [pipelined_seconds(lambda: left @ right, device, 20 if device.type == "cuda" else 1) for _ in range(5)]
    return 2 * 4096**3 / min(times)


def compare(config: str, method: str, optimizer: str, full: Worker, own: argparse.Namespace, peak_flops: float) -> dict[str, Any]:
    """Measures a method and full-rank training in turns, after the warm-up updates; returns the method's row."""
    worker = Worker(trainer_flags(config, method, optimizer, own), own.threads)
    device = torch.device(own.device)
    full.update()
    first, _ = worker.update()
    for _ in range(own.warm_up - 1):
        worker.update()
    linears, times = [], {"full": [], "method": []}
    for _ in range(own.rounds):
        for name, process in (("full", full), ("method", worker)):
            times[name].append(process.update(own.updates_per_round))
        if method in SUPPORT_OF and not optimizer.endswith("_per_layer"):
            rows, dtype = own.batch_size * own.max_length, getattr(torch, own.dtype)
            linears.append(seconds_of_linears(config, rows, dtype, device, 1))
    if "update_proj_gap" in worker.facts:
        times["method"] = _with_projections(first, times["method"], worker.facts["update_proj_gap"])
    row = _figures(config, method, own, times, peak_flops)
    if linears:
        share = worker.facts["parameters"]["total"] / full.facts["parameters"]["total"]
        floors = floor_of_linears(config, method, own.batch_size * own.max_length, own.sp_ratio)
        row |= {"seconds_of_linears": linears, "floor_of_linears": floors}
        least = [
            whole - alone - step + alone * floors + step * share
            for (whole, step), alone in zip(times["full"], linears, strict=True)
        ]
        row["of_floor"] = statistics.median(one / taken for one, (taken, _) in zip(least, times["method"], strict=True))
    row |= {"optimizer": optimizer, "peak_measured": worker.peak(), **worker.facts, "arguments": worker.argv}
    worker.end()
    return row


def _with_projections(first: float, times: list[tuple[float, float]], gap: int) -> list[tuple[float, float]]:
    """Adds to each update its share of the first update's SVDs, which are used for `gap` updates."""
    share = max(0.0, first - statistics.median(whole for whole, _ in times)) / gap
    return [(whole + share, step + share) for whole, step in times]


def _figures(
    config: str,
    method: str,
    own: argparse.Namespace,
    times: dict[str, list[tuple[float, float]]],
    peak_flops: float,
) -> dict[str, Any]:
    ratios = [one / other for (one, _), (other, _) in zip(times["full"], times["method"], strict=True)]
    flops = model_flops(config, own.batch_size, own.max_length)
    medians = {name: statistics.median(seconds for seconds, _ in times[name]) for name in times}
    return {
        "config": config,
        "method": method,
        "throughput": statistics.median(ratios),
        "throughput_each": ratios,
        "mfu": flops / medians["method"] / peak_flops,
        "mfu_full": flops / medians["full"] / peak_flops,
        "seconds_full": [seconds for seconds, _ in times["full"]],
        "seconds": [seconds for seconds, _ in times["method"]],
        "seconds_full_step": [step for _, step in times["full"]],
        "seconds_step": [step for _, step in times["method"]],
        "tokens": own.batch_size * own.max_length,
    }


def compare_steps(config: str, method: str, own: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the steps of all --optimizers in turns; returns a row for each. Raises ConfigError.

    An optimizer that steps pairs of factors is left out with methods that have none.
    """
    device = pick_device(own.device, World())
    chosen = {name: parse_args(trainer_flags(config, method, name, own)) for name in own.optimizers}
    if method not in SUPPORT_OF:
        chosen = {name: args for name, args in chosen.items() if not OPTIMIZERS[args.optimizer].steps_pairs}
    for name, args in chosen.items():
        check(args, World())
        if args.per_layer:
            raise ConfigError([f"--steps: {name} steps in the backward pass; name {args.optimizer}"])
    if not chosen:
        raise ConfigError([f"--steps: {', '.join(own.optimizers)} with {method}: it has no pairs of factors; add adamw"])
    first, args = next(iter(chosen.items()))
    parts, update = updater(args, make_plan(args, World(), resolve_dtype(own.dtype, device), device.type), device)
    parameters = {name: parameter for name, parameter in parts.model.named_parameters() if parameter.requires_grad}
    steps = {name: build_updates(args, parts.model, World(), device).optimizer for name, args in chosen.items()}
    generator = torch.Generator(device).manual_seed(1)
    gradients = {p: torch.empty_like(p).normal_(std=1e-3, generator=generator) for p in parameters.values()}
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, "update")}
    for number in range(own.warm_up + own.rounds):
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        times = {name: pipelined_seconds(optimizer.step, device) for name, optimizer in steps.items()}
        times["update"] = update()
        for name, taken in times.items():
            seconds[name] += [taken] * (number >= own.warm_up)
    products = sum(_orthogonalisation(*p.shape) for name, p in parameters.items() if group_of(name, p.dim()) == "matrix")
    return [_step_row(config, method, own, name, first, seconds, products) for name in steps]


def _orthogonalisation(rows: int, columns: int) -> int:
    """Floating-point operations of Newton-Schulz: X X^T, its square, and a product with X in each iteration."""
    short, long = sorted((rows, columns))
    return NUM_ITERATIONS * (4 * short**2 * long + 2 * short**3)


def _step_row(
    config: str, method: str, own: argparse.Namespace, name: str, first: str, seconds: dict[str, list[float]], products: int
) -> dict[str, Any]:
    steps = [one / base for one, base in zip(seconds[name], seconds[first], strict=True)]
    tokens = own.batch_size * own.max_length
    updates = {
        size: statistics.median(
            1 + (one - base) / (base + (whole - base) * size / tokens)
            for one, base, whole in zip(seconds[name], seconds[first], seconds["update"], strict=True)
        )
        for size in (tokens, _LARGE_UPDATE)
    }
    orthogonal = products if OPTIMIZERS[name].matrix_bytes is not None else 0
    return {
        "config": config,
        "method": method,
        "optimizer": name,
        "against": first,
        "dtype": own.dtype,
        "tokens": tokens,
        "step": statistics.median(steps),
        "update": updates[tokens],
        "update_16k": updates[_LARGE_UPDATE],
        "products_16k": orthogonal / model_flops(config, _LARGE_UPDATE // 256, 256),
        "orthogonalisation_flops": orthogonal,
        "step_each": steps,
        "seconds_step": seconds[name],
        "seconds_update": seconds["update"],
        "arguments": trainer_flags(config, method, name, own),
    }


def print_step_row(row: dict[str, Any]) -> None:
    """Prints a line of the table of --steps."""
    spread = f"[{min(row['step_each']):.2f}, {max(row['step_each']):.2f}]"
    print(
        f"{row['config']:<5} {row['method']:<8} {row['optimizer']:<12} {row['dtype']:<9} relative to {row['against']}: "
        f"step {row['step']:.2f} {spread}, update of {row['tokens']:,} tokens {row['update']:.3f}, "
        f"of 16,384 {row['update_16k']:.3f}; products {100 * row['products_16k']:.1f} %",
        flush=True,
    )


def print_row(row: dict[str, Any], full_peak: int) -> None:
    """Prints a line of the table."""
    of_floor = f"{row['of_floor']:.2f}" if "of_floor" in row else "-"
    print(
        f"{row['config']:<5} {row['method']:<8} {row['optimizer']:<19} {row['throughput']:.3f} of full-rank's tokens/s, "
        f"of floor {of_floor}, mfu {row['mfu']:.2f} (full {row['mfu_full']:.2f}), "
        f"peak {row['peak_measured'] / 2**30:.2f} GiB (full {full_peak / 2**30:.2f})",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--configs", nargs="+", choices=list(SETTINGS), default=["60m", "130m", "350m"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all but full (with --steps: full, uniform)")
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], help="as --optimizer of the trainer")
    parser.add_argument("--steps", action="store_true", help="compare the steps of --optimizers, each with the first one's")
    parser.add_argument("--batch_size", type=int, help="sequences per micro-batch (default: 8; 64 on a GPU)")
    parser.add_argument("--sp_ratio", type=float, help="share of nonzeros (default: as published)")
    parser.add_argument("--linear_cache", default="auto", help="of uniform and block, as for the trainer (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=256, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--updates_per_round", type=int, help="updates in a row, timed together (default: 1; 10 on a GPU)")
    parser.add_argument("--warm_up", type=int, default=3, help="updates before the rounds, at least 1 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of parameters and states")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as in the trainer")
    parser.add_argument("--peak_flops", type=float, help="peak operations per second, for mfu (default: a timed product)")
    parser.add_argument("--out", type=Path, help="JSON file for everything measured, written after each row")
    own = parser.parse_args()
    # One update of 2,048 tokens would measure how fast the host launches kernels.
    own.batch_size = own.batch_size or (64 if own.device == "cuda" else 8)
    own.updates_per_round = own.updates_per_round or (10 if own.device == "cuda" else 1)
    return own


def main() -> int:
    """Measures and prints; returns exit code 2 for invalid arguments."""
    own = arguments()
    if own.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU; use --device cpu", file=sys.stderr)
        return 2
    set_allocator()
    torch.set_num_threads(own.threads)
    figures: dict[str, Any] = {
        "command": ["benchmarks/train.py", *sys.argv[1:]],
        "device": torch.cuda.get_device_name() if own.device == "cuda" else platform.processor() or platform.machine(),
        "threads": own.threads,
        "updates_per_round": own.updates_per_round,
        "versions": versions(),
        "date": date.today().isoformat(),
        "rows": [],
    }
    if not own.steps:
        figures["peak_flops"] = own.peak_flops or fastest_product(torch.device(own.device), getattr(torch, own.dtype))
    try:
        for row in rows_of_steps(own) if own.steps else rows_of_updates(own, figures["peak_flops"]):
            figures["rows"].append(row)
            if own.out is not None:
                own.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def rows_of_updates(own: argparse.Namespace, peak_flops: float) -> Iterator[dict[str, Any]]:
    """Measures, prints and yields the row of every method with every optimizer. Raises ConfigError."""
    for config in own.configs:
        for optimizer in own.optimizers:
            flags = trainer_flags(config, "full", optimizer, own)
            check(parse_args(flags), World())
            full = Worker(flags, own.threads)
            for method in own.methods or [name for name in METHODS if name != "full"]:
                row = compare(config, method, optimizer, full, own, peak_flops)
                print_row(row, full.peak())
                yield row | {"peak_measured_full": full.peak()}
            full.end()


def rows_of_steps(own: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures, prints and yields the row of every optimizer's step with every method. Raises ConfigError."""
    for config in own.configs:
        for method in own.methods or ("full", "uniform"):
            for row in compare_steps(config, method, own):
                print_step_row(row)
                yield row


if __name__ == "__main__":
    sys.exit(main())
