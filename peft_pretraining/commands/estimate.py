"""`python -m peft_pretraining estimate`: predicts parameters, memory and communication of a run."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.command_line import add_flags, arguments_from, given_flags, parse_memory, with_config_file
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.communication import format_scaling, format_wire, wire_figures
from peft_pretraining.memory.counts import paper_estimate, parameter_counts
from peft_pretraining.methods import METHODS, has_effect
from peft_pretraining.plan.checks import check

if TYPE_CHECKING:
    from peft_pretraining.plan.plan import Plan

HELP = (
    "predict a run's parameters, memory by class and at the peak, memory by the paper's convention, and communication between "
    "processes"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags and every flag of the trainer; flags that do not affect memory have no effect."""
    parser.add_argument("--json", action="store_true", help="print JSON: parameters, bytes, paper, wire")
    parser.add_argument(
        "--device_type",
        choices=("cpu", "cuda"),
        help="device of the run (default: that of --device, cuda with --memory, else cpu)",
    )
    parser.add_argument("--world", type=int, default=1, help="number of processes of the run (default: 1)")
    parser.add_argument("--bandwidth", type=float, help="network bandwidth of a process, 10^9 bytes per second")
    parser.add_argument(
        "--rate", type=float, help="measured tokens per second of one device; needs --bandwidth, predicts scaling"
    )
    parser.add_argument("--fit", metavar="MEMORY", help="list flags that fit in this much memory, such as 8GB, least work first")
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
    batch = {"batch_size": 1}
    total, accumulation = given.get("total_batch_size"), given.get("gradient_accumulation")
    if isinstance(total, int) and isinstance(accumulation, int) and accumulation > 0:
        batch["batch_size"] = max(1, total // (accumulation * args.world))
    values = arguments_from({**batch, **(method.stand_ins if method else {}), **given})
    for line in check(values, World(size=args.world)).notices:
        print(f"notice: {line}", file=sys.stderr)
    values = replace(values, given=frozenset(given))
    if args.fit is not None:
        return _print_fits(values, args)
    figures = estimate(values, device_type(args.device_type, values), args.world, args.bandwidth, args.rate)
    print(json.dumps(figures) if args.json else format_estimate(figures))
    return 0


def _print_fits(values: Arguments, args: argparse.Namespace) -> int:
    """Prints the combinations of flags that fit in --fit; returns 0, or 1 if none fits. Raises ValueError: --fit is no size."""
    from peft_pretraining.commands.fit import fits, format_fits
    from peft_pretraining.distributed.device import default_dtype
    from peft_pretraining.plan.advice import Advisor
    from peft_pretraining.plan.plan import make_plan

    try:
        limit = parse_memory(args.fit)
    except ValueError:
        raise ValueError(
            f"--fit {args.fit}: write a size in bytes with its unit, such as 8GB (10^9 bytes) or 8GiB (2^30)"
        ) from None
    device = device_type(args.device_type, replace(values, memory=limit))
    plan = make_plan(values, World(size=args.world), default_dtype(device), device)
    choices = fits(Advisor(values, plan, device), limit)
    if args.json:
        rows = [
            {"work": fit.work, "peak": fit.proposal.peak, "batch_size": fit.batch_size, "flags": fit.proposal.text}
            for fit in choices
        ]
        print(json.dumps(rows))
    else:
        print(format_fits(choices, values, limit))
    return 0 if choices else 1


def device_type(name: str | None, args: Arguments) -> str:
    """The type of the run's device: cpu or cuda. name: of --device_type. Raises ValueError where --device is another one."""
    of_device = None if args.device == "auto" else args.device.partition(":")[0]
    if name is not None and of_device not in (None, name):
        raise ValueError(f"--device_type {name} with --device {args.device}: name one of them")
    return name or of_device or ("cpu" if args.memory is None else "cuda")


def estimate(
    args: Arguments,
    device_type: str,
    world_size: int,
    bandwidth: float | None = None,
    tokens_per_s: float | None = None,
) -> dict[str, Any]:
    """Predicts {"parameters", "bytes", "paper", "wire", "assumed", "device"}: elements, bytes per process, 10^9 bytes by the
    paper's convention, communication between processes (bandwidth and tokens_per_s: see communication.wire_figures), the values
    that memory depends on, and whether the run fits into --memory ("fits": None without it)."""
    from peft_pretraining.distributed.device import default_dtype, planned_memory
    from peft_pretraining.plan.advice import memory_problems
    from peft_pretraining.plan.plan import make_plan, setting_of

    world = World(size=world_size)
    memory = None if args.memory is None else planned_memory(device_type, args.memory, world)
    plan = make_plan(args, world, default_dtype(device_type), device_type, memory)
    counts = parameter_counts(plan.model, method=args.peft_model, rank=args.rank, sparsity=args.sp_ratio, support=args.support)
    device: dict[str, Any] = {"type": device_type, "memory": args.memory, "fits": None, "problems": []}
    if memory is not None:
        device["problems"] = memory_problems(plan, args, memory)
        device["fits"] = not device["problems"]
    return {
        "parameters": plan.parameters,
        "bytes": plan.bytes,
        "paper": paper_estimate(counts, args.peft_model, args.optimizer),
        "wire": wire_figures(setting_of(plan, args, device_type), bandwidth, tokens_per_s),
        "assumed": _assumptions(args, plan),
        "device": device,
    }


def _assumptions(args: Arguments, plan: Plan) -> dict[str, Any]:
    """The values, by flag, of the flags that change memory most, where neither they nor a flag that implies them is given."""
    method = [name for name in ("rank", "sp_ratio") if has_effect(name, args.peft_model)]
    names = ["peft_model", *method, "optimizer", "max_length", "per_layer", "activation_checkpointing"]
    values = {name: getattr(args, name) for name in names if getattr(args, name) == getattr(Arguments(), name)}
    batch = {"batch_size": plan.batch_size} | (
        {} if "gradient_accumulation" in args.given else {"total_batch_size": plan.total_batch_size}
    )
    return {name: value for name, value in {"dtype": plan.dtype, **batch, **values}.items() if name not in args.given}


def format_estimate(figures: dict[str, Any]) -> str:
    """Formats the estimate as a table for a terminal."""
    device = figures["device"]
    flags = [f"no --{name}" if not value else f"--{name} {value}" for name, value in figures["assumed"].items()]
    lines = [f"assumed for flags that are not given: {', '.join(flags) or 'nothing'}; device {device['type']}"]
    lines += [f"{name:<12}{value:>18,} parameters" for name, value in figures["parameters"].items()]
    lines += [f"{name:<12}{value:>18,} bytes {value / 2**30:>9.2f} GiB" for name, value in figures["bytes"].items()]
    if device["fits"] is not None:
        verdict = "fits" if device["fits"] else "does NOT fit"
        lines.append(f"{verdict} in the {device['memory'] / 2**30:.1f} GiB of a {device['type']} device")
        lines += [f"warning: {problem}" for problem in device["problems"]]
    paper = figures["paper"]
    lines.append(
        f"by the paper's convention: parameters {paper['parameters_G']:.2f}G + optimizer {paper['optimizer_G']:.2f}G "
        f"= {paper['total_G']:.2f}G"
    )
    lines.append(f"on the wire: {format_wire(figures['wire'])}")
    scaling = format_scaling(figures["wire"])
    return "\n".join([*lines, scaling] if scaling else lines)
