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
    LOW_BIT,
    RESTARTED,
    UNCHANGEABLE,
    Arguments,
    allowed_changes,
    restart_interval,
    suggestion,
)
from peft_pretraining.memory.counts import block_count


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
    if args.peft_model == "sltrain" and not 0 < args.sp_ratio < 1:
        problems.append(
            f"--sp_ratio {args.sp_ratio}: must lie strictly between 0 and 1 (e.g. 0.03); "
            "for no sparse part use --peft_model lowrank"
        )
    elif args.peft_model == "sltrain" and args.support == "block":
        problems += _block_problems(args.sp_ratio)
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
    problems += _relora_problems(args) + _restart_problems(args)
    if args.stochastic_rounding and args.optimizer not in ("adam", "adamw", *LOW_BIT):
        problems.append(
            f"--stochastic_rounding with --optimizer {args.optimizer}: works with adam, adamw, adam8bit and adamw4bit"
        )
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
    if args.parallel == "fsdp" and args.peft_model == "galore":
        problems.append(
            "--parallel fsdp with --peft_model galore: the projection is the SVD of a weight's whole gradient, of which a "
            "process has a part; use --parallel ddp, with --per_layer and adam8bit where memory is short, or --peft_model sltrain"
        )
    if args.parallel == "fsdp" and args.optimizer == "adafactor":
        problems.append(
            "--parallel fsdp with --optimizer adafactor: its second moments are means over whole rows and columns, of which a "
            "process has a part; use adam8bit or adamw4bit, whose moments are as small, or --parallel ddp"
        )
    if args.compute_dtype is not None and args.parallel != "fsdp":
        problems.append(
            f"--compute_dtype {args.compute_dtype} with --parallel {args.parallel}: parameters are cast as they are gathered; "
            "use --parallel fsdp, or --dtype bfloat16"
        )
    return problems


def _relora_problems(args: Arguments) -> list[str]:
    if args.peft_model != "relora":
        return []
    problems = []
    if args.relora is None:
        problems.append(
            "--peft_model relora needs --relora N (update steps between merges), e.g. --relora 1000; without merges it "
            "would train one low-rank change of random weights"
        )
    prunings = {
        name: getattr(args, name)
        for name in ("optimizer_random_pruning", "optimizer_magnitude_pruning")
        if getattr(args, name) is not None
    }
    for name, share in prunings.items():
        if not 0 < share <= 1:
            problems.append(f"--{name} {share}: must be a share above 0 and at most 1, e.g. 0.9")
        if args.optimizer not in ("adam", "adamw", "sgd"):
            problems.append(
                f"--{name} {share} with --optimizer {args.optimizer}: its moments are quantised or factored, and not pruned one "
                "by one; use --reset_optimizer_on_relora true, or --optimizer adamw"
            )
        if args.reset_optimizer_on_relora:
            problems.append(
                f"--{name} {share} with --reset_optimizer_on_relora true: nothing is left to prune; drop one of the two"
            )
    if len(prunings) == 2:
        problems.append(
            "--optimizer_random_pruning with --optimizer_magnitude_pruning: moments are pruned in one way; drop one of the two"
        )
    if args.max_train_tokens is not None and args.scheduler == "cosine_restarts":
        problems.append(
            f"--max_train_tokens {args.max_train_tokens} with --relora and --scheduler cosine_restarts: the schedule would "
            "restart by tokens and the factors by updates; use --num_training_steps"
        )
    if args.warmed_up_model is not None and not Path(args.warmed_up_model).is_dir():
        problems.append(f"--warmed_up_model {args.warmed_up_model}: no such folder")
    if args.warmed_up_model is not None and args.continue_from is not None:
        problems.append(
            f"--warmed_up_model {args.warmed_up_model} with --continue_from {args.continue_from}: a run begins from one of them; "
            "drop one of the two"
        )
    return problems


def _restart_problems(args: Arguments) -> list[str]:
    problems = []
    if args.restart_every is not None and args.peft_model == "relora":
        problems.append(
            f"--restart_every {args.restart_every} with --peft_model relora: it restarts at its merges; use --relora N"
        )
    if args.restart_every is not None and args.peft_model in RESTARTED and args.scheduler == "cosine_restarts":
        problems.append(
            f"--restart_every {args.restart_every} with --scheduler cosine_restarts: that schedule has restarts of its own, at "
            "other updates; use --scheduler cosine or linear"
        )
    if args.rebalance and args.peft_model in RESTARTED and args.restart_every is None:
        problems.append("--rebalance needs --restart_every N: factors are replaced at restarts, e.g. --restart_every 200")
    interval, warmup = restart_interval(args), args.restart_warmup_steps
    if interval and warmup is not None and args.scheduler != "cosine_restarts" and warmup >= interval:
        name = "relora" if args.peft_model == "relora" else "restart_every"
        problems.append(
            f"--restart_warmup_steps {warmup}: must be below --{name} {interval}, or the rate never comes back to the schedule's"
        )
    return problems


def _block_problems(sp_ratio: float) -> list[str]:
    """Blocks have a share 1 / k of a weight's entries; it must be near what was asked for (sparse_lora.block.block_count)."""
    blocks = block_count(sp_ratio)
    if abs(1 / blocks - sp_ratio) <= 0.05 * sp_ratio:
        return []
    below, above = 1 / (int(1 / sp_ratio) + 1), 1 / int(1 / sp_ratio)
    return [
        f"--sp_ratio {sp_ratio} with --support block: k blocks have a share 1/k of a weight's entries, the nearest are "
        f"{below:.4g} and {above:.4g}; choose one of them, or --support uniform"
    ]


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
