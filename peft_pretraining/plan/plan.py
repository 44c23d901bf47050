"""The plan: every integer that follows from the arguments, checked before anything is loaded, and printed by --dry_run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.config.arguments import (
    RESTARTED,
    Arguments,
    ConfigError,
    default_save_dir,
    embedding_bits,
    moments_at_a_merge,
    restart_interval,
)
from peft_pretraining.config.model_config import ModelConfig, ModelConfigError, load_model_config
from peft_pretraining.data.source import default_lanes, original_dataset
from peft_pretraining.distributed.world import DeviceMemory, World
from peft_pretraining.memory import counts as memory
from peft_pretraining.memory.account import CLASSES, Setting, account
from peft_pretraining.memory.communication import format_wire, wire_figures
from peft_pretraining.memory.savings import fitting_flags, savings
from peft_pretraining.plan import schedule

# Above these two together, runs were seen to stall at a high loss (a low-rank part that moves too far per update).
_STALLING_SCALE, _STALLING_LR = 0.5, 0.003
_C4_EVAL_TOKENS = 10_000_000
GIB = 2**30
# torchrun ends its processes 30 s after a signal; a save that a disk of this speed cannot make in 25 s is warned about.
_SLOW_DISK_BYTES_PER_S, _TIME_TO_SAVE_S = 200 * 10**6, 25


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
    counts = memory.parameter_counts(model, **_method_arguments(args))
    found = account(setting)
    return Plan(
        model=model,
        parameters={"total": counts.total, "dense": counts.dense, "low_rank": counts.low_rank, "sparse": counts.sparse},
        full_rank_parameters=memory.parameter_counts(model, method="full", rank=1, sparsity=0.0).total,
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
        warnings=(*_warnings(args, world), *_wide_subspace(args, model), *_slow_save(found)),
    )


def _default_eval_tokens(args: Arguments) -> int | None:
    return _C4_EVAL_TOKENS if original_dataset(args.eval_dataset or args.dataset) == "c4" else None


def memory_setting(args: Arguments, model: ModelConfig, world: World, dtype: str, accumulation: int, device_type: str) -> Setting:
    """What the memory account needs to know of a run."""
    return Setting(
        model=model,
        peft_model=args.peft_model,
        rank=args.rank,
        sp_ratio=args.sp_ratio,
        train_scaling=args.train_scaling,
        support=args.support,
        linear_path=args.linear_path,
        optimizer=args.optimizer,
        beta1=args.beta1,
        embedding_bits=embedding_bits(args),
        stochastic_rounding=args.stochastic_rounding,
        proj_type=args.proj_type,
        init=args.init,
        rebalance=args.rebalance,
        per_layer=args.per_layer,
        dtype=dtype,
        batch_size=args.batch_size,
        max_length=args.max_length,
        gradient_accumulation=accumulation,
        world_size=world.size,
        parallel=args.parallel,
        compute_dtype=args.compute_dtype,
        reduce_dtype=args.reduce_dtype,
        reshard_after_forward=args.reshard_after_forward,
        activation_checkpointing=args.activation_checkpointing,
        compile=args.compile,
        document_mask=args.packing and args.document_mask,
        async_save=args.async_save,
        device_type=device_type,
    )


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
    return rate * schedule.after_restart(update_step, restart_interval(args), args.restart_warmup_steps)


def is_finished(plan: Plan, update_step: int, tokens_seen: int) -> bool:
    """Exactly num_training_steps updates, or the first update that reaches max_train_tokens."""
    if plan.max_train_tokens is not None:
        return tokens_seen >= plan.max_train_tokens
    return update_step >= plan.num_training_steps


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
        "sparsity": args.sp_ratio if args.peft_model == "sltrain" else 0.0,
        "train_scaling": args.train_scaling,
        "support": args.support,
    }


def _model_problems(args: Arguments, model: ModelConfig) -> list[str]:
    problems = []
    if args.max_length > model.max_position_embeddings:
        problems.append(
            f"--max_length {args.max_length}: {args.model_config} allows {model.max_position_embeddings} positions "
            "(max_sequence_length); lower --max_length or raise it there"
        )
    rows, columns = min(memory.linear_shapes(model), key=math.prod)
    if args.peft_model == "sltrain" and args.support == "uniform" and int(args.sp_ratio * rows * columns) == 0:
        problems.append(
            f"--sp_ratio {args.sp_ratio}: leaves no entry in a weight of {rows} x {columns}; "
            f"use more than {1 / (rows * columns):.1g}"
        )
    smallest = min(size for shape in memory.linear_shapes(model) for size in shape)
    if args.rank > smallest and args.peft_model in RESTARTED:
        problems += [
            f"--rank {args.rank} with {flag}: a weight with {smallest} rows or columns has no more singular values than that; "
            f"use --rank {smallest} or less, or leave {flag} out"
            for flag, given in (("--init svd", args.init == "svd"), ("--rebalance", args.rebalance))
            if given
        ]
    blocks = memory.block_count(args.sp_ratio) if args.peft_model == "sltrain" and args.support == "block" else 1
    if blocks > smallest:
        problems.append(
            f"--sp_ratio {args.sp_ratio} with --support block: {blocks} blocks do not fit a weight with "
            f"{smallest} rows or columns; use at least {1 / smallest:.2g}, or --support uniform"
        )
    return problems


def _warnings(args: Arguments, world: World) -> list[str]:
    lines = []
    if args.parallel == "fsdp" and world.size == 1:
        lines.append("--parallel fsdp has no effect in one process: there is nobody to share with")
    lines += _relora_warnings(args) + _restart_warnings(args)
    scale = math.tanh(1.0) if args.train_scaling else args.lora_alpha / args.rank
    if args.peft_model in ("lowrank", "sltrain") and scale > _STALLING_SCALE and args.lr >= _STALLING_LR:
        what = "tanh(1) of --train_scaling" if args.train_scaling else f"alpha / rank = {args.lora_alpha:g} / {args.rank}"
        lines.append(
            f"{what} = {scale:.2g} with --lr {args.lr:g}: above {_STALLING_SCALE} at lr {_STALLING_LR} and more, runs were "
            "seen to stall at a high loss; lower --lora_alpha or --lr"
        )
    if (
        args.data_lanes is None
        and default_lanes(args.dataset) == 24
        and args.workers is not None
        and args.workers * world.size > 24
    ):
        lines.append(f"--workers {args.workers}: 24 data lanes keep at most 24 workers busy over all processes")
    return lines


def _wide_subspace(args: Arguments, model: ModelConfig) -> list[str]:
    """A warning where GaLore's projections leave the gradients as large as they are."""
    largest = max(min(shape) for shape in memory.linear_shapes(model))
    if args.peft_model != "galore" or args.rank < largest:
        return []
    return [
        f"--rank {args.rank} with --peft_model galore: no weight's shorter side is above {largest}, so that projected "
        f"gradients are as large as whole ones, and projections come on top; use --rank {largest // 4}, or --peft_model full"
    ]


