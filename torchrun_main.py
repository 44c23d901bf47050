#!/usr/bin/env python
"""Pretrains a LLaMA model: reads arguments, makes the plan, builds, restores, trains. `--help` lists every flag.

torchrun --standalone --nproc_per_node 1 torchrun_main.py --model_config configs/llama_60m.json ...
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_pretraining.config.arguments import Arguments, ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.device import set_allocator
from peft_pretraining.distributed.launch import torchrun_ignores_nohup
from peft_pretraining.distributed.world import World, lasting_output
from peft_pretraining.plan.checks import check, check_inputs, check_packages, notices

if TYPE_CHECKING:
    import torch

    from peft_pretraining.record.recorder import LateRecord, Recorder
    from peft_pretraining.run.assemble import Run
    from peft_pretraining.training.trace import Trace


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code: 0 done, 1 failed while running, 2 invalid arguments or data, 130 interrupted."""
    with lasting_output():
        world = World()
        try:
            check_packages()
            world = World.from_environment()
            args = parse_args(sys.argv[1:] if argv is None else argv)
            # Reports all problems at once, before torch is imported.
            checked = check(args, world)
            for line in filter(None, [*checked.notices, *notices(args), torchrun_ignores_nohup(world)]):
                world.say(f"notice: {line}")
            return dry_run(args, world) if args.dry_run else run(args, world)
        except ConfigError as error:
            return fail(world, error.problems, exit_code=2, same_on_all_ranks=True)
        except KeyboardInterrupt:
            return fail(world, ["interrupted before training began; no work is lost"], 130, same_on_all_ranks=True)


def fail(world: World, problems: Sequence[str], exit_code: int, same_on_all_ranks: bool = False) -> int:
    """Prints error messages and returns the exit code; only rank 0 prints messages that are the same on all ranks."""
    if world.is_main or not same_on_all_ranks:
        rank = f" [rank {world.rank}]" if world.size > 1 else ""
        for problem in problems:
            print(f"torchrun_main.py: error:{rank} {problem}", file=sys.stderr, flush=True)
    tell_torchrun("; ".join(problems))
    return exit_code


