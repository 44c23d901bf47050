"""Every refusal, warning and notice about the arguments, found before anything is loaded.

A problem is one sentence that names the value, the reason and the way out. `check` collects all of them and raises once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from peft_pretraining.config.arguments import ROWS, Arguments, ConfigError, allowed_changes, flags_with, reset_interval
from peft_pretraining.config.dataset_list import dataset_names
from peft_pretraining.config.files import PathError, expanded
from peft_pretraining.config.flag import suggested_flag
from peft_pretraining.config.model_config import ModelConfig, ModelConfigError, load_model_config
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.data.source import default_lanes
from peft_pretraining.distributed.world import World
from peft_pretraining.methods import METHODS, has_effect, owners
from peft_pretraining.plan import schedule


@dataclass(frozen=True)
class Checked:
    """The values that the checks of the arguments derive, for the plan.

    total_batch_size: sequences per update over all processes. num_training_steps: with max_train_tokens the fewest updates that
    can reach it. notices: about keys of the model's file that are passed over.
    """

    model: ModelConfig
    gradient_accumulation: int
    total_batch_size: int
    num_training_steps: int
    data_lanes: int
    notices: tuple[str, ...]


# The oldest versions that the tests pass with (scripts/test.sh --oldest); as in requirements.txt.
_OLDEST = {"torch": "2.11", "transformers": "5.17"}


def check_packages() -> None:
    """Refuses a version of torch or transformers that is too old, before either is imported. Raises ConfigError."""
    problems = []
    for name, oldest in _OLDEST.items():
        # Builds without metadata are used as they are.
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed = metadata.version(name)
            numbers = re.match(r"(\d+)\.(\d+)", installed)
            if numbers and tuple(map(int, numbers.groups())) < tuple(map(int, oldest.split("."))):
                way_out = f"python -m pip install --upgrade '{name}>={oldest}'"
                problems.append(f"{name} {installed} is too old, this program needs {oldest} or newer: {way_out}")
    if problems:
        raise ConfigError(problems)


def check(args: Arguments, world: World) -> Checked:
    """Check everything that can be known without loading torch or data.

    Missing data is named beside other problems, but is no problem alone: a finished run needs none (see `check_inputs`).

    Raises:
        ConfigError: all problems at once, each with the values, the reason and the flag to change.
    """
    refused = refused_values(args)
    safe = _with_stand_ins(args, refused)
    problems = combination_problems(safe)
    accumulation, total_batch_size = _batch_arithmetic(safe, world, problems)
    num_training_steps = safe.num_training_steps
    if safe.max_train_tokens is not None:
        num_training_steps = math.ceil(safe.max_train_tokens / (total_batch_size * safe.max_length))
    if safe.max_train_tokens is None or not refused.keys() & _BATCH:
        problems += schedule.validate(**schedule_arguments(safe, num_training_steps))
    data_lanes = safe.data_lanes or default_lanes(safe.dataset)
    problems += _process_problems(safe, world, data_lanes)
    model, model_notices = None, list[str]()
    if "model_config" not in refused:
        try:
            model = load_model_config(args.model_config, model_notices)
            problems += _model_problems(safe, model)
        except ModelConfigError as error:
            problems.append(str(error))
    problems = [*refused.values(), *_not_naming(problems, refused)]
    if problems or model is None:
        raise ConfigError(list(dict.fromkeys([*problems, *_missing_inputs(args)])))
    return Checked(model, accumulation, total_batch_size, num_training_steps, data_lanes, tuple(model_notices))


# With --max_train_tokens the number of updates depends on these.
_BATCH = {"batch_size", "gradient_accumulation", "total_batch_size", "max_length", "max_train_tokens"}


def _with_stand_ins(args: Arguments, refused: Iterable[str]) -> Arguments:
    """The arguments with defaults in place of refused values, so that combinations can be checked all the same."""
    stand_ins: dict[str, Any] = {name: getattr(Arguments(batch_size=1), name) for name in refused if name in ROWS}
    return dataclasses.replace(args, **stand_ins)


def _not_naming(problems: Iterable[str], refused: Mapping[str, str]) -> list[str]:
    """The problems whose statement (all before a "; " and the way out) names none of the refused flags."""
    named = re.compile(rf"--({'|'.join(map(re.escape, refused))})\b") if refused else None
    return [problem for problem in problems if named is None or not named.search(problem.split("; ")[0])]


def value_problems(args: Arguments) -> list[str]:
    """Problems that depend on neither the model nor the number of processes."""
    refused = refused_values(args)
    return [*refused.values(), *_not_naming(combination_problems(_with_stand_ins(args, refused)), refused)]


def refused_values(args: Arguments) -> dict[str, str]:
    """Problems of single values, by flag: unreadable, missing or unknown on the command line, or out of range."""
    problems = dict(args.refused)
    for name, row in ROWS.items():
        if name not in problems and (limit := row.out_of_range(getattr(args, name))) is not None:
            problems[name] = f"--{name} {getattr(args, name)}: {limit}"
        is_empty = row.kind in ("path", "place", "datasets") and str(getattr(args, name)).strip() == ""
        if name not in problems and is_empty:
            problems[name] = f"--{name} is empty, perhaps from a shell variable that is not set; give a value, or leave it out"
    for name, problem in METHODS[args.peft_model].value_problems(args).items():
        problems.setdefault(name, problem)
    for name, exists in (("model_config", Path.is_file), ("continue_from", Path.is_dir)):
        value = getattr(args, name)
        if name not in problems and value is not None and not exists(Path(value)):
            kind = "file (configs/ holds llama_9m.json to llama_13b.json)" if name == "model_config" else "folder"
            problems[name] = f"--{name} {value}: no such {kind}"
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", args.device):
        problems["device"] = f"--device {args.device}: must be auto, cpu, cuda or cuda:N"
    return problems


def check_inputs(args: Arguments) -> None:
    """Refuses local data sets and tokenizers that do not exist. Raises ConfigError with all of them."""
    if missing := _missing_inputs(args):
        raise ConfigError(missing)


def _missing_inputs(args: Arguments) -> list[str]:
    """Problems of local data sets and tokenizers that do not exist; names, addresses and patterns are left to opening."""
    problems = []
    for name, row in ROWS.items():
        value = getattr(args, name)
        if row.kind not in ("place", "datasets") or value is None:
            continue
        for place in dataset_names(value) if row.kind == "datasets" else [value]:
            is_local = place.startswith((".", "/", "~")) and not glob.has_magic(place)
            # An unknown variable is reported where the path is opened.
            with contextlib.suppress(PathError):
                if is_local and not os.path.exists(expanded(place)):
                    problems.append(f"--{name} {value}: there is no file or folder {place}; name one that exists")
    return problems


def combination_problems(args: Arguments) -> list[str]:
    """Problems of values that are valid singly but not together."""
    problems: list[str] = []
    if args.single_gpu and "parallel" in args.given:
        problems.append(f"--single_gpu with --parallel {args.parallel}: one process has nothing to share; drop one of the two")
    if args.per_layer and args.grad_clipping:
        other = "use --grad_norm_growth 1.01, which limits each tensor's norm, or "
        problems.append(
            f"--grad_clipping {args.grad_clipping} with --per_layer: the global norm is not known before the first parameter is "
            f"stepped; {'' if args.accumulate == 'moments' else other}drop one of the two"
        )
    problems += _parallel_problems(args) + _accumulation_problems(args)
    problems += METHODS[args.peft_model].problems(args)
    problems += _optimizer_problems(args)
    if args.weight_dtype is not None:
        problems += _stored_weights_problems(args)
    elif args.stochastic_rounding and not OPTIMIZERS[args.optimizer].has_adam:
        rounding = _listed([name for name, optimizer in OPTIMIZERS.items() if optimizer.has_adam])
        what = f"--stochastic_rounding with --optimizer {args.optimizer}"
        problems.append(f"{what}: its step rounds to nearest; use one of {rounding}, or leave --stochastic_rounding out")
    return problems + _allow_changes_problems(args)


def _optimizer_problems(args: Arguments) -> list[str]:
    """Methods that an optimizer cannot work with."""
    optimizer, method = OPTIMIZERS[args.optimizer], METHODS[args.peft_model]
    what = f"--optimizer {args.optimizer} with --peft_model {args.peft_model}"
    problems = []
    if method.projected and (optimizer.matrix_bytes is not None or optimizer.reset_every is not None):
        problems.append(f"{what}: it needs whole gradients, which {method.title} projects; use --optimizer adamw")
    elif optimizer.steps_pairs and not method.replaces_linears:
        problems.append(f"{what}: it steps pairs of factors, and there are none; use --optimizer muon, or a method with factors")
    elif optimizer.steps_pairs and args.train_scaling:
        problems.append(f"{what} and --train_scaling: its step needs the fixed scale alpha / rank; drop --train_scaling")
    if args.embedding_states == "4bit" and optimizer.moment_bits not in (None, 4):
        known = _listed([name for name, one in OPTIMIZERS.items() if one.moment_bits == 4])
        problems.append(f"--embedding_states 4bit with --optimizer {args.optimizer}: works with {known}; use 8bit or 32bit")
    if args.condition_gradients and optimizer.matrix_bytes is None and not optimizer.conditions_all_gradients:
        known = _listed([name for name, one in OPTIMIZERS.items() if one.matrix_bytes is not None])
        all_of_them = _listed([name for name, one in OPTIMIZERS.items() if one.conditions_all_gradients])
        problems.append(
            f"--condition_gradients with --optimizer {args.optimizer}: it works with {known}, in front of the Adam beside them; "
            f"use --optimizer {all_of_them}, which conditions all gradients, or leave --condition_gradients out"
        )
    return problems


def _accumulation_problems(args: Arguments) -> list[str]:
    """What --accumulate moments cannot work with."""
    if args.accumulate == "gradients":
        return []
    what, way_out = f"--accumulate {args.accumulate}", "or leave --accumulate out"
    problems = []
    if not args.per_layer:
        problems.append(
            f"{what} without --per_layer: whole updates keep all gradients for their step anyway; add --per_layer, {way_out}"
        )
    if (reason := OPTIMIZERS[args.optimizer].not_accumulating) is not None:
        known = _listed([name for name, optimizer in OPTIMIZERS.items() if optimizer.not_accumulating is None])
        problems.append(f"{what} with --optimizer {args.optimizer}: {reason}; use one of {known}, {way_out}")
    if args.condition_gradients:
        problems.append(
            f"{what} with --condition_gradients: a micro-batch's gradient cannot be scaled by the norm of the update's; drop one "
            "of the two"
        )
    if METHODS[args.peft_model].projected:
        problems.append(
            f"{what} with --peft_model {args.peft_model}: its projections come from whole gradients; use sltrain or full, "
            f"{way_out}"
        )
    if args.grad_norm_growth is not None:
        problems.append(
            f"{what} with --grad_norm_growth {args.grad_norm_growth:g}: the norm of the update's gradient is not known, only "
            "those of its micro-batches; drop one of the two"
        )
    if args.parallel == "fsdp":
        problems.append(
            f"{what} with --parallel fsdp: FSDP2 adds up micro-batches' gradients before it divides them; use --parallel ddp, "
            f"{way_out}"
        )
    return problems


def _stored_weights_problems(args: Arguments) -> list[str]:
    """What cannot work with parameters that are stored as codes and scales."""
    optimizer, method, flag = OPTIMIZERS[args.optimizer], METHODS[args.peft_model], f"--weight_dtype {args.weight_dtype}"
    problems = []
    if args.parallel == "fsdp":
        problems.append(
            f"{flag} with --parallel fsdp: parameters are divided by rows, which would cut blocks with a common scale; use "
            "--parallel ddp, or leave --weight_dtype out"
        )
    if args.compile:
        problems.append(f"{flag} with --compile: compiled layers take plain parameters only; leave one of the two out")
    if not optimizer.has_adam:
        names = _listed([name for name, other in OPTIMIZERS.items() if other.has_adam])
        problems.append(
            f"{flag} with --optimizer {args.optimizer}: its step rounds to nearest, which loses small updates; use {names}"
        )
    if method.projected or method.frozen_base:
        problems.append(
            f"{flag} with --peft_model {args.peft_model}: its updates of dense weights are not rounded to int8; use --peft_model "
            "full, lowrank or sltrain, or leave --weight_dtype out"
        )
    return problems


def _allow_changes_problems(args: Arguments) -> list[str]:
    problems = []
    changeable = flags_with("if_allowed")
    for name in sorted(allowed_changes(args) - changeable):
        if name in flags_with("never"):
            reason = "cannot change when a run is resumed: what the checkpoint holds would not fit"
        elif name in ROWS:
            reason = "may always change, it is not compared; leave it out"
        else:
            meant = suggested_flag(name, ROWS)
            reason = f"is no argument (did you mean {meant}?)" if meant else "is no argument"
        problems.append(f"--allow_changes {name}: {reason}; names that can be given: {', '.join(sorted(changeable))}")
    return problems


def _process_problems(args: Arguments, world: World, data_lanes: int) -> list[str]:
    """Problems that depend on the number of processes."""
    problems = []
    if args.single_gpu and world.size > 1:
        problems.append(f"--single_gpu: torchrun started {world.size} processes; use --nproc_per_node 1")
    if args.compute_dtype is not None and world.size == 1:
        problems.append(
            f"--compute_dtype {args.compute_dtype}: parameters are cast when several processes gather them, and this run has "
            "one; use --dtype bfloat16, or start more (torchrun --nproc_per_node N)"
        )
    if data_lanes % world.size:
        fitting = data_lanes + world.size - data_lanes % world.size
        problems.append(
            f"--data_lanes {data_lanes}: must be a multiple of the {world.size} processes, which share the readers evenly; "
            f"use --data_lanes {fitting}"
        )
    return problems


def _parallel_problems(args: Arguments) -> list[str]:
    problems = []
    if args.parallel == "fsdp" and (reason := OPTIMIZERS[args.optimizer].not_shardable) is not None:
        problems.append(
            f"--parallel fsdp with --optimizer {args.optimizer}: {reason}; use adam8bit or adamw4bit, whose moments are small, "
            "or --parallel ddp"
        )
    if args.compute_dtype is not None and args.parallel != "fsdp":
        problems.append(
            f"--compute_dtype {args.compute_dtype} with --parallel {args.parallel}: parameters are cast as they are gathered; "
            "use --parallel fsdp, or --dtype bfloat16"
        )
    caches_weights = args.linear_cache == "weights" and args.linear_path != "factored" and METHODS[args.peft_model].factored
    if args.parallel == "fsdp" and caches_weights:
        problems.append(
            "--parallel fsdp with --linear_cache weights: between layers a process has only a part of each factor, from which it "
            "cannot build a weight; use --linear_cache positions"
        )
    return problems


# torchrun ends its processes 30 s after a signal; a save that a disk of this speed cannot make in 25 s is warned about.
_SLOW_DISK_BYTES_PER_S, _TIME_TO_SAVE_S = 200 * 10**6, 25


def schedule_arguments(args: Arguments, num_training_steps: int) -> dict[str, Any]:
    """The keyword arguments of `schedule.lr_at` and `schedule.validate`, all but the rate and the step."""
    return {
        "scheduler": args.scheduler,
        "num_training_steps": num_training_steps,
        "warmup_steps": args.warmup_steps,
        "min_lr_ratio": args.min_lr_ratio,
        "cycle_length": args.cycle_length,
        "restart_warmup_steps": args.restart_warmup_steps,
        "adjust_step": args.adjust_step,
    }


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
    if model.tie_word_embeddings and args.head_lr is not None:
        problems.append(
            f"--head_lr {args.head_lr:g}: {args.model_config} ties the output head to the embedding, one tensor with one rate; "
            "use --embedding_lr"
        )
    return problems + METHODS[args.peft_model].model_problems(args, model)


def _warnings(args: Arguments, world: World, model: ModelConfig, accumulation: int, dtype: str) -> list[str]:
    """What the user should know about a run that can start. dtype: of the parameters, also where --dtype was not given."""
    lines = []
    if args.dtype is None and args.stochastic_rounding and dtype == "float32" and args.weight_dtype is None:
        lines.append(
            "--stochastic_rounding has no effect with float32, the default dtype on this device: nothing is rounded; add "
            "--dtype bfloat16, or leave it out"
        )
    if args.dtype is None and args.compute_dtype == dtype:
        lines.append(
            f"--compute_dtype {dtype} has no effect: parameters have that dtype by default on this device; add --dtype float32 "
            "to keep them and their moments in float32"
        )
    if args.reduce_dtype is not None and world.size == 1:
        lines.append(f"--reduce_dtype {args.reduce_dtype} has no effect in one process: there is nothing to sum over")
    if args.parallel == "fsdp" and world.size == 1:
        lines.append("--parallel fsdp has no effect in one process: there is no other process to share with")
    lines += METHODS[args.peft_model].warnings(args, model)
    if args.accumulate == "moments" and accumulation == 1:
        lines.append(
            "--accumulate moments has no effect with one micro-batch per update: there are no gradients to keep between "
            "micro-batches; lower --batch_size, or raise --total_batch_size"
        )
    resets = reset_interval(args)
    if resets and args.max_train_tokens is None and resets >= args.num_training_steps:
        given = args.reset_moments_every is not None
        what = f"--reset_moments_every {resets}" if given else f"the default of --optimizer {args.optimizer}, {resets:,} updates,"
        lines.append(
            f"{what} with --num_training_steps {args.num_training_steps}: the run ends before a reset of the moments; "
            + ("lower it, or leave it out" if given else "choose an interval with --reset_moments_every, or 0 for none")
        )
    if (
        args.data_lanes is None
        and default_lanes(args.dataset) == 24
        and args.workers is not None
        and args.workers * world.size > 24
    ):
        lines.append(
            f"--workers {args.workers}: 24 data lanes keep at most 24 workers busy over all processes; "
            "lower --workers, or raise --data_lanes"
        )
    return lines


def _larger_than_dense(args: Arguments, num_parameters: int, full_rank_parameters: int) -> list[str]:
    """Returns a warning if factors and sparse values have more parameters than the dense weights in whose place they are."""
    if not METHODS[args.peft_model].factored or num_parameters <= full_rank_parameters:
        return []
    return [
        f"--rank {args.rank}: {num_parameters:,} parameters, more than the {full_rank_parameters:,} of the full-rank model; "
        "lower --rank, or use --peft_model full"
    ]


def _slow_save(num_bytes: dict[str, int]) -> list[str]:
    """Returns a warning if saving may take longer than launchers wait after a signal."""
    size = num_bytes["parameters"] + num_bytes["support"] + num_bytes["optimizer"]
    if size < _SLOW_DISK_BYTES_PER_S * _TIME_TO_SAVE_S:
        return []
    return [
        f"a checkpoint has {size / 1e9:.1f} GB: saved within {_TIME_TO_SAVE_S} s of a stop signal only by a disk that takes "
        f"{size / _TIME_TO_SAVE_S / 1e9:.2g} GB/s, and torchrun kills its processes 30 s after it unless "
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT (the recipes: 300) says otherwise; --save_minutes limits what may be lost"
    ]


def notices(args: Arguments) -> list[str]:
    """One line for each flag that was given and has no effect in this run."""
    lines = []
    for name, row in ROWS.items():
        if name not in args.given:
            continue
        if not has_effect(name, args.peft_model):
            lines.append(f"--{name} has no effect with --peft_model {args.peft_model}: it belongs to {_listed(owners(name))}")
        elif row.no_effect is not None and (reason := row.no_effect(args)) is not None:
            lines.append(f"--{name} has no effect {reason}")
    if (
        "restart_warmup_steps" in args.given
        and args.scheduler != "cosine_restarts"
        and METHODS[args.peft_model].restart(args) is None
    ):
        lines.append(f"--restart_warmup_steps has no effect with --scheduler {args.scheduler}: nothing restarts")
    return lines + METHODS[args.peft_model].notices(args)


def _listed(names: Sequence[str]) -> str:
    """Joins names as in a sentence: a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