def _relora_warnings(args: Arguments) -> list[str]:
    """Where merges and the schedule do not go together."""
    if args.peft_model != "relora" or args.relora is None:
        return []
    if args.max_train_tokens is None and args.relora >= args.num_training_steps:
        return [
            f"--relora {args.relora} with --num_training_steps {args.num_training_steps}: factors are never merged, so that the "
            "run trains one low-rank change of the weights it starts from; lower --relora"
        ]
    if args.scheduler != "cosine_restarts":
        if args.restart_warmup_steps or _cycles_warm_up(args):
            return []
        return [
            f"--relora {args.relora} with --scheduler {args.scheduler}: after a merge the new factors are trained at the full "
            "rate at once; use --restart_warmup_steps 100, or as published --scheduler cosine_restarts "
            f"--cycle_length {args.relora} too"
        ]
    if args.cycle_length != args.relora or args.adjust_step % args.relora:
        return [
            f"--relora {args.relora} with --cycle_length {args.cycle_length} and --adjust_step {args.adjust_step}: the rate "
            f"warms up again at other updates than those after merges; use --cycle_length {args.relora} --adjust_step 0"
        ]
    return []


def _cycles_warm_up(args: Arguments) -> bool:
    """Whether the cosine schedule's own cycles begin with a warm-up where factors are merged."""
    return args.scheduler == "cosine" and args.cycle_length == args.relora and args.warmup_steps > 0


