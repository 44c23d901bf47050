"""Chooses a run's folder and the checkpoint it resumes from, and writes run.json, which records how the run was made.

A run resumes only if its arguments and its model's shape agree with the checkpoint's, except where a flag may change.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_pretraining.checkpoint import step_folder as checkpoint
from peft_pretraining.config.arguments import ROWS, Arguments, ConfigError, allowed_changes, as_dict
from peft_pretraining.config.files import PathError, expanded
from peft_pretraining.data import DataError
from peft_pretraining.data.mixture import Mixture, open_dataset
from peft_pretraining.data.source import READING_RULES, Source, recorded_rules
from peft_pretraining.distributed.world import World, broadcast_object
from peft_pretraining.methods import METHODS
from peft_pretraining.plan.plan import Plan
from peft_pretraining.record.summary import METRICS_FILE, keep_record, old_record
from peft_pretraining.run.folder_lock import LOCK_FILE, lock_folder
from peft_pretraining.run.resume import belongs_to, finished_state, train_state
from peft_pretraining.training.stop import MARKER_FILE

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer
    from peft_pretraining.run.build import Data

_PACKAGES = ("torch", "transformers", "datasets", "bitsandbytes", "torchao", "triton", "sentencepiece", "wandb", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """The folder a run writes to and the checkpoint it starts from (None: initial values drawn from the seed).

    wandb_id: the run's identifier at wandb.
    warm_start: True if the checkpoint belongs to a full-rank run (--warmed_up_model), whose weights and position are read.
    warm_up: arguments and number of updates of the full-rank run that this run started from, else None.
    """

    path: Path
    checkpoint: Path | None
    wandb_id: str
    warm_start: bool = False
    warm_up: dict[str, Any] | None = None

    @property
    def resumes_in_place(self) -> bool:
        """True if the run resumes from a checkpoint in its own folder."""
        return self.checkpoint is not None and belongs_to(self.checkpoint, self.path)


def open_run_folder(args: Arguments, plan: Plan, world: World) -> RunFolder:
    """Chooses and creates the run's folder; returns the same result on every process.

    Raises:
        CheckpointError: --continue_from names no checkpoint or a damaged one, or all checkpoints in the folder are damaged.
        ConfigError: the checkpoint was made with other arguments, or the folder contains another run, or one that is in progress.
        OSError: the folder cannot be written.
    """
    choice: RunFolder | Exception | None = None
    if world.is_main:
        try:
            choice = _choose(args, plan)
        except (checkpoint.CheckpointError, ConfigError, OSError) as error:
            choice = error
    choice = broadcast_object(choice, world)
    if isinstance(choice, Exception):
        raise choice
    assert isinstance(choice, RunFolder)
    return choice


def _choose(args: Arguments, plan: Plan) -> RunFolder:
    path = plan.save_dir
    newest = None
    if args.resume == "never":
        path = _unused_path(path)
    if path.is_dir():  # locked before anything in it is read or moved
        lock_folder(path)
    if args.continue_from is not None:
        checkpoint.recover_replaced(Path(args.continue_from))
        newest = checkpoint.resolve(Path(args.continue_from))
    elif args.resume == "auto":
        checkpoint.recover_replaced(path)
        newest = checkpoint.resolve(path) if checkpoint.list_checkpoints(path) else None
        if newest is None and (lost := checkpoint.missing_checkpoints(path)) is not None:
            raise checkpoint.CheckpointError(f"{path} has no checkpoint: {lost}; to start anew: --resume never")
    warm_start = newest is None and args.warmed_up_model is not None and METHODS[args.peft_model].frozen_base
    if warm_start:
        newest = checkpoint.resolve(Path(str(args.warmed_up_model)))
    wandb_id = secrets.token_hex(4)
    warm_up = None
    if newest is None and args.allow_changes:
        print(f"notice: --allow_changes {args.allow_changes} has no effect: the run starts from the beginning", file=sys.stderr)
    if newest is not None:
        before = _read_record(newest)
        warm_up = before["warm_up"]
        if warm_start:
            _check_full_rank(newest, before)
            warm_up = {"updates": train_state(newest).update_step, "arguments": before["arguments"]}
        changed = _check_same_run(newest, before, args, plan, warm_start)
        if not changed.isdisjoint(EVALUATION_FLAGS) and finished_state(path, newest, args, plan) is not None:
            raise ConfigError([f"{newest} is finished and is not evaluated again; use {_evaluate_command(newest, args)}"])
        _warn_of_changed_environment(newest, before, plan)
        if args.accumulate == "moments" and not warm_start:
            _warn_of_other_micro_batches(newest, before, plan)
        if belongs_to(newest, path):
            wandb_id = before["wandb_id"]
        elif any(not one.samefile(newest) for one in checkpoint.list_checkpoints(path)):
            raise ConfigError([f"--continue_from {newest}: {_other_run(path, newest)}"])
    checkpoint.make_run_folder(path)
    lock_folder(path)
    # Removed before anything can fail, so that a script never reads the marker of an earlier start.
    (path / MARKER_FILE).unlink(missing_ok=True)
    return RunFolder(path, newest, os.environ.get("WANDB_RUN_ID", "").strip() or wandb_id, warm_start, warm_up)


def _other_run(path: Path, newest: Path) -> str:
    """Why a run cannot go on in the folder `path`, which has checkpoints, from one elsewhere; and the way out."""
    if newest.resolve().parent == path.resolve() / checkpoint.SET_ASIDE:
        return f"was set aside; to go back to it, move it to {path / newest.name} and name that"
    return f"{path} already contains another run; leave out --continue_from to resume that run, or name another --save_dir"


def _check_full_rank(path: Path, before: dict[str, Any]) -> None:
    method = before["arguments"]["peft_model"]
    if not _is_full_rank(method):
        raise ConfigError(
            [
                f"--warmed_up_model {path}: was made with --peft_model {method}; ReLoRA starts from the dense weights of "
                "--peft_model full; to resume a ReLoRA run use --continue_from"
            ]
        )


def _is_full_rank(method: Any) -> bool:
    return isinstance(method, str) and method in METHODS and METHODS[method].full_rank


def prepare_record(folder: RunFolder) -> None:
    """Makes the folder's contents agree with the checkpoint the run starts from; on rank 0, after all parts were built.

    A run that goes back in its own folder moves later checkpoints aside and keeps a copy of the record (metrics.jsonl). Another
    run renames a record that it finds; one resumed from another folder then copies the record from there.
    """
    record = folder.path / METRICS_FILE
    if folder.checkpoint is not None and folder.resumes_in_place:
        if _move_later_checkpoints(folder.path, folder.checkpoint) and record.is_file():
            keep_record(record)
        return
    if record.exists():
        old = record.rename(old_record(record))
        print(
            f"notice: {folder.path} contains {METRICS_FILE} but no checkpoint; the file is kept as {old.name}",
            file=sys.stderr,
        )
    if folder.checkpoint is not None and (source := folder.checkpoint.resolve().parent / METRICS_FILE).is_file():
        shutil.copyfile(source, record)


def _unused_path(path: Path) -> Path:
    """Returns `path` if it is absent or has no file but a lock, otherwise the first free one of path-2, path-3, ..."""
    number, candidate = 1, path
    while candidate.exists() and any(entry.name != LOCK_FILE for entry in candidate.iterdir()):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _move_later_checkpoints(run_folder: Path, chosen: Path) -> bool:
    """Moves checkpoints with more updates than the chosen one to set_aside/; returns whether there were any.

    They are damaged, or the run no longer continues from them.
    """
    number = train_state(chosen).update_step
    later = [path for path in checkpoint.list_checkpoints(run_folder) if (checkpoint.num_updates(path) or 0) > number]
    for path in later:
        target = _unused_path(run_folder / checkpoint.SET_ASIDE / path.name)
        target.parent.mkdir(exist_ok=True)
        if path.is_symlink():
            # A relative link would lead elsewhere from its new place.
            target.symlink_to(path.resolve())
            path.unlink()
        else:
            path.rename(target)
        print(f"notice: resuming from {chosen.name}; the later checkpoint {path.name} is moved to {target}", file=sys.stderr)
    return bool(later)


def _read_record(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's run.json and returns the parts that are compared. Raises CheckpointError."""
    record = checkpoint.read_json(path / "run.json")
    try:
        # Arguments that an earlier version did not record, or recorded as None, had today's default values.
        recorded = {name: value for name, value in record["arguments"].items() if value is not None}
        arguments = {**as_dict(Arguments()), **recorded}
        # The order that the run has, also if none was asked for; earlier versions had no other order than lanes.
        arguments["data_order"] = record["dataset"].get("order", "lanes")
        if not isinstance(record["plan"]["model"], dict):
            raise TypeError("the plan has no model")
        package_versions, world, machine = (dict(record.get(name) or {}) for name in ("versions", "world", "machine"))
        fingerprint = str(record["dataset"]["fingerprint"])
        # Earlier versions recorded neither the held-out data nor what the tokenizer does.
        held_out = record["dataset"].get("held_out_fingerprint")
        tokenizer = record["dataset"].get("tokenizer_fingerprint")
        sources = list(record["dataset"].get("sources", ()))
        changes = list(record.get("changes", ()))
        wandb_id = str(record["wandb_id"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise checkpoint.CheckpointError(f"{path / 'run.json'}: not the record of a run ({error!r})") from None
    return {
        "arguments": arguments,
        "plan": record["plan"],
        "versions": package_versions,
        "world": world,
        "machine": machine,
        "fingerprint": fingerprint,
        "held_out": held_out,
        "tokenizer": tokenizer,
        "sources": sources,
        "changes": changes,
        "wandb_id": wandb_id,
        "warm_up": record.get("warm_up"),
    }


def _check_same_run(path: Path, before: dict[str, Any], args: Arguments, plan: Plan, warm_start: bool) -> set[str]:
    """Returns the names of the arguments that differ from the checkpoint's, all allowed by --allow_changes or by a warm start.

    Raises ConfigError if other arguments differ, with both values and the way out.
    """
    differing = differing_arguments(before["arguments"], before["plan"], args, plan)
    allowed = allowed_changes(args) | {name for name, row in ROWS.items() if warm_start and row.warm_start}
    # Data and tokenizer are compared later, by their contents.
    if unused := sorted(allowed_changes(args) - set(differing) - {"dataset", "eval_dataset", "tokenizer"}):
        print(f"notice: --allow_changes {','.join(unused)} has no effect: {path} has the same values", file=sys.stderr)
    problems = []
    for name, (then, now) in differing.items():
        if name in allowed:
            continue
        if name == "weight_dtype" and warm_start:
            problems.append(
                f"--warmed_up_model {path}: its weights are stored in {then}, ReLoRA's frozen weights are not; name a full-rank "
                "run made without --weight_dtype"
            )
            continue
        way_out = f"--allow_changes {name}, " if ROWS[name].on_resume == "if_allowed" else ""
        if name == "peft_model" and _is_full_rank(then) and METHODS[str(now)].frozen_base:
            way_out = f"--warmed_up_model {path} instead of --continue_from to start from its weights, "
        other = f"another --save_dir; to evaluate alone use {_evaluate_command(path, args)}"
        other = other if name in EVALUATION_FLAGS else "another --save_dir"
        given, back = "not given" if now is None else now, "leave it out" if then is None else f"use {then}"
        made = "without it" if then is None else f"with {then}"
        problems.append(f"--{name} {given}: {path} was made {made}; {back}, {way_out}or {other}")
    problems += [
        f"{args.model_config}: {key} is {now}, {path} was made with {then}; use that model file, or another --save_dir"
        for key, (then, now) in differing_shape(before["plan"], plan).items()
    ]
    if problems:
        raise ConfigError(problems)
    return set(differing)


def _evaluate_command(path: Path, args: Arguments) -> str:
    """Returns the command that evaluates the checkpoint on the requested held-out data."""
    tokens = "" if args.eval_tokens is None else f" --eval_tokens {args.eval_tokens}"
    return f"`python -m peft_pretraining evaluate --checkpoint {path} --dataset {args.eval_dataset or args.dataset}{tokens}`"


def check_same_data(path: Path, args: Arguments, source: Source | Mixture, held_out: Source | Mixture) -> None:
    """Refuses to resume with data that differs from the checkpoint's; the same files at another path are accepted.

    Raises ConfigError.
    """
    before = _read_record(path)
    # --text_field is part of the fingerprint and is compared as an argument already.
    source, held_out = (data.with_text_field(before["arguments"]["text_field"]) for data in (source, held_out))
    fingerprint = source.fingerprint
    if fingerprint != before["fingerprint"] and "dataset" not in allowed_changes(args):
        if (problem := _changed_weights(path, args, source, before["sources"])) is not None:
            raise ConfigError([problem])
        raise ConfigError(
            [
                f"--dataset {args.dataset}: its files (names, sizes, first and last bytes) differ from those of --dataset "
                f"{before['arguments']['dataset']} that {path} was made with: fingerprint {fingerprint} instead of "
                f"{before['fingerprint']}; restore the files, or continue with the new ones from the same position: "
                "--allow_changes dataset"
            ]
        )
    names = {"eval_dataset"} if args.eval_dataset is not None else {"eval_dataset", "dataset"}
    if before["held_out"] not in (None, held_out.fingerprint) and not names & allowed_changes(args):
        raise ConfigError(
            [
                f"--eval_dataset {args.eval_dataset or args.dataset}: its held-out files (names, sizes, first and last bytes) "
                f"differ from those that {path} was made with; restore them, or evaluate on the new ones from here on, "
                "under the same key: --allow_changes eval_dataset"
            ]
        )


def check_same_tokenizer(path: Path, args: Arguments, tokenizer: Tokenizer) -> None:
    """Refuses to resume with a tokenizer that gives other ids than the checkpoint's, whatever its name. Raises ConfigError."""
    before = _read_record(path)["tokenizer"]
    if before not in (None, tokenizer.fingerprint) and "tokenizer" not in allowed_changes(args):
        raise ConfigError(
            [
                f"--tokenizer {args.tokenizer or tokenizer.name}: gives other ids than the one that {path} was made with, which "
                f"is in {path / 'tokenizer'}; restore it, or continue with the new one: --allow_changes tokenizer"
            ]
        )


def _changed_weights(path: Path, args: Arguments, source: Source | Mixture, before: list[dict[str, Any]]) -> str | None:
    """Returns the problem if a mixture has the checkpoint's data sets with other weights; None if the data sets differ."""
    if not isinstance(source, Mixture):
        return None
    weights = {each["fingerprint"]: float(each["weight"]) for each in before}
    fingerprints = source.fingerprints()
    if weights.keys() != set(fingerprints):
        return None
    changes = ", ".join(
        f"{each.dataset} {now:.2%} instead of {weights[fingerprint]:.2%}"
        for each, fingerprint, now in zip(source.sources, fingerprints, source.weights or (), strict=True)
        if now != weights[fingerprint]
    )
    return (
        f"--dataset {args.dataset}: its weights differ from those that {path} was made with: {changes}; restore them, or mix by "
        "the new ones from here on: --allow_changes dataset"
    )


def reading_rules(path: Path | None, args: Arguments) -> int:
    """Returns the rules for files and splits with which the checkpoint's run began; today's without one.

    Also today's where --allow_changes names the data set: that is how an old run comes to read the files that today's rules
    choose. Raises CheckpointError.
    """
    if path is None or "dataset" in allowed_changes(args):
        return READING_RULES
    return recorded_rules(checkpoint.read_json(path / "run.json"))


def changed_reading(args: Arguments, source: Source | Mixture) -> str | None:
    """Returns a notice if a run keeps an earlier version's rules for files and splits, and today's choose others; else None."""
    if source.rules == READING_RULES:
        return None
    try:
        today = open_dataset(args.dataset, "train", text_field=args.text_field)
    except DataError as error:
        return f"this run keeps the rules for files and splits that it began with; today's rules refuse its data: {error}"
    if replace(today, rules=source.rules).fingerprint == source.fingerprint:
        return None
    return (
        "this run keeps the rules for files and splits that it began with (docs/data.md); a new run would read "
        f"{today.describe()}; to continue this run with these files instead: --allow_changes dataset"
    )


def _warn_of_changed_environment(path: Path, before: dict[str, Any], plan: Plan) -> None:
    """Prints a notice if package versions, processes, threads or hardware changed, so that results are not bit-identical."""
    names = ("torch", "transformers", "bitsandbytes", "torchao", "triton")
    then = {name: before["versions"].get(name) for name in names}
    now = {name: versions().get(name) for name in names}
    for values, world, machine in (
        (then, before["world"], before["machine"]),
        (now, {"processes": plan.world_size, "threads": torch.get_num_threads()}, _machine()),
    ):
        values |= {"processes": world.get("processes"), "threads": world.get("threads")}
        values |= {"CPU capability": machine.get("cpu_capability"), "GPU": machine.get("gpu")}
    # Earlier versions of this program did not record the build of torch: 2.11.0 instead of 2.11.0+cu130.
    if "+" not in str(then["torch"]) and then["torch"] == str(now["torch"]).partition("+")[0]:
        then["torch"] = now["torch"]
    changes = [f"{name} {now[name]} (before: {then[name]})" for name in now if now[name] != then[name]]
    if changes:
        print(
            f"notice: resuming from {path} with {', '.join(changes)}: data order and schedule are unchanged; results will not be "
            "bit-identical",
            file=sys.stderr,
        )


def _warn_of_other_micro_batches(path: Path, before: dict[str, Any], plan: Plan) -> None:
    """Prints a notice if an update, accumulated in moments, has another number of micro-batches than before."""
    then, now = before["plan"].get("gradient_accumulation"), plan.gradient_accumulation
    if then not in (None, now):
        size, left = divmod(plan.total_batch_size, then)
        keep = "" if left or not size else f"; to keep them choose --batch_size so that --batch_size times processes is {size}"
        print(
            f"notice: resuming from {path} with {now} micro-batches per update (before: {then}): --accumulate moments makes "
            "second moments from the gradients of micro-batches, so they change by more than rounding" + keep,
            file=sys.stderr,
        )


def run_document(args: Arguments, plan: Plan, world: World, folder: RunFolder, data: Data) -> dict[str, Any]:
    """Returns the contents of run.json: everything needed to reproduce the run, and no secrets."""
    source = data.source
    return {
        "arguments": as_dict(args),
        "plan": plan_document(plan),
        "wandb_id": folder.wandb_id,
        "continued_from": None if folder.checkpoint is None else str(folder.checkpoint),
        "warm_up": folder.warm_up,
        "changes": _changes(args, plan, folder, data),
        "dataset": {
            "description": source.describe().replace("\n", "; "),
            "fingerprint": source.fingerprint,
            "held_out_fingerprint": data.held_out.fingerprint,
            "order": data.loader.data_order,
            "reading_rules": source.rules,
            "tokenizer_fingerprint": data.tokenizer.fingerprint,
            **({"sources": source.document()} if isinstance(source, Mixture) else {}),
        },
        "versions": versions(),
        "git_commit": _git_commit(),
        "world": {
            "processes": world.size,
            # On the machine of process 0.
            "local_processes": world.local_size,
            "threads": torch.get_num_threads(),
        },
        "machine": _machine(),
        # Other settings that results depend on (docs/resume.md).
        "numerics": {
            "attention": "sdpa",
            "compiled_layers": args.compile,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        },
    }


def _changes(args: Arguments, plan: Plan, folder: RunFolder, data: Data) -> list[dict[str, Any]]:
    """What resumed starts changed by --allow_changes, in order: the argument, both values, and the updates made before."""
    if folder.checkpoint is None or folder.warm_start:
        return []
    before = _read_record(folder.checkpoint)
    differing = differing_arguments(before["arguments"], before["plan"], args, plan)
    if data.source.with_text_field(before["arguments"]["text_field"]).fingerprint != before["fingerprint"]:
        differing["dataset"] = before["arguments"]["dataset"], args.dataset
    if before["tokenizer"] not in (None, data.tokenizer.fingerprint):
        differing["tokenizer"] = before["arguments"]["tokenizer"], args.tokenizer
    step = train_state(folder.checkpoint).update_step
    new = [{"after_update": step, "name": name, "then": then, "now": now} for name, (then, now) in differing.items()]
    return [*before["changes"], *new]


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def plan_document(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON-serialisable values."""
    return {**asdict(plan), "save_dir": str(plan.save_dir)}


def versions() -> dict[str, str]:
    """Returns the installed versions of Python and of the packages that results depend on."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # With the build, such as 2.11.0+cu130, which the metadata of torch's package leaves out.
    return installed | {"torch": str(torch.__version__)}


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


# Compared as resolved by the plan, because their defaults depend on the machine, the data or other arguments.
_RESOLVED = ("data_lanes", "total_batch_size", "dtype", "eval_tokens")
# Compared by content instead of path: by `differing_shape`, and by the data's fingerprint.
_BY_CONTENT = ("model_config", "dataset")
_PATHS = ("warmed_up_model", "eval_dataset", "tokenizer")
# These affect evaluations only, not the trained model.
EVALUATION_FLAGS = ("eval_dataset", "eval_tokens")


def differing_arguments(
    arguments: Mapping[str, Any], plan: Mapping[str, Any], args: Arguments, new_plan: Plan
) -> dict[str, tuple[Any, Any]]:
    """Returns (recorded, requested) of every differing argument that may not change freely, by name.

    The data and the model's shape are compared elsewhere. arguments, plan: the recorded run's, from its run.json.
    """
    then, now = dict(arguments), as_dict(args)
    for name in _RESOLVED:
        then[name], now[name] = plan.get(name), getattr(new_plan, name)
    compared = {name for name, row in ROWS.items() if row.on_resume != "freely" and name not in _BY_CONTENT}
    if args.data_order is None or "dataset" in allowed_changes(args):
        # The resumed run keeps the order that it has; other data may have another order.
        compared.remove("data_order")
    if args.max_train_tokens is not None and then["max_train_tokens"] is not None:
        # --num_training_steps has no effect in either run.
        compared.remove("num_training_steps")
    if then["weight_dtype"] != now["weight_dtype"] and "stochastic_rounding" not in args.given:
        # It follows from --weight_dtype.
        compared.remove("stochastic_rounding")
    differing = {name: (then[name], now[name]) for name in sorted(compared) if then[name] != now[name]}
    return {name: values for name, values in differing.items() if name not in _PATHS or not same_place(*values)}


def same_place(one: Any, other: Any) -> bool:
    """Whether two paths lead to the same place; a path may contain ~ and variables that are not set here."""
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    try:
        return Path(expanded(one)).resolve() == Path(expanded(other)).resolve()
    except PathError:
        return one == other


def differing_shape(plan: Mapping[str, Any], new_plan: Plan) -> dict[str, tuple[Any, Any]]:
    """Returns (recorded, requested) of every differing entry of the model's configuration, by name."""
    then = plan["model"]
    shape = {key: value for key, value in asdict(new_plan.model).items() if key not in ("name", "path")}
    return {key: (then.get(key), value) for key, value in shape.items() if then.get(key) != value}
