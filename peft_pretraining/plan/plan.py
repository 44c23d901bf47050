"""The plan: every integer that follows from the arguments, checked before anything is loaded, and printed by --dry_run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from peft_pretraining.config.arguments import Arguments, ConfigError, default_save_dir, reset_interval
from peft_pretraining.config.model_config import ModelConfig, ModelConfigError, linear_shapes, rope_warnings
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.config.parameter_groups import PARAMETER_GROUPS, lr_ratios, undecayed_groups
from peft_pretraining.data.source import holds_c4
from peft_pretraining.distributed.device import DeviceMemory, cpu_has_bfloat16
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.account import CLASSES, account
from peft_pretraining.memory.communication import format_wire, wire_figures
from peft_pretraining.memory.counts import parameter_counts
from peft_pretraining.memory.setting import MemorySetting, memory_setting
from peft_pretraining.methods import METHODS, has_effect
from peft_pretraining.plan.checks import _larger_than_dense, _slow_save, _warnings, check, schedule_arguments
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
    linear_cache: str  # none, positions or weights
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


# Share of a device's memory up to which --linear_cache auto may raise the predicted peak.
_CACHE_UP_TO = 0.8


def make_plan(
    args: Arguments, world: World, dtype: str | None = None, device_type: str = "cpu", memory: DeviceMemory | None = None
) -> Plan:
    """Derives the plan. dtype: what --dtype resolves to if it was not given. device_type: cpu or cuda. memory: if known.

    Raises:
        ConfigError: all problems at once, each with the values, the reason and the flag to change.
    """
    checked = check(args, world)
    model, dtype = checked.model, args.dtype or dtype or "float32"
    try:
        rope_complaints = rope_warnings(model)
    except ModelConfigError as error:
        raise ConfigError([str(error)]) from None
    setting = memory_setting(args, model, world, dtype, checked.gradient_accumulation, device_type)
    counts = parameter_counts(model, **setting.method_arguments)
    full_rank_parameters = parameter_counts(model, method="full", rank=1, sparsity=0.0).total
    setting, cache_warnings = _with_cache(setting, args, memory)
    num_bytes = account(setting)
    return Plan(
        model=model,
        parameters={"total": counts.total, "dense": counts.dense, "low_rank": counts.low_rank, "sparse": counts.sparse},
        full_rank_parameters=full_rank_parameters,
        bytes=num_bytes,
        linear_cache=setting.linear_cache,
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
        warnings=(
            *rope_complaints,
            *_warnings(args, world, model, checked.gradient_accumulation, dtype),
            *_larger_than_dense(args, counts.total, full_rank_parameters),
            *_slow_save(num_bytes),
            *cache_warnings,
        ),
    )


def _with_cache(setting: MemorySetting, args: Arguments, memory: DeviceMemory | None) -> tuple[MemorySetting, list[str]]:
    """Returns the setting with what linears really cache, and a warning if that is less than was asked for.

    auto keeps positions on a GPU that has room for them. It never keeps weights, which take the memory that the method saves.
    """
    none, positions = (replace(setting, linear_cache=kept) for kept in ("none", "positions"))
    auto = args.linear_cache == "auto" and memory is not None and memory.device_type == "cuda"
    if not setting.method.factored or (setting.linear_cache == "none" and not auto):
        return none, []
    sizes = account(positions)
    fits = memory is None or sizes["peak"] <= _CACHE_UP_TO * memory.num_bytes
    smaller = positions if sizes["cache"] and (fits or not auto) else none
    if setting.linear_cache == "positions" and not setting.method.sparse:
        return none, ["--linear_cache positions: without a sparse part there are no positions; leave it out"]
    if setting.linear_cache != "weights":
        return smaller, []
    if account(setting)["cache"] > sizes["cache"]:
        return setting, []
    # checks.notices already says that --linear_path factored builds no weights.
    if args.linear_path == "factored":
        return smaller, []
    rows = setting.batch_size * setting.max_length
    return smaller, [
        f"--linear_cache weights: with {rows:,} rows per micro-batch no linear builds its weight, as multiplying by the factors "
        "takes less time; leave it out"
    ]


def _default_eval_tokens(args: Arguments) -> int | None:
    return _C4_EVAL_TOKENS if holds_c4(args.eval_dataset or args.dataset) else None


def setting_of(plan: Plan, args: Arguments, device_type: str) -> MemorySetting:
    """The settings that memory and communication of a planned run depend on."""
    world = World(size=plan.world_size)
    setting = memory_setting(args, plan.model, world, plan.dtype, plan.gradient_accumulation, device_type)
    return replace(setting, linear_cache=plan.linear_cache)


def learning_rates(args: Arguments, plan: Plan) -> LearningRates:
    """The learning rates of a planned run."""
    settings = {"lr": args.lr, **schedule_arguments(args, plan.num_training_steps)}
    tokens_per_update = None if plan.max_train_tokens is None else plan.tokens_per_update
    restart = METHODS[args.peft_model].restart(args)
    own = _own_ratios(args)
    # All groups that the model has are logged if one has a rate of its own, so that runs are compared under the same keys.
    groups = [group for group in PARAMETER_GROUPS if has_effect(f"{group}_lr", args.peft_model)] if own else []
    ratios = {group: own.get(group, 1.0) for group in groups if not (group == "head" and plan.model.tie_word_embeddings)}
    return LearningRates(settings, tokens_per_update, restart.every if restart else None, ratios)


def _own_ratios(args: Arguments) -> dict[str, float]:
    """The ratios of lr_ratios, of the groups that this method's model has."""
    return {group: ratio for group, ratio in lr_ratios(args).items() if has_effect(f"{group}_lr", args.peft_model)}


