"""Makes a published checkpoint the first checkpoint of a new run, which torchrun_main.py continues."""

from __future__ import annotations

import random
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peft_pretraining.checkpoint.step_folder import save_checkpoint, write_json
from peft_pretraining.commands.published.fill import fill, matching_sparsity
from peft_pretraining.commands.published.moments import carry_moments, other_betas
from peft_pretraining.commands.published.read import (
    CONFIG,
    OPTIMIZER,
    RELORA,
    SLTRAIN,
    STATE,
    PublishedCheckpoint,
    read_published,
)
from peft_pretraining.config.arguments import Arguments, ConfigError
from peft_pretraining.config.command_line import Unreadable, arguments_from
from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.distributed.device import pick_device
from peft_pretraining.distributed.world import World
from peft_pretraining.methods import METHODS
from peft_pretraining.plan.checks import notices, value_problems
from peft_pretraining.plan.schedule import is_finished
from peft_pretraining.run.assemble import Run, assemble
from peft_pretraining.run.folder import prepare_record
from peft_pretraining.run.resume import run_content

# File in the run's folder: a copy of the published one.
MODEL_CONFIG = "model_config.json"
# Flags that an import refuses, and why.
_REFUSED = {
    "continue_from": "the run continues the published checkpoint; leave it out",
    "warmed_up_model": "import the full-rank checkpoint as --peft_model full, then give this flag to torchrun_main.py",
    "allow_changes": "a new run has no earlier values to change; give the wanted values",
    "resume": "torchrun_main.py continues the imported checkpoint without it; leave it out",
    "dry_run": "import first, then give it to torchrun_main.py",
}
# Arguments that a continued run should keep, by their names in the published optimizer.pt.
_RECORDED = {
    "max_lr": "lr",
    **{name: name for name in ("optimizer", "scheduler", "warmup_steps", "min_lr_ratio", "num_training_steps")},
    **{name: name for name in ("cycle_length", "restart_warmup_steps", "total_batch_size", "max_length")},
    **{name: name for name in ("weight_decay", "grad_clipping")},
}


@dataclass(frozen=True)
class Imported:
    """The result of an import. argv: arguments of torchrun_main.py to continue. finished: no updates are left."""

    checkpoint: Path
    method: str
    update_step: int
    tokens_seen: int
    carried_over: list[str]
    not_carried_over: list[str]
    other_settings: list[str]
    argv: list[str]
    finished: bool

    @property
    def command(self) -> str:
        """The command that continues the training."""
        return shlex.join(["torchrun", "--standalone", "--nproc_per_node", "1", "torchrun_main.py", *self.argv])


def import_published(folder: Path, given: dict[str, Any]) -> Imported:
    """Makes the published checkpoint in `folder` the first one of a new run's folder; leaves nothing behind if that fails.

    Args:
        given: the flags given on the command line, by name; save_dir is required.

    Raises:
        PublishedError: the checkpoint is incomplete, or cannot be converted.
        ConfigError: flags that cannot work or contradict the checkpoint, or a save_dir that is not empty.
        DataError, TokenizerError, DeviceError, OptimizerUnavailable: as for torchrun_main.py.
        OSError: the disk is full, or a file cannot be written.
    """
    save_dir = _new_folder(given)
    published = read_published(folder)
    args, flags = _arguments(published, given)
    model_notices: list[str] = []
    load_model_config(args.model_config, model_notices)
    for line in (*model_notices, *notices(args)):
        print(f"notice: {line}", file=sys.stderr)
    existed = save_dir.exists()
    save_dir.mkdir(parents=True, exist_ok=True)
    try:
        if "model_config" not in given:
            args.model_config = flags["model_config"] = str(save_dir / MODEL_CONFIG)
            shutil.copyfile(folder / CONFIG, save_dir / MODEL_CONFIG)
        return _carry(published, args, flags)
    except BaseException:
        for path in save_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not existed:
            save_dir.rmdir()
        raise


def _new_folder(given: dict[str, Any]) -> Path:
    if unreadable := [value.problem for value in given.values() if isinstance(value, Unreadable)]:
        raise ConfigError(unreadable)
    if "save_dir" not in given:
        raise ConfigError(["--save_dir is required: name a new folder for the run, e.g. --save_dir runs/imported"])
    problems = [
        f"--{name} {given[name]}: not allowed in an import: {reason}" for name, reason in _REFUSED.items() if name in given
    ]
    save_dir = Path(given["save_dir"])
    if save_dir.exists() and (not save_dir.is_dir() or any(save_dir.iterdir())):
        problems.append(f"--save_dir {save_dir}: exists and is not an empty folder; name another folder, or remove it")
    if problems:
        raise ConfigError(problems)
    return save_dir


def _implied(published: PublishedCheckpoint) -> dict[str, Any]:
    """The flags that follow from the checkpoint."""
    if not METHODS[published.method].replaces_linears:
        return {}
    settings = published.settings
    flags: dict[str, Any] = {"peft_model": published.method, "rank": settings["r"]}
    flags["train_scaling"] = published.trained_scaling
    if not published.trained_scaling:
        flags["lora_alpha"] = float(settings["lora_alpha"])
    if METHODS[published.method].sparse:
        flags |= {"sp_ratio": matching_sparsity(float(settings["sp_ratio"]), published.tensors), "support": "uniform"}
    return flags


