"""Ends a run early: on request, when data is missing, after a non-finite loss or gradient, or when memory runs out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from peft_pretraining.checkpoint.step_folder import save_checkpoint, write_json
from peft_pretraining.config.arguments import Arguments
from peft_pretraining.data.loader import Batch
from peft_pretraining.distributed.device import allocation_failure, device_memory
from peft_pretraining.distributed.world import LAUNCHED, World, gather_objects
from peft_pretraining.plan.advice import out_of_memory_problem
from peft_pretraining.plan.plan import make_plan
from peft_pretraining.run.assemble import Run
from peft_pretraining.run.resume import run_content
from peft_pretraining.training.stop import MARKER_FILE, StopRun
from peft_pretraining.training.update import WAY_OUT, StepResult, TrainingError


def end_early(run: Run, args: Arguments, world: World, stopped: StopRun) -> str | None:
    """Saves the run and returns an error message, or None if the stop was requested, in which case a marker file is written.

    All updates must have been logged.
    """
    state, folder = run.parts.state, run.folder
    kept = "no update was made yet"
    if state.update_step:
        run.saver.save()
        run.saver.finish()
        kept = f"everything up to update {state.update_step:,} is saved in {folder.path}; {how_to_resume(args, folder.path)}"
    if stopped.problem is not None:
        return f"{stopped.problem}; {kept}"
    if world.is_main:
        marker = {"signal": run.stop.signal_name, "update_step": state.update_step, "tokens_seen": state.tokens_seen}
        write_json(folder.path / MARKER_FILE, marker)
    plain_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and LAUNCHED not in os.environ
    follows = "; a SignalException of torchrun below means only that it got the signal too" if plain_torchrun else ""
    world.say(f"stopped on request ({run.stop.signal_name or 'on another process'}): {kept}{follows}", sys.stdout)
    return None


def how_to_resume(args: Arguments, folder: Path) -> str:
    """Returns a sentence that says which command resumes the run in `folder`."""
    left_out = [f"--continue_from {args.continue_from}"] if args.continue_from else []
    left_out += ["--resume never"] if args.resume == "never" else []
    if not left_out:
        return "run the same command again to resume"
    return f"to resume, run the same command without {' and '.join(left_out)} and with --save_dir {folder}"


def keep_for_inspection(run: Run, args: Arguments, world: World, micro_batches: Sequence[Batch], step: StepResult) -> NoReturn:
    """Saves the state in which a non-finite update leaves the run, and the update's token ids, to nonfinite/ in the run's folder.

    The saved data position is after that update, so a run resumed from this state skips its sequences. With --per_layer the
    tensors with finite gradients have been stepped already. Raises TrainingError.
    """
    folder = run.folder.path / "nonfinite"
    number = run.parts.state.update_step + 1
    ids = gather_objects([batch.input_ids.tolist() for batch in micro_batches], world)
    content = run_content(run.folder.path, run.parts, world, run.document)
    path = save_checkpoint(folder, content, world)
    record = folder / f"update_{number:08d}.json"
    if world.is_main:
        numbers = {"loss": str(float(step.loss)), "gradnorm": str(float(step.gradnorm)), "tensors": int(step.skipped)}
        write_json(record, {"update_step": number, **numbers, "input_ids": ids})
    stepped = args.per_layer and bool(torch.isfinite(step.loss))
    in_moments = args.accumulate == "moments" and len(micro_batches) > 1
    notes = ["other tensors already stepped"] if stepped else []
    notes += ["moments may contain finite micro-batches of the update"] if in_moments else []
    state = f"State ({'; '.join(notes)})" if notes else "State before the update"
    raise TrainingError(
        f"update {number}: non-finite loss ({float(step.loss)}) or gradient norm ({float(step.gradnorm)}), so "
        f"{int(step.skipped)} tensors are not stepped. {state} saved to {path}, token ids to {record}; {WAY_OUT}, or use "
        "--on_nonfinite skip"
    )


def out_of_memory(error: Exception, args: Arguments, world: World, device: torch.device, dtype: str) -> str | None:
    """Returns the message for an out-of-memory error: the plan's largest entry and how to lower it; None for other errors."""
    if (message := allocation_failure(error)) is None:
        return None
    plan = make_plan(args, world, dtype, device.type, device_memory(device, world))
    return out_of_memory_problem(plan, args, device.type, message)