def format_plan(plan: Plan, args: Arguments, source: str, memory_of_device: DeviceMemory | None, order: str = "") -> str:
    """The plan as --dry_run prints it.

    source, order: the data and its order in words, the order empty where it costs nothing. memory_of_device: what is available,
    if known.
    """
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
        ("model", f"{plan.model.name}, {args.peft_model}, {plan.dtype}{_weights_text(args)}"),
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
            f"{args.optimizer}{method.optimizer_text(args)}, {_schedule_text(args)}{restart.text if restart else ''}"
            f"{_conditioning_text(args)}{_reset_text(args)}",
        ),
        *(("", text) for text in (_rates_text(args, plan.model.tie_word_embeddings), _decay_text(args)) if text),
        ("data", f"{source}, {'packed' if args.packing else 'padded'}, {plan.data_lanes} lanes"),
        *([("", order)] if order else []),
        *([("linears", _cache_text(plan, args))] if plan.linear_cache != "none" else []),
        ("run folder", str(plan.save_dir)),
        ("memory", " + ".join(f"{name} {plan.bytes[name] / GIB:.2f}" for name in CLASSES if plan.bytes[name]) + " GiB"),
        ("", _peak_text(plan, memory_of_device)),
    ]
    if args.per_layer and plan.gradient_accumulation > 1:
        number = plan.gradient_accumulation
        kept = f"{plan.bytes['gradients'] / GIB:.2f} GiB of gradients stay between its {number} micro-batches"
        if args.accumulate == "moments":
            kept = f"gradients of its {number} micro-batches are added to the moments and freed"
        rows.append(("per-layer", f"steps in the last micro-batch of an update; {kept}"))
    if plan.world_size > 1:
        rows.append(("wire", format_wire(wire_figures(setting_of(plan, args, "cpu"), None, None))))
    lines = [f"{name:<12}{text}".replace("\n", "\n" + " " * 12) for name, text in rows]
    lines += [f"warning: {text}" for text in plan.warnings]
    if memory_of_device is not None and memory_of_device.device_type == "cpu" and args.memory is None:
        lines += [f"warning: {text}" for text in _slow_dtype(plan, args)]
    return "\n".join(lines)


def _cache_text(plan: Plan, args: Arguments) -> str:
    """What linears keep between passes, and by which flag."""
    kept = {"positions": "decoded positions", "weights": "decoded positions and, during an update, their weights"}
    return f"keep {kept[plan.linear_cache]} (--linear_cache {args.linear_cache})"


def _weights_text(args: Arguments) -> str:
    """How parameters are stored, if not in the dtype of the arithmetic."""
    if args.weight_dtype is None:
        return ""
    return f", weights stored in {args.weight_dtype}, rounded {'stochastically' if args.stochastic_rounding else 'to nearest'}"


def _rates_text(args: Arguments, tied: bool) -> str:
    """Peak learning rates of the parameter groups that have their own, e.g. "peak lr of embedding 0.004, matrix 0.001".

    tied: whether the embedding is the output head too.
    """
    names = {"embedding": "embedding and output head (tied)"} if tied else {}
    text = ", ".join(f"{names.get(group, group)} {getattr(args, f'{group}_lr'):g}" for group in _own_ratios(args))
    return f"peak lr of {text}" if text else ""


def _conditioning_text(args: Arguments) -> str:
    """The conditioning of what muon or spectron leave to Adam, if there is any."""
    conditioned = args.condition_gradients and OPTIMIZERS[args.optimizer].matrix_bytes is not None
    return "; gradients of what Adam steps conditioned" if conditioned else ""


def _reset_text(args: Arguments) -> str:
    """The resets of all moments, if there are any."""
    every = reset_interval(args)
    return f"; all moments set to zero every {every:,} updates" if every else ""


def _decay_text(args: Arguments) -> str:
    """What weight decay applies to, if there is any."""
    if not args.weight_decay:
        return ""
    names = {"embedding": "embedding", "head": "output head", "norm": "norms and biases"}
    without = [names[group] for group in PARAMETER_GROUPS if group in undecayed_groups(args)]
    return f"weight decay {args.weight_decay:g} {'except on ' + ', '.join(without) if without else 'on every parameter'}"


def _schedule_text(args: Arguments) -> str:
    """The learning rate over the run, e.g. "peak lr 0.1 after 1,100 warm-up updates, cosine decay to 0.01"."""
    start = f"after {args.warmup_steps:,} warm-up updates" if args.warmup_steps else "from the first update"
    shape, end = ("linear", 0.0) if args.scheduler == "linear" else ("cosine", args.min_lr_ratio * args.lr)
    text = f"peak lr {args.lr:g} {start}, {shape} decay to {end:g}"
    if args.scheduler == "cosine" and args.cycle_length is not None:
        text += f", restarted every {args.cycle_length:,} updates"
    if args.scheduler == "cosine_restarts":
        text += f", {args.restart_warmup_steps:,} warm-up updates again every {args.cycle_length:,}"
    return text


def _slow_dtype(plan: Plan, args: Arguments) -> list[str]:
    """A warning where this machine's CPU computes bfloat16 products without instructions for them."""
    if cpu_has_bfloat16() is not False:
        return []
    if plan.dtype == "bfloat16":
        flag, way_out = "dtype", "use --dtype float32"
    elif args.compute_dtype == "bfloat16":
        flag, way_out = "compute_dtype", "leave it out, so that products are float32"
    else:
        return []
    return [
        f"--{flag} bfloat16: this CPU multiplies bfloat16 matrices tens of times slower than float32 (no AVX-512, AMX or "
        f"bf16 instructions); {way_out}"
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