def _arguments(published: PublishedCheckpoint, given: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    """Returns the run's arguments, and the flags that produce them: those given, those that follow from the checkpoint, and its
    model and dtype as defaults. Raises ConfigError if given flags contradict the checkpoint."""
    if given.get("sp_ratio") == published.settings.get("sp_ratio"):
        given = {name: value for name, value in given.items() if name != "sp_ratio"}
    implied = _implied(published)
    weights = published.tensors.get("model.embed_tokens.weight", torch.empty(0))
    flags = {
        "model_config": str(published.folder / CONFIG),
        "dtype": "bfloat16" if weights.dtype == torch.bfloat16 else "float32",
        **{name: value for name, value in implied.items() if value is not False},
        **given,
    }
    args = arguments_from(flags)
    if unusable := value_problems(args):
        raise ConfigError(unusable)
    file = RELORA if published.by_relora else SLTRAIN
    problems = [
        f"--{name} {given[name]}: {published.folder / file} and the weights require {value}; leave the flag out"
        for name, value in implied.items()
        if name in given and getattr(args, name) != value
    ]
    if not METHODS[published.method].replaces_linears and METHODS[args.peft_model].replaces_linears:
        # A checkpoint of GaLore does not record its method.
        dense = " or ".join(name for name, method in METHODS.items() if not method.replaces_linears)
        problems.append(
            f"--peft_model {args.peft_model}: {published.folder} holds dense weights, which continue as {dense}; for "
            "relora, import them as full and start a run with --warmed_up_model"
        )
    published_model, model = (load_model_config(path) for path in (published.folder / CONFIG, args.model_config))
    problems += [
        f"--model_config {args.model_config}: {key} is {value}, {published_model.path} has {getattr(published_model, key)}; "
        "leave the flag out"
        for key, value in asdict(model).items()
        if key not in ("name", "path") and value != getattr(published_model, key)
    ]
    if problems:
        raise ConfigError(problems)
    return args, flags


def _carry(published: PublishedCheckpoint, args: Arguments, flags: dict[str, Any]) -> Imported:
    """Builds the run, fills it with the published checkpoint and saves it."""
    world = World()
    device = pick_device(args.device, world)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    run = assemble(args, world, device)
    # It is None for a finished run, which an empty folder does not hold.
    assert run is not None
    try:
        parts = run.parts
        fill(parts.model, published, tied=run.plan.model.tie_word_embeddings)
        moments_problem = carry_moments(published, parts.model, parts.updates, args)
        parts.state.update_step = published.update_step or 0
        parts.state.tokens_seen = published.tokens_seen or 0
        run.document["continued_from"] = str(published.folder)
        prepare_record(run.folder)
        run.data.tokenizer.save(run.folder.path / "tokenizer")
        write_json(run.folder.path / "run.json", run.document)
        checkpoint = save_checkpoint(run.folder.path, run_content(run.folder.path, parts, world, run.document), world)
    finally:
        run.data.loader.close()
    return Imported(
        checkpoint,
        args.peft_model,
        parts.state.update_step,
        parts.state.tokens_seen,
        _carried(published, moments_problem),
        _not_carried(published, args, moments_problem),
        _other_settings(published, args, run),
        [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in flags.items()],
        is_finished(run.plan, parts.state.update_step, parts.state.tokens_seen),
    )


def _carried(published: PublishedCheckpoint, moments_problem: str | None) -> list[str]:
    weights = {
        "sltrain": "weights: dense ones, B, A, values and positions of S",
        "relora": "weights: frozen ones, B and A",
        "lowrank": "weights: dense ones, B and A",
        "full": "weights",
    }
    counts = {"updates made": published.update_step, "tokens seen": published.tokens_seen}
    return [
        weights[published.method],
        *([] if moments_problem else ["optimizer: moments and step counts"]),
        *(f"{name}: {count:,}" for name, count in counts.items() if count is not None),
    ]


def _not_carried(published: PublishedCheckpoint, args: Arguments, moments_problem: str | None) -> list[str]:
    """Describes what is not carried over, and what replaces it."""
    lines = [f"moments: {moments_problem}; they start at zero"] if moments_problem else []
    if published.update_step is None:
        lines.append(f"updates made: not recorded in {STATE} or {OPTIMIZER}; the schedule starts at update 0")
    if published.tokens_seen is None:
        lines.append(f"tokens seen: not recorded in {STATE}; counted from 0")
    weights = published.tensors["model.embed_tokens.weight"].dtype
    if f"torch.{args.dtype}" != str(weights):
        lines.append(f"dtype {str(weights).removeprefix('torch.')}: weights and moments are {args.dtype} from now on")
    if args.weight_dtype is not None:
        lines.append(f"weights: rounded to --weight_dtype {args.weight_dtype}")
    if (dropout := published.settings.get("lora_dropout")) and published.by_relora:
        lines.append(f"lora_dropout {dropout}: not supported, dropout is 0 from now on")
    if METHODS[args.peft_model].projected:
        lines.append("projections: recomputed from the gradients of the first update")
    if (betas := other_betas(published, args)) is not None and not moments_problem:
        lines.append(betas)
    return [
        *lines,
        "scheduler state: the learning rate follows from the number of updates and the flags",
        "position and order of the data: the run starts at the first record, in the order of --seed and --data_lanes",
        f"random states: initialised from --seed {args.seed}",
    ]


def _other_settings(published: PublishedCheckpoint, args: Arguments, run: Run) -> list[str]:
    """Lists arguments recorded by the published run that differ from this run's."""
    recorded = (published.optimizer or {}).get("config")
    lines = []
    for published_name, name in _RECORDED.items():
        if not isinstance(recorded, dict) or published_name not in recorded:
            continue
        then, now = recorded[published_name], getattr(args if name != "total_batch_size" else run.plan, name)
        then = then.lower() if isinstance(then, str) else then
        # 0 and None both mean off.
        if then != now and (then or now):
            lines.append(f"{name} {now} (published: {then})")
    return lines
