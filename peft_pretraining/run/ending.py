"""How a run is saved, and how it ends before its time: on request, without data, by numbers that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from peft_pretraining.checkpoint.step_folder import save_checkpoint, write_json
from peft_pretraining.config.arguments import Arguments
from peft_pretraining.data.loader import Batch
from peft_pretraining.distributed.world import World, gather_objects
from peft_pretraining.plan.plan import make_plan
from peft_pretraining.plan.text import out_of_memory_problem
from peft_pretraining.run.assemble import Run
from peft_pretraining.run.resume import run_content
from peft_pretraining.training.stop import MARKER_FILE, StopRun
from peft_pretraining.training.update import WAY_OUT, StepResult, TrainingError


def end_early(run: Run, args: Arguments, world: World, stopped: StopRun) -> str | None:
    """Save and say how it goes on; the problem in words, or None where the run was asked to stop: a marker tells scripts.

    The record of the updates so far must be settled.
    """
    state, folder = run.parts.state, run.folder
    kept = "nothing was trained yet"
    if state.update_step:
        run.saver.save()
        run.saver.finish()
        kept = f"everything up to update {state.update_step:,} is in {folder.path}; {how_to_go_on(args, folder.path)}"
    if stopped.problem is not None:
        return f"{stopped.problem}; {kept}"
    if world.is_main:
        marker = {"signal": run.stop.signal_name, "update_step": state.update_step, "tokens_seen": state.tokens_seen}
        write_json(folder.path / MARKER_FILE, marker)
        print(f"stopped on request ({run.stop.signal_name or 'on another process'}): {kept}")
    return None


def how_to_go_on(args: Arguments, folder: Path) -> str:
    """Which command goes on in `folder`."""
    left_out = [f"--continue_from {args.continue_from}"] if args.continue_from else []
    left_out += ["--resume never"] if args.resume == "never" else []
    if not left_out:
        return "the same command goes on"
    return f"the same command without {' and '.join(left_out)}, and with --save_dir {folder}, goes on"


def keep_for_inspection(run: Run, args: Arguments, world: World, micro_batches: Sequence[Batch], step: StepResult) -> NoReturn:
    """Save the state before the update that was not finite, with its token ids, apart from the run's checkpoints.

    Its data position is behind that update's: going on from there leaves its sequences out. With --per_layer the tensors whose
    gradients were finite have been stepped already. Raises TrainingError.
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
    state = "the state with the other tensors stepped" if stepped else "the state before it"
    raise TrainingError(
        f"update {number}: the loss is {float(step.loss)}, the gradient norm {float(step.gradnorm)}, {int(step.skipped)} tensors "
        f"had non-finite gradients. Saved {state} to {path}, token ids to {record}; {WAY_OUT}, or "
        "--on_nonfinite skip"
    )


def out_of_memory(error: Exception, args: Arguments, world: World, device: torch.device, dtype: str) -> str | None:
    """What to say where memory ran out: the plan's largest entry and what lowers it; None for any other failure."""
    on_cpu = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    if not (on_cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))):
        return None
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return out_of_memory_problem(make_plan(args, world, dtype, device.type), args, device.type, said)
