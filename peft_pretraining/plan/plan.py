"""The plan: every integer that follows from the arguments, checked before anything is loaded, and printed by --dry_run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.config.arguments import Arguments, ConfigError, default_save_dir
from peft_pretraining.config.model_config import ModelConfig, ModelConfigError, load_model_config
from peft_pretraining.data.source import default_lanes, original_dataset
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.account import account
from peft_pretraining.memory.counts import parameter_counts
from peft_pretraining.memory.setting import Setting, memory_setting
from peft_pretraining.methods import METHODS
from peft_pretraining.plan import schedule
from peft_pretraining.plan.checks import _batch_arithmetic, _model_problems, _slow_save, _warnings

_C4_EVAL_TOKENS = 10_000_000
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What the run will do. Sequences and update steps are counted over all processes, bytes per process."""

    model: ModelConfig
    parameters: dict[str, int]  # total, dense, low_rank, sparse
    full_rank_parameters: int
    bytes: dict[str, int]  # by class, total and peak, as `account` has them
    dtype: str
    world_size: int
    batch_size: int
    gradient_accumulation: int
    total_batch_size: int
    tokens_per_update: int  # positions: total_batch_size x max_length; padding counts
    num_training_steps: int  # with max_train_tokens: the fewest updates that can reach it
    max_train_tokens: int | None
    data_lanes: int
    eval_tokens: int | None
    save_dir: Path
    warnings: tuple[str, ...]


def make_plan(args: Arguments, world: World, dtype: str | None = None, device_type: str = "cpu") -> Plan:
    """Derive the plan; `dtype` is what --dtype resolves to where it was not given, `device_type` cpu or cuda.

    Raises:
        ConfigError: all problems at once, each with the values, the reason and the flag to change.
    """
    dtype = args.dtype or dtype or "float32"
    problems: list[str] = []
    accumulation, total_batch_size = _batch_arithmetic(args, world, problems)
    num_training_steps = args.num_training_steps
    if args.max_train_tokens is not None:
        num_training_steps = math.ceil(args.max_train_tokens / (total_batch_size * args.max_length))
    problems += schedule.validate(**_schedule_arguments(args, num_training_steps))
    if args.compute_dtype is not None and world.size == 1:
        problems.append(
            f"--compute_dtype {args.compute_dtype}: parameters are cast as several processes gather them, and this is one; use "
            "--dtype bfloat16, or start more (torchrun --nproc_per_node N)"
        )
    data_lanes = args.data_lanes or default_lanes(args.dataset)
    if data_lanes % world.size:
        fitting = [lanes for lanes in range(data_lanes, data_lanes + world.size) if lanes % world.size == 0]
        problems.append(
            f"--data_lanes {data_lanes}: must be a multiple of the {world.size} processes, which share the readers evenly; "
            f"use --data_lanes {fitting[0]}"
        )
    try:
        model = load_model_config(args.model_config)
    except ModelConfigError as error:
        raise ConfigError([*problems, str(error)]) from None
    problems += _model_problems(args, model)
    if problems:
        raise ConfigError(problems)
    setting = memory_setting(args, model, world, dtype, accumulation, device_type)
    counts = parameter_counts(model, **_method_arguments(args))
    found = account(setting)
    return Plan(
        model=model,
        parameters={"total": counts.total, "dense": counts.dense, "low_rank": counts.low_rank, "sparse": counts.sparse},
        full_rank_parameters=parameter_counts(model, method="full", rank=1, sparsity=0.0).total,
        bytes=found,
        dtype=dtype,
        world_size=world.size,
        batch_size=args.batch_size,
        gradient_accumulation=accumulation,
        total_batch_size=total_batch_size,
        tokens_per_update=total_batch_size * args.max_length,
        num_training_steps=num_training_steps,
        max_train_tokens=args.max_train_tokens,
        data_lanes=data_lanes,
        eval_tokens=args.eval_tokens or _default_eval_tokens(args),
        save_dir=Path(args.save_dir) if args.save_dir else default_save_dir(args, total_batch_size),
        warnings=(*_warnings(args, world, model), *_slow_save(found)),
    )


def _default_eval_tokens(args: Arguments) -> int | None:
    return _C4_EVAL_TOKENS if original_dataset(args.eval_dataset or args.dataset) == "c4" else None


def setting_of(plan: Plan, args: Arguments, device_type: str) -> Setting:
    """What memory and communication of a planned run depend on."""
    world = World(size=plan.world_size)
    return memory_setting(args, plan.model, world, plan.dtype, plan.gradient_accumulation, device_type)


def learning_rate(args: Arguments, plan: Plan, update_step: int, tokens_seen: int) -> float:
    """The rate of the update that follows `update_step` finished ones.

    With max_train_tokens the schedule runs on tokens instead, in units of full updates: padding makes the number of
    updates unknown beforehand, and the schedule still has to end where the run does.
    """
    position: float = update_step
    if plan.max_train_tokens is not None:
        position = min(tokens_seen / plan.tokens_per_update, plan.num_training_steps - 1)
    rate = schedule.lr_at(position, lr=args.lr, **_schedule_arguments(args, plan.num_training_steps))
    if args.scheduler == "cosine_restarts":
        return rate
    restart = METHODS[args.peft_model].restart(args)
    return rate * schedule.after_restart(update_step, restart.every if restart else None, args.restart_warmup_steps)


def is_finished(plan: Plan, update_step: int, tokens_seen: int) -> bool:
    """Exactly num_training_steps updates, or the first update that reaches max_train_tokens."""
    if plan.max_train_tokens is not None:
        return tokens_seen >= plan.max_train_tokens
    return update_step >= plan.num_training_steps


def _schedule_arguments(args: Arguments, num_training_steps: int) -> dict[str, Any]:
    return {
        "scheduler": args.scheduler,
        "num_training_steps": num_training_steps,
        "warmup_steps": args.warmup_steps,
        "min_lr_ratio": args.min_lr_ratio,
        "cycle_length": args.cycle_length,
        "restart_warmup_steps": args.restart_warmup_steps,
        "adjust_step": args.adjust_step,
    }


def _method_arguments(args: Arguments) -> dict[str, Any]:
    return {
        "method": args.peft_model,
        "rank": args.rank,
        "sparsity": args.sp_ratio,
        "train_scaling": args.train_scaling,
        "support": args.support,
    }
