"""The plan as text, and the messages about memory that does not suffice."""

from __future__ import annotations

import math

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.model_config import linear_shapes
from peft_pretraining.distributed.device import DeviceMemory, cpu_has_bfloat16
from peft_pretraining.memory.account import CLASSES
from peft_pretraining.memory.communication import format_wire, wire_figures
from peft_pretraining.memory.savings import fitting_flags, savings
from peft_pretraining.methods import METHODS
from peft_pretraining.plan.plan import GIB, Plan, setting_of


def format_plan(plan: Plan, args: Arguments, source: str, memory_of_device: DeviceMemory | None) -> str:
    """The plan as --dry_run prints it. `source` describes the data; `memory_of_device` is what is available, if known."""
    counts, method = plan.parameters, METHODS[args.peft_model]
    restart = method.restart(args)
    share = f" ({counts['total'] / plan.full_rank_parameters:.0%} of full-rank {plan.full_rank_parameters:,})"
    length = (
        f"until {plan.max_train_tokens:,} tokens of text, at least {plan.num_training_steps:,} updates"
        if plan.max_train_tokens is not None
        else f"{plan.num_training_steps:,} updates"
    )
    positions = plan.num_training_steps * plan.tokens_per_update
    rows = [
        ("model", f"{plan.model.name}, {args.peft_model}, {plan.dtype}"),
        ("parameters", f"{counts['total']:,}{share if method.replaces_linears else ''}"),
        (
            "",
            f"dense {counts['dense']:,} + low-rank {counts['low_rank']:,} + sparse {counts['sparse']:,}{_frozen(plan, args)}",
        ),
        ("length", f"{length}, {positions:,} positions of {args.max_length}-token sequences"),
        (
            "batch",
            f"{plan.total_batch_size} sequences = {plan.batch_size} x {plan.gradient_accumulation} micro-batches "
            f"x {plan.world_size} process{'es' if plan.world_size > 1 else ''}; {plan.tokens_per_update:,} positions per update",
        ),
        (
            "optimizer",
            f"{args.optimizer}{method.optimizer_text(args)}, {_schedule_text(args)}{restart.text if restart else ''}",
        ),
        ("data", f"{source}, {'packed' if args.packing else 'padded'}, {plan.data_lanes} lanes"),
        ("run folder", str(plan.save_dir)),
        ("memory", " + ".join(f"{name} {plan.bytes[name] / GIB:.2f}" for name in CLASSES if plan.bytes[name]) + " GiB"),
        ("", _peak_text(plan, memory_of_device)),
    ]
    if args.per_layer and plan.gradient_accumulation > 1:
        kept = f"{plan.bytes['gradients'] / GIB:.2f} GiB of gradients stay between its {plan.gradient_accumulation} micro-batches"
        rows.append(("per-layer", f"steps in the last micro-batch of an update; {kept}"))
    if plan.world_size > 1:
        rows.append(("wire", format_wire(wire_figures(setting_of(plan, args, "cpu"), None, None))))
    lines = [f"{name:<12}{text}" for name, text in rows]
    lines += [f"warning: {text}" for text in plan.warnings]
    if memory_of_device is not None and memory_of_device.device_type == "cpu":
        lines += [f"warning: {text}" for text in _slow_dtype(plan)]
    if memory_of_device is not None and plan.bytes["peak"] > memory_of_device.num_bytes:
        lines += [f"warning: {text}" for text in memory_problems(plan, args, memory_of_device)]
    return "\n".join(lines)


def _schedule_text(args: Arguments) -> str:
    """The learning rate over the run, e.g. "peak lr 0.1 after 1,100 warm-up updates, cosine decay to 0.01"."""
    start = f"after {args.warmup_steps:,} warm-up updates" if args.warmup_steps else "from the first update"
    shape, end = ("linear", 0.0) if args.scheduler == "linear" else ("cosine", args.min_lr_ratio * args.lr)
    text = f"peak lr {args.lr:g} {start}, {shape} decay to {end:g}"
    if args.scheduler == "cosine" and args.cycle_length is not None:
        text += f", anew every {args.cycle_length:,} updates"
    if args.scheduler == "cosine_restarts":
        text += f", {args.restart_warmup_steps:,} warm-up updates again every {args.cycle_length:,}"
    return text


def _slow_dtype(plan: Plan) -> list[str]:
    """A warning where this machine's CPU computes bfloat16 products without instructions for them."""
    if plan.dtype != "bfloat16" or cpu_has_bfloat16() is not False:
        return []
    return [
        "--dtype bfloat16: this CPU multiplies bfloat16 matrices tens of times slower than float32 (no AVX-512, AMX or "
        "bf16 instructions); use --dtype float32"
    ]


def _frozen(plan: Plan, args: Arguments) -> str:
    """How many of the dense parameters are not trained, where some are not."""
    if not METHODS[args.peft_model].frozen_base:
        return ""
    frozen = plan.model.num_hidden_layers * sum(map(math.prod, linear_shapes(plan.model)))
    return f"; {frozen:,} of the dense ones are frozen, {plan.parameters['total'] - frozen:,} are trained"


def _peak_text(plan: Plan, device: DeviceMemory | None) -> str:
    text = f"about {plan.bytes['peak'] / GIB:.2f} GiB at the peak, per process"
    if device is None:
        return text
    verdict = "fits" if plan.bytes["peak"] <= device.num_bytes else "does NOT fit"
    return f"{text}; {verdict} in the {device.num_bytes / GIB:.1f} GiB of {device.name}"


def out_of_memory_problem(plan: Plan, args: Arguments, device_type: str, said: str) -> str:
    """The message of a run that ran out of memory; `said`: the allocator's own message."""
    largest = max(CLASSES, key=lambda name: plan.bytes[name])
    setting = setting_of(plan, args, device_type)
    lower = ", ".join(f"{saving.text} ({saving.peak / GIB:.1f} GiB)" for saving in savings(setting))
    return (
        f"memory ran out ({said}); by the plan the peak is {plan.bytes['peak'] / GIB:.1f} GiB, most of it {largest} "
        f"({plan.bytes[largest] / GIB:.1f} GiB); "
        + (f"to lower the peak: {lower}" if lower else "no flag lowers it: take a smaller model or another device")
    )


def memory_problems(plan: Plan, args: Arguments, device: DeviceMemory) -> list[str]:
    """How much memory the run needs beyond the device's, and the flags that would make it fit; [] where it fits."""
    if plan.bytes["peak"] <= device.num_bytes:
        return []
    setting = setting_of(plan, args, device.device_type)
    wanted = f"{plan.bytes['peak'] / GIB:.1f} GiB at the peak, and {device.name} has {device.num_bytes / GIB:.1f} GiB"
    single = ", ".join(f"{saving.text} {saving.peak / GIB:.1f}" for saving in savings(setting))
    together = fitting_flags(setting, device.num_bytes)
    way_out = (
        "would fit with " + " ".join(saving.text for saving in together)
        if together
        else "no flag makes it fit: take a smaller model, or more processes' memory"
    )
    return [f"this run needs about {wanted} per process; {way_out}", f"peak in GiB with one change: {single}"]
