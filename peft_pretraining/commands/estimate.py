"""`python -m peft_pretraining estimate`: predicts parameters, memory and communication of a run."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.command_line import add_flags, arguments_from, given_flags, with_config_file
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.communication import format_scaling, format_wire, wire_figures
from peft_pretraining.memory.counts import paper_estimate, parameter_counts
from peft_pretraining.methods import METHODS
from peft_pretraining.plan.checks import check

HELP = (
    "predict a run's parameters, memory by class and at the peak, memory by the paper's convention, and communication between "
    "processes"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags and every flag of the trainer; flags that do not affect memory have no effect."""
    parser.add_argument("--json", action="store_true", help="print JSON: parameters, bytes, paper, wire")
    parser.add_argument("--device_type", default="cpu", choices=("cpu", "cuda"), help="device of the run (default: cpu)")
    parser.add_argument("--world", type=int, default=1, help="number of processes of the run (default: 1)")
    parser.add_argument("--bandwidth", type=float, help="network bandwidth of a process, 10^9 bytes per second")
    parser.add_argument(
        "--rate", type=float, help="measured tokens per second of one device; needs --bandwidth, predicts scaling"
    )
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the estimate. Raises ConfigError or ValueError."""
    given = with_config_file(given_flags(args))
    if args.world < 1:
        raise ValueError(f"--world {args.world}: must be at least 1")
    for name in ("bandwidth", "rate"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: must be above 0 and finite")
    if args.rate is not None and args.bandwidth is None:
        raise ValueError(f"--rate {args.rate:g}: needs --bandwidth, in 10^9 bytes per second, to predict scaling")
    # Stand-ins fill required flags of the method that do not affect memory.
    method = METHODS.get(str(given.get("peft_model")).lower())
    values = arguments_from({"batch_size": 1, **(method.stand_ins if method else {}), **given})
    for line in check(values, World(size=args.world)).notices:
        print(f"notice: {line}", file=sys.stderr)
    figures = estimate(values, args.device_type, args.world, args.bandwidth, args.rate)
    print(json.dumps(figures) if args.json else format_estimate(figures))
    return 0


def estimate(
    args: Arguments,
    device_type: str,
    world_size: int,
    bandwidth: float | None = None,
    tokens_per_s: float | None = None,
) -> dict[str, Any]:
    """Predicts {"parameters", "bytes", "paper", "wire"}: elements, bytes per process, 10^9 bytes by the paper's convention, and
    communication between processes (bandwidth and tokens_per_s: see communication.wire_figures)."""
    from peft_pretraining.plan.plan import make_plan, setting_of

    default = "bfloat16" if device_type == "cuda" else "float32"
    plan = make_plan(args, World(size=world_size), default, device_type)
    counts = parameter_counts(plan.model, method=args.peft_model, rank=args.rank, sparsity=args.sp_ratio, support=args.support)
    return {
        "parameters": plan.parameters,
        "bytes": plan.bytes,
        "paper": paper_estimate(counts, args.peft_model),
        "wire": wire_figures(setting_of(plan, args, device_type), bandwidth, tokens_per_s),
    }


def format_estimate(figures: dict[str, Any]) -> str:
    """Formats the estimate as a table for a terminal."""
    lines = [f"{name:<12}{value:>18,} parameters" for name, value in figures["parameters"].items()]
    lines += [f"{name:<12}{value:>18,} bytes {value / 2**30:>9.2f} GiB" for name, value in figures["bytes"].items()]
    paper = figures["paper"]
    lines.append(
        f"by the paper's convention: parameters {paper['parameters_G']:.2f}G + optimizer {paper['optimizer_G']:.2f}G "
        f"= {paper['total_G']:.2f}G"
    )
    lines.append(f"on the wire: {format_wire(figures['wire'])}")
    scaling = format_scaling(figures["wire"])
    return "\n".join([*lines, scaling] if scaling else lines)
