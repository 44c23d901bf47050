"""The plan: every integer that follows from the arguments, checked before anything is loaded, and printed by --dry_run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.config.arguments import Arguments, default_save_dir
from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.data.source import original_dataset
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.account import account
from peft_pretraining.memory.counts import parameter_counts
from peft_pretraining.memory.setting import Setting, memory_setting
from peft_pretraining.methods import METHODS
from peft_pretraining.plan.checks import _slow_save, _warnings, check, schedule_arguments
from peft_pretraining.plan.schedule import LearningRates

_C4_EVAL_TOKENS = 10_000_000
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A run as planned. Sequences and update steps are counted over all processes, bytes per process."""

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
    checked = check(args, world)
    model, dtype = checked.model, args.dtype or dtype or "float32"
    setting = memory_setting(args, model, world, dtype, checked.gradient_accumulation, device_type)
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
        gradient_accumulation=checked.gradient_accumulation,
        total_batch_size=checked.total_batch_size,
        tokens_per_update=checked.total_batch_size * args.max_length,
        num_training_steps=checked.num_training_steps,
        max_train_tokens=args.max_train_tokens,
        data_lanes=checked.data_lanes,
        eval_tokens=args.eval_tokens or _default_eval_tokens(args),
        save_dir=Path(args.save_dir) if args.save_dir else default_save_dir(args, checked.total_batch_size),
        warnings=(*_warnings(args, world, model), *_slow_save(found)),
    )


def _default_eval_tokens(args: Arguments) -> int | None:
    return _C4_EVAL_TOKENS if original_dataset(args.eval_dataset or args.dataset) == "c4" else None


def setting_of(plan: Plan, args: Arguments, device_type: str) -> Setting:
    """The settings that memory and communication of a planned run depend on."""
    world = World(size=plan.world_size)
    return memory_setting(args, plan.model, world, plan.dtype, plan.gradient_accumulation, device_type)


def learning_rates(args: Arguments, plan: Plan) -> LearningRates:
    """The learning rates of a planned run."""
    settings = {"lr": args.lr, **schedule_arguments(args, plan.num_training_steps)}
    tokens_per_update = None if plan.max_train_tokens is None else plan.tokens_per_update
    restart = METHODS[args.peft_model].restart(args)
    return LearningRates(settings, tokens_per_update, restart.every if restart else None)


def _method_arguments(args: Arguments) -> dict[str, Any]:
    return {
        "method": args.peft_model,
        "rank": args.rank,
        "sparsity": args.sp_ratio,
        "train_scaling": args.train_scaling,
        "support": args.support,
    }
