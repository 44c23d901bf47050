"""What is refused of the arguments alone: values out of range, and combinations that cannot work.

Each problem is one sentence that names the value, the reason and the way out. What needs the model or the number of processes
is `plan.Plan`'s.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from peft_pretraining.config.arguments import (
    CHANGEABLE,
    UNCHANGEABLE,
    Arguments,
    allowed_changes,
    suggestion,
)
from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.data.source import default_lanes
from peft_pretraining.distributed.world import World
from peft_pretraining.methods import METHODS


def _allow_changes_problems(args: Arguments) -> list[str]:
    problems = []
    for name in sorted(allowed_changes(args) - set(CHANGEABLE)):
        if name in UNCHANGEABLE:
            reason = "cannot change in a run that goes on: what the checkpoint holds would not fit"
        elif name in {field.name for field in dataclasses.fields(Arguments)}:
            reason = "may always change, it is not compared; leave it out"
        else:
            reason = f"is no argument{suggestion(name, set(CHANGEABLE))}"
        problems.append(f"--allow_changes {name}: {reason}; names that can be given: {', '.join(sorted(CHANGEABLE))}")
    return problems


def value_problems(args: Arguments) -> list[str]:
    """Problems of single values and of pairs that need neither the model nor the number of processes."""
    problems = _range_problems(args)
    if not 0 <= args.beta1 < 1:
        problems.append(f"--beta1 {args.beta1}: must be at least 0 and below 1")
    if not 0 <= args.min_lr_ratio <= 1:
        problems.append(f"--min_lr_ratio {args.min_lr_ratio}: must lie between 0 and 1")
    if not Path(args.model_config).is_file():
        problems.append(f"--model_config {args.model_config}: no such file (configs/ holds llama_9m.json to llama_13b.json)")
    if args.single_gpu and "parallel" in args.given:
        problems.append(f"--single_gpu with --parallel {args.parallel}: one process has nothing to share; drop one of the two")
    if args.per_layer and args.grad_clipping:
        problems.append(
            f"--grad_clipping {args.grad_clipping} with --per_layer: the global norm is not known before the first parameter is "
            "stepped; use --grad_norm_growth 1.01, which limits each tensor's norm, or drop one of the two"
        )
    problems += _parallel_problems(args)
    problems += METHODS[args.peft_model].problems(args)
    if args.stochastic_rounding and not OPTIMIZERS[args.optimizer].adam:
        rounding = ", ".join(name for name, optimizer in OPTIMIZERS.items() if optimizer.adam)
        problems.append(f"--stochastic_rounding with --optimizer {args.optimizer}: works with {rounding}")
    if args.grad_norm_growth is not None and not 1 <= args.grad_norm_growth < math.inf:
        problems.append(f"--grad_norm_growth {args.grad_norm_growth}: must be at least 1 and finite, e.g. 1.01")
    problems += _allow_changes_problems(args)
    if args.continue_from is not None and not Path(args.continue_from).is_dir():
        problems.append(f"--continue_from {args.continue_from}: no such folder")
    device, _, index = args.device.partition(":")
    if device not in ("auto", "cpu", "cuda") or (index and not (device == "cuda" and index.isdigit())):
        problems.append(f"--device {args.device}: must be auto, cpu, cuda or cuda:N")
    return problems


def _parallel_problems(args: Arguments) -> list[str]:
    problems = []
    if args.parallel == "fsdp" and not OPTIMIZERS[args.optimizer].shardable:
        problems.append(
            f"--parallel fsdp with --optimizer {args.optimizer}: its second moments are means over whole rows and columns, of "
            "which a process has a part; use adam8bit or adamw4bit, whose moments are as small, or --parallel ddp"
        )
    if args.compute_dtype is not None and args.parallel != "fsdp":
        problems.append(
            f"--compute_dtype {args.compute_dtype} with --parallel {args.parallel}: parameters are cast as they are gathered; "
            "use --parallel fsdp, or --dtype bfloat16"
        )
    return problems


def _range_problems(args: Arguments) -> list[str]:
    at_least_one = (
        "rank",
        "update_proj_gap",
        "max_length",
        "batch_size",
        "num_training_steps",
        "save_every",
        "eval_every",
        "log_every",
    )
    optional_at_least_one = (
        "gradient_accumulation",
        "total_batch_size",
        "max_train_tokens",
        "eval_tokens",
        "data_lanes",
        "cycle_length",
        "keep_checkpoints",
        "restart_every",
        "relora",
    )
    not_negative = (
        "warmup_steps",
        "weight_decay",
        "grad_clipping",
        "workers",
        "seed",
        "restart_warmup_steps",
        "adjust_step",
    )
    problems = []
    for name in (
        at_least_one
        + optional_at_least_one
        + not_negative
        + ("lr", "lora_alpha", "galore_scale", "sp_ratio", "min_lr_ratio", "beta1")
    ):
        value = getattr(args, name)
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"--{name} {value}: must be a finite number")
        elif name in at_least_one + optional_at_least_one and value < 1:
            problems.append(f"--{name} {value}: must be at least 1")
        elif name in not_negative and value < 0:
            problems.append(f"--{name} {value}: must not be negative")
        elif name in ("lr", "lora_alpha", "galore_scale") and value <= 0:
            problems.append(f"--{name} {value}: must be above 0")
    if args.seed >= 2**63:
        problems.append(f"--seed {args.seed}: must be below 2^63")
    if args.max_length == 1:
        problems.append("--max_length 1: a sequence of one token has nothing to predict; use at least 2")
    return problems


# torchrun ends its processes 30 s after a signal; a save that a disk of this speed cannot make in 25 s is warned about.
_SLOW_DISK_BYTES_PER_S, _TIME_TO_SAVE_S = 200 * 10**6, 25


def _batch_arithmetic(args: Arguments, world: World, problems: list[str]) -> tuple[int, int]:
    """(gradient_accumulation, total_batch_size); problems are appended, with stand-in values returned."""
    per_pass = args.batch_size * world.size
    total = args.total_batch_size
    if total is None:
        accumulation = args.gradient_accumulation or 1
        return accumulation, accumulation * per_pass
    arithmetic = f"--batch_size {args.batch_size} x {world.size} processes"
    if args.gradient_accumulation is not None:
        if args.gradient_accumulation * per_pass != total:
            problems.append(
                f"--total_batch_size {total}: {arithmetic} x --gradient_accumulation {args.gradient_accumulation} is "
                f"{args.gradient_accumulation * per_pass}; leave --gradient_accumulation out, or make them agree"
            )
        return args.gradient_accumulation, total
    if total % per_pass:
        if total % world.size:
            way_out = f"a multiple of the {world.size} processes, such as --total_batch_size {-(-total // per_pass) * per_pass}"
        else:
            share = total // world.size
            fitting = max(size for size in range(1, min(args.batch_size, share) + 1) if share % size == 0)
            way_out = f"--batch_size {fitting}, or --total_batch_size {-(-total // per_pass) * per_pass}"
        problems.append(f"--total_batch_size {total}: not a multiple of {arithmetic} = {per_pass}; use {way_out}")
        return 1, total
    return total // per_pass, total


def _model_problems(args: Arguments, model: ModelConfig) -> list[str]:
    problems = []
    if args.max_length > model.max_position_embeddings:
        problems.append(
            f"--max_length {args.max_length}: {args.model_config} allows {model.max_position_embeddings} positions "
            "(max_sequence_length); lower --max_length or raise it there"
        )
    return problems + METHODS[args.peft_model].model_problems(args, model)


def _warnings(args: Arguments, world: World, model: ModelConfig) -> list[str]:
    lines = []
    if args.parallel == "fsdp" and world.size == 1:
        lines.append("--parallel fsdp has no effect in one process: there is nobody to share with")
    lines += METHODS[args.peft_model].warnings(args, model)
    if (
        args.data_lanes is None
        and default_lanes(args.dataset) == 24
        and args.workers is not None
        and args.workers * world.size > 24
    ):
        lines.append(f"--workers {args.workers}: 24 data lanes keep at most 24 workers busy over all processes")
    return lines


def _slow_save(found: dict[str, int]) -> list[str]:
    """A warning where saving may take longer than launchers wait after a signal."""
    size = found["parameters"] + found["support"] + found["optimizer"]
    if size < _SLOW_DISK_BYTES_PER_S * _TIME_TO_SAVE_S:
        return []
    return [
        f"a checkpoint has {size / 1e9:.1f} GB: saved within {_TIME_TO_SAVE_S} s of a stop signal only by a disk that takes "
        f"{size / _TIME_TO_SAVE_S / 1e9:.2g} GB/s, and torchrun kills its processes 30 s after it unless "
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT (the recipes: 300) says otherwise; or lower --save_every by what may be lost"
    ]