def tell_torchrun(message: str) -> None:
    """Writes the message to the file in which torchrun expects it; torchrun ends by printing the message of the first failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": details}}, file)


def dry_run(args: Arguments, world: World) -> int:
    """Prints the plan and returns the exit code; reads no data and uses no network."""
    from peft_pretraining.data import DataError, TokenizerError
    from peft_pretraining.data.mixture import data_orders, open_dataset, orders_text
    from peft_pretraining.data.tokenizer import tokenizer_path
    from peft_pretraining.distributed import device as devices
    from peft_pretraining.plan.advice import memory_problems
    from peft_pretraining.plan.plan import format_plan, make_plan

    check_inputs(args)
    try:
        if args.memory is None:
            device = devices.pick_device(args.device, world)
            memory, dtype = devices.device_memory(device, world), devices.resolve_dtype(args.dtype, device)
        else:
            memory = devices.planned_memory(args.device, args.memory, world)
            dtype = args.dtype or devices.default_dtype(memory.device_type)
        plan = make_plan(args, world, dtype, memory.device_type, memory)
        if args.tokenizer is not None:
            tokenizer_path(args.tokenizer)
        source = open_dataset(args.dataset, "train", text_field=args.text_field, resolve=False)
        if args.eval_dataset is not None:
            of_training = [args.dataset]
            open_dataset(args.eval_dataset, "validation", text_field=args.text_field, trained_on=of_training, resolve=False)
        order = orders_text(source, data_orders(source, args.packing, args.data_order))  # type: ignore[arg-type]
        lines = [format_plan(plan, args, source.describe(), memory, order)]
        lines += [f"warning: {problem}" for problem in memory_problems(plan, args, memory)]
    except (DataError, TokenizerError, devices.DeviceError) as error:
        return fail(world, [str(error)], exit_code=2)
    if world.is_main:
        print("\n".join(lines))
    return 0


def run(args: Arguments, world: World) -> int:
    """Trains, prints one message for an expected error, and returns the exit code."""
    set_allocator()

    import torch

    from peft_pretraining.checkpoint.saver import SavingFailed
    from peft_pretraining.checkpoint.step_folder import CheckpointError
    from peft_pretraining.data import DataError, TokenizerError
    from peft_pretraining.distributed.device import DeviceError, allow_tf32, pick_device, resolve_dtype
    from peft_pretraining.distributed.world import GroupError, process_group
    from peft_pretraining.optim.build import OptimizerUnavailable
    from peft_pretraining.run.ending import out_of_memory
    from peft_pretraining.run.folder_lock import unlock_folders
    from peft_pretraining.training.evaluate import NothingToEvaluate
    from peft_pretraining.training.update import TrainingError

    try:
        device = pick_device(args.device, world)
        if args.tf32 and device.type == "cuda":
            allow_tf32()
        torch.manual_seed(args.seed)
        with process_group(world, device, args.timeout_s):
            return train(args, world, device)
    except (DataError, TokenizerError, DeviceError, CheckpointError, OptimizerUnavailable, NothingToEvaluate) as error:
        return fail(world, [str(error)], exit_code=2)
    except SavingFailed as error:
        return fail(world, [str(error)], exit_code=1, same_on_all_ranks=True)
    except (TrainingError, GroupError, OSError) as error:
        return fail(world, [str(error)], exit_code=1)
    except (RuntimeError, MemoryError) as error:
        problem = out_of_memory(error, args, world, device, resolve_dtype(args.dtype, device))
        if problem is None:
            raise
        return fail(world, [problem], exit_code=1)
    finally:
        unlock_folders()


def train(args: Arguments, world: World, device: torch.device) -> int:
    """Builds and restores the run and trains until it is finished or stopped; returns the exit code."""
    from peft_pretraining.record.mfu import flop_rates
    from peft_pretraining.record.recorder import LateRecord, Throughput
    from peft_pretraining.run.assemble import assemble, open_record, print_finished, print_skipped_records
    from peft_pretraining.run.ending import end_early
    from peft_pretraining.training.stop import StopRun

    run = assemble(args, world, device)
    if run is None:
        return 0
    flops = flop_rates(args, run.plan, world, run.parts.model, device)
    record = open_record(args, world, run)
    throughput = Throughput(run.plan.total_batch_size, run.plan.gradient_accumulation * world.size, flops)
    late_record = LateRecord(record, run.parts.state, throughput)
    trace = start_trace(args, world, run, record)
    code = 1
    with run.stop.listening():
        try:
            loop(args, world, run, record, late_record, trace)
            print_skipped_records(record, run, world)
            code = 0
        except StopRun as stopped:
            late_record.settle()
            problem = end_early(run, args, world, stopped)
            code = 0 if problem is None else fail(world, [problem], exit_code=1)
            return code
        finally:
            run.stop.task = "ending once the record is complete"
            if trace is not None:
                trace.close()
            run.saver.close()
            late_record.close()
            record.close(code)
            run.data.loader.close()
    print_finished(world, run.parts.state, run.folder)
    return 0


def start_trace(args: Arguments, world: World, run: Run, record: Recorder) -> Trace | None:
    """Starts the trace that --trace asks for; returns None without the flag."""
    if args.trace is None:
        return None
    from peft_pretraining.training.trace import Trace

    return Trace(run.folder.path, args.trace, run.parts.state.update_step, world.rank, run.device, record.say)


def loop(args: Arguments, world: World, run: Run, record: Recorder, late_record: LateRecord, trace: Trace | None) -> None:
    """Trains until the run is finished: updates, and evaluations, log rows and checkpoints when they are due. Raises StopRun."""
    # Imported here because torch and transformers take seconds to load; --help and errors in arguments need neither.
    from peft_pretraining.plan.plan import learning_rates
    from peft_pretraining.plan.schedule import is_finished
    from peft_pretraining.record.recorder import peak_memory_bytes
    from peft_pretraining.run.assemble import next_micro_batches, run_evaluation
    from peft_pretraining.run.ending import keep_for_inspection
    from peft_pretraining.training.update import train_step

    plan, device, state = run.plan, run.device, run.parts.state
    rates = learning_rates(args, plan)
    # True while a scheduled checkpoint has not been written yet.
    scheduled = False
    # After a resume, rank 0's counter starts with the sum over all processes.
    bad_records = run.data.loader.num_bad_records
    while True:
        finished = is_finished(plan, state.update_step, state.tokens_seen)
        if evaluation_due(args, state.update_step, finished) and record.last_evaluated_step != state.update_step:
            with late_record.paused():
                record.log_evaluation(state.update_step, run_evaluation(run, world), state.tokens_seen)
        if finished:
            break

        micro_batches = next_micro_batches(run, world)
        if run.restarts is not None:
            run.restarts.before_update(state.update_step)
        lr = rates.at(state.update_step, state.tokens_seen)
        progress = rates.progress(state.update_step, state.tokens_seen)
        with run.cached_weights():
            step = train_step(run.module, run.parts.updates, micro_batches, lr=lr, progress=progress, world=world, device=device)
        # Reading step.skipped waits for the device, so it is read only if a non-finite update stops the run.
        if args.on_nonfinite == "stop" and bool(step.skipped):
            late_record.settle()
            keep_for_inspection(run, args, world, micro_batches, step)
        state.update_step += 1
        state.tokens_seen += step.num_tokens
        bad_records += step.num_bad_records
        record.advance()
        row: dict[str, Any] | None = None
        if state.update_step % args.log_every == 0:
            counts = {"tokens_seen": state.tokens_seen, "max_memory": peak_memory_bytes(device), "bad_records": bad_records}
            row = {**rates.row(lr), **counts, **run.data_row(), **run.memory_row()}
        late_record.add(state.update_step, step, row)
        if trace is not None:
            trace.after_update(late_record.paused)

        finished = is_finished(plan, state.update_step, state.tokens_seen)
        scheduled = scheduled or save_scheduled(args, state.update_step, finished)
        if run.saver.due(scheduled):
            late_record.settle()
            # A checkpoint after a skipped update waits until an update succeeds, so that it replaces no good checkpoint.
            if finished or not late_record.last_one_skipped:
                with late_record.paused():
                    record.sync()
                    run.saver.save()
                scheduled = False
    run.saver.finish()


def save_scheduled(args: Arguments, update_step: int, finished: bool) -> bool:
    """Tells whether a checkpoint follows the update: every save_every and keep_every updates, and at the end."""
    return finished or any(update_step % every == 0 for every in (args.save_every, args.keep_every) if every is not None)


def evaluation_due(args: Arguments, update_step: int, finished: bool) -> bool:
    """Tells whether to evaluate: before the first update with --eval_at_start, every eval_every updates, and at the end."""
    if update_step == 0:
        return args.eval_at_start or finished
    return finished or update_step % args.eval_every == 0


if __name__ == "__main__":
    sys.exit(main())
