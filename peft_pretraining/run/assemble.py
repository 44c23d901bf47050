"""Builds a run from its parts (plan, folder, data, model, optimizer, record) and restores its checkpoint."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from peft_pretraining.checkpoint.saver import Saver
from peft_pretraining.checkpoint.step_folder import write_json
from peft_pretraining.config.arguments import Arguments, ConfigError
from peft_pretraining.data import DataError
from peft_pretraining.data.loader import Batch, merge_states
from peft_pretraining.data.mixture import Mixture, orders_text, source_lines
from peft_pretraining.distributed.device import DeviceMemory, device_memory, resolve_dtype, torch_dtype
from peft_pretraining.distributed.parallel import is_sharded, replicate
from peft_pretraining.distributed.world import World, all_reduce_sum_, broadcast_object, gather_objects, largest
from peft_pretraining.model.llama import keep_compiled_code
from peft_pretraining.plan.advice import memory_problems
from peft_pretraining.plan.plan import Plan, format_plan, make_plan
from peft_pretraining.record.recorder import Recorder, comparison, measured_bytes, peak_memory_bytes
from peft_pretraining.record.wandb_run import wandb_settings
from peft_pretraining.run.build import Data, build_data, build_token_loss, build_updates, start_cache
from peft_pretraining.run.folder import (
    RunFolder,
    changed_reading,
    check_same_data,
    check_same_tokenizer,
    open_run_folder,
    prepare_record,
    reading_rules,
    run_document,
)
from peft_pretraining.run.resume import RunParts, finished_state, refuse_if_finished, restore_data, restore_run, run_content
from peft_pretraining.training.evaluate import EvalResult, NothingToEvaluate, evaluate
from peft_pretraining.training.restarts import Restarts
from peft_pretraining.training.stop import Stopped, StopRequest, StopRun
from peft_pretraining.training.update import TrainState


@dataclass
class Run:
    """A run that is built and restored from its checkpoint, ready for the next update.

    module: maps (input_ids, labels, num_targets) to the sum of token losses. document: the contents of run.json.
    memory_logged: whether measured memory was logged already.
    """

    plan: Plan
    device: torch.device
    folder: RunFolder
    data: Data
    batches: Iterator[Batch]
    module: nn.Module
    parts: RunParts
    restarts: Restarts | None  # None for a run without restarts and resets
    document: dict[str, Any]
    stop: StopRequest
    saver: Saver
    cached_weights: Callable[[], AbstractContextManager[None]]  # the context of each update, see start_cache
    memory_logged: bool = False

    def data_row(self) -> dict[str, float]:
        """What a mixture has given, for the record; {} of a single data set."""
        return self.data.loader.row() if isinstance(self.data.source, Mixture) else {}

    def memory_row(self) -> dict[str, int]:
        """Returns measured and predicted memory for the record on the first call (after the first update), later {}."""
        if self.memory_logged:
            return {}
        self.memory_logged = True
        measured = measured_bytes(self.parts.model, self.parts.updates.optimizer)
        return comparison(self.plan.bytes, measured, peak_memory_bytes(self.device), self.device.type)


def least_memory(device: torch.device, world: World) -> DeviceMemory:
    """Returns the smallest memory of all processes' devices, so that all plan and refuse alike; every process calls it.

    Other programs may use some of the GPUs.
    """
    memories: list[DeviceMemory] = gather_objects(device_memory(device, world), world)
    rank = min(range(len(memories)), key=lambda rank: memories[rank].num_bytes)
    name = memories[rank].name
    return replace(memories[rank], name=f"{name} (process {rank})" if rank and name != memories[0].name else name)


def assemble(args: Arguments, world: World, device: torch.device) -> Run | None:
    """Builds a run and restores the checkpoint it resumes from; returns None if the run is finished already."""
    memory = least_memory(device, world)
    plan = make_plan(args, world, resolve_dtype(args.dtype, device), device.type, memory)
    problems = memory_problems(plan, args, memory)
    if problems and not args.force:
        raise ConfigError([*problems, "--force starts the run anyway"])
    folder = open_run_folder(args, plan, world)
    if (state := finished_state(folder.path, folder.checkpoint, args, plan)) is not None:
        print_finished(world, state, folder)
        return None
    if folder.warm_start and folder.checkpoint is not None:
        refuse_if_finished(folder.checkpoint, plan)
    data = _open_data(args, plan, world, device, folder)
    if world.is_main:
        # Printed now, because a checkpoint decides the order of its run's data.
        order = orders_text(data.source, data.loader.data_orders)
        print(format_plan(plan, args, data.source.describe(), memory, order), file=sys.stderr)
        for memory_problem in problems:
            print(f"warning: {memory_problem}", file=sys.stderr)
    # Started here so that the loader's workers read and tokenise while the model is built.
    batches = iter(data.loader)
    if args.compile and (problem := keep_compiled_code()) and world.is_main:
        print(f"notice: {problem}", file=sys.stderr)
    token_loss = build_token_loss(args, plan, world, device, data.tokenizer.eos_id, restored=folder.checkpoint is not None)
    updates = build_updates(args, token_loss.model, world, device, plan.gradient_accumulation)
    module: nn.Module = token_loss
    if not is_sharded(token_loss) and not updates.averages_gradients:
        module = replicate(token_loss, world, device, None if args.reduce_dtype is None else torch_dtype(args.reduce_dtype))
    parts = RunParts(token_loss.model, updates, data.loader, TrainState())
    # Only now: some libraries draw from Python's generator while they are imported.
    random.seed(args.seed)
    if folder.checkpoint is not None:
        restore_run(folder.checkpoint, parts, world, warm_start=folder.warm_start)
        world.say(_going_on(folder, parts.state, plan))
    document = run_document(args, plan, world, folder, data)
    restarts = Restarts(args, token_loss.model, updates, world)
    return Run(
        plan=plan,
        device=device,
        folder=folder,
        data=data,
        batches=batches,
        module=module,
        parts=parts,
        restarts=restarts if restarts.any else None,
        document=document,
        stop=StopRequest(speaks=world.local_rank == 0),
        saver=_build_saver(args, folder, parts, world, document),
        # Restoring a checkpoint writes positions in place, which would leave cached ones out of date.
        cached_weights=start_cache(args, plan, token_loss.model),
    )


def _build_saver(args: Arguments, folder: RunFolder, parts: RunParts, world: World, document: dict[str, Any]) -> Saver:
    return Saver(
        folder.path,
        lambda: run_content(folder.path, parts, world, document),
        world,
        keep=args.keep_checkpoints,
        keep_every=args.keep_every,
        minutes=args.save_minutes,
        asynchronous=args.async_save,
        saved_step=parts.state.update_step if folder.resumes_in_place else None,
        timeout_s=args.timeout_s,
    )


def _open_data(args: Arguments, plan: Plan, world: World, device: torch.device, folder: RunFolder) -> Data:
    """Opens the data and the tokenizer; of a resumed run, refuses other ones and restores the position. Raises ConfigError."""
    data = build_data(args, plan, world, device, reading_rules(folder.checkpoint, args))
    if world.is_main and (change := changed_reading(args, data.source)) is not None:
        print(f"notice: {change}", file=sys.stderr)
    if folder.checkpoint is not None:
        check_same_data(folder.checkpoint, args, data.source, data.held_out)
        check_same_tokenizer(folder.checkpoint, args, data.tokenizer)
        restore_data(folder.checkpoint, data.loader)
    return data


def _going_on(folder: RunFolder, state: TrainState, plan: Plan) -> str:
    """Returns the line that says from which checkpoint a run goes on."""
    assert folder.checkpoint is not None
    verb = "starting from the weights of" if folder.warm_start else "going on from"
    length = f"{plan.max_train_tokens:,} tokens" if plan.max_train_tokens is not None else f"{plan.num_training_steps:,} updates"
    made = f"{state.update_step:,} updates and {state.tokens_seen:,} tokens"
    return f"{verb} {folder.checkpoint.name} in {folder.checkpoint.parent}: {made} of {length}"


def next_micro_batches(run: Run, world: World) -> list[Batch]:
    """Returns this process's micro-batches of the next update. After an error of `_agreed` they go back to the loader."""
    loader = run.parts.loader
    position = loader.state_dict()
    micro_batches: list[Batch] = []
    try:
        _agreed(run, world, lambda: micro_batches.extend(next(run.batches) for _ in range(run.plan.gradient_accumulation)))
    except (StopRun, DataError):
        loader.take_back(position)
        raise
    return micro_batches