def _restart_warnings(args: Arguments) -> list[str]:
    """Where restarts never come."""
    if args.peft_model not in RESTARTED or args.restart_every is None or args.max_train_tokens is not None:
        return []
    if args.restart_every < args.num_training_steps:
        return []
    return [
        f"--restart_every {args.restart_every} with --num_training_steps {args.num_training_steps}: there is no restart; lower "
        "--restart_every, or leave it out"
    ]


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


def format_plan(plan: Plan, args: Arguments, source: str, memory_of_device: DeviceMemory | None) -> str:
    """The plan as --dry_run prints it. `source` describes the data; `memory_of_device` is what there is, if known."""
    counts = plan.parameters
    share = f" ({counts['total'] / plan.full_rank_parameters:.0%} of full-rank {plan.full_rank_parameters:,})"
    length = (
        f"until {plan.max_train_tokens:,} tokens of text, at least {plan.num_training_steps:,} updates"
        if plan.max_train_tokens is not None
        else f"{plan.num_training_steps:,} updates"
    )
    positions = plan.num_training_steps * plan.tokens_per_update
    rows = [
        ("model", f"{plan.model.name}, {args.peft_model}, {plan.dtype}"),
        ("parameters", f"{counts['total']:,}{share if args.peft_model not in ('full', 'galore') else ''}"),
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
            f"{args.optimizer}{_subspace(args)}, {args.scheduler} to lr {args.lr:g} after {args.warmup_steps:,} updates"
            f"{_restarts(args)}",
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
    if memory_of_device is not None and plan.bytes["peak"] > memory_of_device.num_bytes:
        lines += [f"warning: {text}" for text in memory_problems(plan, args, memory_of_device)]
    return "\n".join(lines)


def _subspace(args: Arguments) -> str:
    if args.peft_model != "galore":
        return ""
    kind = f"{args.proj_type}, anew every {args.update_proj_gap} updates, scale {args.galore_scale:g}"
    return f" in subspaces of rank {args.rank} ({kind})"


def _frozen(plan: Plan, args: Arguments) -> str:
    """Of relora: how many of the dense parameters are not trained."""
    if args.peft_model != "relora":
        return ""
    frozen = plan.model.num_hidden_layers * sum(map(math.prod, memory.linear_shapes(plan.model)))
    return f"; {frozen:,} of the dense ones are frozen, {plan.parameters['total'] - frozen:,} are trained"


def _restarts(args: Arguments) -> str:
    interval = restart_interval(args)
    if interval is None:
        return ""
    if args.peft_model != "relora":
        balanced = ", balanced factors" if args.rebalance else ""
        return f"; every {interval:,} updates the linears' moments from zero{balanced}"
    kind, share = moments_at_a_merge(args)
    moments = {"zero": "zeroed", "keep": "kept"}.get(kind, f"{share:.0%} zeroed ({kind})")
    return f"; factors merged every {interval:,} updates, their moments {moments}"


def _peak_text(plan: Plan, device: DeviceMemory | None) -> str:
    text = f"about {plan.bytes['peak'] / GIB:.2f} GiB at the peak, per process"
    if device is None:
        return text
    verdict = "fits" if plan.bytes["peak"] <= device.num_bytes else "does NOT fit"
    return f"{text}; {verdict} in the {device.num_bytes / GIB:.1f} GiB of {device.name}"


def out_of_memory_problem(plan: Plan, args: Arguments, device_type: str, said: str) -> str:
    """What to say where memory ran out all the same; `said`: what the allocator said."""
    largest = max(CLASSES, key=lambda name: plan.bytes[name])
    setting = setting_of(plan, args, device_type)
    lower = ", ".join(f"{saving.text} ({saving.peak / GIB:.1f} GiB)" for saving in savings(setting))
    return (
        f"memory ran out ({said}); by the plan the peak is {plan.bytes['peak'] / GIB:.1f} GiB, most of it {largest} "
        f"({plan.bytes[largest] / GIB:.1f} GiB); "
        + (f"to lower the peak: {lower}" if lower else "no flag lowers it: take a smaller model or another device")
    )


def memory_problems(plan: Plan, args: Arguments, device: DeviceMemory) -> list[str]:
    """What does not fit into the device, and the flags that would make it fit; [] where it fits."""
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