def _agreed(run: Run, world: World, read: Callable[[], None]) -> None:
    """Calls `read`, which waits for data, after which all processes agree whether to continue.

    Raises StopRun if any process was asked to stop or has no data; without data before the first update it raises DataError.
    In the same exchange rank 0 tells all that a save is due by its clock.
    """
    problem: str | None = None
    try:
        with run.stop.waiting():
            read()
    except Stopped:
        pass
    except DataError as error:
        problem = str(error)
    wanted = largest(3 if problem else 2 if run.stop.requested else int(run.saver.due_by_time()), world)
    if wanted == 3:
        problem = problem or "another process of this run has no more data; see its error message"
        raise StopRun(problem) if run.parts.state.update_step else DataError(problem)
    if wanted == 2:
        raise StopRun
    if wanted:
        run.saver.save_by_time()


def run_evaluation(run: Run, world: World) -> EvalResult:
    """Evaluates the held-out split over all processes.

    Raises StopRun if any process is asked to stop or cannot read its data, and NothingToEvaluate.
    """
    _agreed(run, world, run.data.eval_set.prepare)
    # Evaluation avoids DDP's wrapper, whose forward is collective. FSDP2's forward is collective too, so all processes must
    # stop at the same batch.
    inner = getattr(run.module, "module", run.module)
    stopping_world = world if is_sharded(run.module) else World()
    problem: NothingToEvaluate | None = None
    try:
        result = evaluate(
            inner,
            takewhile(lambda _: not largest(int(run.stop.requested), stopping_world), run.data.eval_set),
            world_reduce=lambda sums: all_reduce_sum_(sums, world),
            bytes_per_id=run.data.tokenizer.bytes_per_id(),
        )
    # Raised on all processes or none.
    except NothingToEvaluate as error:
        problem = error
    if largest(int(run.stop.requested), world):
        raise StopRun
    if problem is not None:
        raise problem
    return result


def open_record(args: Arguments, world: World, run: Run) -> Recorder:
    """Writes run.json and the tokenizer, and opens metrics.jsonl, the dashboard and the progress bar at the run's position."""
    folder = run.folder
    if world.is_main:
        prepare_record(folder)
        write_json(folder.path / "run.json", run.document)
        run.data.tokenizer.save(folder.path / "tokenizer")
    record = Recorder(
        folder.path,
        enabled=world.is_main,
        total_updates=run.plan.num_training_steps,
        start_step=run.parts.state.update_step,
        tracker_settings=(
            {"tracker": args.tracker, "mode": args.wandb, **wandb_settings(run.document, folder.path)} if world.is_main else {}
        ),
    )
    # All processes must agree whether an evaluation is due, and other machines may not have this folder.
    record.last_evaluated_step = broadcast_object(record.last_evaluated_step, world)
    return record


def print_finished(world: World, state: TrainState, folder: RunFolder) -> None:
    """Prints the last line of a finished run, on rank 0."""
    if world.is_main:
        print(f"finished {state.update_step:,} updates, {state.tokens_seen:,} tokens; everything is in {folder.path}")


def print_skipped_records(record: Recorder, run: Run, world: World) -> None:
    """Prints what each source of a mixture gave, and how many unusable records were skipped, by kind; every process calls it."""
    state = merge_states(gather_objects(run.parts.loader.state_dict(), world))
    for line in source_lines(state):
        record.say(line)
    counts = state["bad_records"]
    if counts:
        kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts.items())
        record.say(f"records skipped since the run began: {kinds}")
