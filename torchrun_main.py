#!/usr/bin/env python
"""Pretrain a LLaMA: arguments -> plan -> build -> restore -> loop. `--help` lists every flag.

torchrun --standalone --nproc_per_node 1 torchrun_main.py --model_config configs/llama_60m.json ...
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_pretraining.config import Arguments, ConfigError, notices, parse_args
from peft_pretraining.distributed import World

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peft_pretraining.build import Data
    from peft_pretraining.data.loader import Batch
    from peft_pretraining.evaluate import EvalResult
    from peft_pretraining.metrics import Recorder
    from peft_pretraining.plan import Plan
    from peft_pretraining.resume import RunParts
    from peft_pretraining.run_folder import RunFolder
    from peft_pretraining.saver import Saver
    from peft_pretraining.train import StepResult, TrainState


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while running, 2 arguments or data that cannot work, 130 interrupted."""
    world = World.from_environment()
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        if args.single_gpu and world.size > 1:
            raise ConfigError([f"--single_gpu: torchrun started {world.size} processes; use --nproc_per_node 1"])
        if world.is_main:
            for line in notices(args):
                print(f"notice: {line}", file=sys.stderr)
        return dry_run(args, world) if args.dry_run else run(args, world)
    except ConfigError as error:
        return fail(world, error.problems, exit_code=2, everywhere_alike=True)
    except KeyboardInterrupt:
        return fail(
            world, ["interrupted; the same command goes on from the newest checkpoint"], 130, everywhere_alike=True
        )


def fail(world: World, problems: Sequence[str], exit_code: int, everywhere_alike: bool = False) -> int:
    """Say what is wrong and give the exit code; what every process finds alike is said by rank 0 alone."""
    if world.is_main or not everywhere_alike:
        rank = f" [rank {world.rank}]" if world.size > 1 else ""
        for problem in problems:
            print(f"torchrun_main.py: error:{rank} {problem}", file=sys.stderr, flush=True)
    return exit_code


def dry_run(args: Arguments, world: World) -> int:
    """Print the plan and stop; needs no network and no data."""
    from peft_pretraining.plan import make_plan

    make_plan(args, world)  # problems are found before torch is imported

    from peft_pretraining.build import resolve_dtype
    from peft_pretraining.data.errors import DataError
    from peft_pretraining.data.source import open_source
    from peft_pretraining.distributed import DeviceError, device_memory, pick_device
    from peft_pretraining.plan import format_plan

    try:
        device = pick_device(args.device, world)
        plan = make_plan(args, world, resolve_dtype(args.dtype, device), device.type)
        source = open_source(args.dataset, "train", text_field=args.text_field, resolve=False)
        text = format_plan(plan, args, source.describe(), device_memory(device, world))
    except (DataError, DeviceError) as error:
        return fail(world, [str(error)], exit_code=2)
    if world.is_main:
        print(text)
    return 0


def run(args: Arguments, world: World) -> int:
    """Train; returns the exit code."""
    from peft_pretraining.plan import make_plan

    make_plan(args, world)  # problems are found before torch is imported

    import torch

    from peft_pretraining.checkpoint import CheckpointError
    from peft_pretraining.data.errors import DataError, TokenizerError
    from peft_pretraining.distributed import DeviceError, LostProcess, pick_device, process_group
    from peft_pretraining.optim import OptimizerUnavailable
    from peft_pretraining.saver import SavingFailed

    try:
        device = pick_device(args.device, world)
        torch.manual_seed(args.seed)
        random.seed(args.seed)
        with process_group(world, device):
            return train(args, world, device)
    except (DataError, TokenizerError, DeviceError, CheckpointError, OptimizerUnavailable) as error:
        return fail(world, [str(error)], exit_code=2)
    except SavingFailed as error:
        return fail(world, [str(error)], exit_code=1, everywhere_alike=True)
    except (TrainingError, LostProcess, OSError) as error:
        return fail(world, [str(error)], exit_code=1)


class TrainingError(RuntimeError):
    """The run cannot go on."""


def train(args: Arguments, world: World, device: torch.device) -> int:
    """Build, restore, loop: evaluate where due, update, record, save where due."""
    # Imported here and not above: torch and transformers cost seconds that --help and a wrong argument must not.
    from peft_pretraining.metrics import Throughput, peak_memory_bytes
    from peft_pretraining.plan import is_finished, learning_rate
    from peft_pretraining.train import train_step

    assembled = assemble(args, world, device)
    if assembled is None:
        return 0
    plan, data, parts, module = assembled.plan, assembled.data, assembled.parts, assembled.module
    state = parts.state
    record = open_record(args, world, assembled)
    throughput = Throughput(plan.total_batch_size, plan.gradient_accumulation * world.size)
    saver = assembled.saver(args, world)
    try:
        while True:
            finished = is_finished(plan, state.update_step, state.tokens_seen)
            if evaluation_due(args, state.update_step, finished) and record.last_evaluated_step != state.update_step:
                with throughput.paused():
                    record.log_evaluation(state.update_step, run_evaluation(module, data, world))
            if finished:
                break

            micro_batches = [next(assembled.batches) for _ in range(plan.gradient_accumulation)]
            lr = learning_rate(args, plan, state.update_step, state.tokens_seen)
            step = train_step(module, parts.updates, micro_batches, lr=lr, world=world, device=device)
            num_tokens = int(step.num_tokens)
            state.update_step += 1
            state.tokens_seen += num_tokens
            throughput.add_update(num_tokens)
            record.advance()
            if state.update_step % args.log_every == 0:
                check_finite(step, state.update_step)
                row = {"update_step": state.update_step, "loss": float(step.loss), "lr": lr}
                row |= {"tokens_seen": state.tokens_seen, "gradnorm": float(step.gradnorm)}
                row |= {"max_memory": peak_memory_bytes(device)} | throughput.read()
                record.log_update(row | assembled.memory_row(device))

            finished = is_finished(plan, state.update_step, state.tokens_seen)
            if saver.due(scheduled=finished or state.update_step % args.save_every == 0):
                check_finite(step, state.update_step)
                with throughput.paused():
                    record.sync()
                    saver.save()
        saver.finish()
    finally:
        saver.close()
        record.close(exit_code=int(sys.exc_info()[0] is not None))
        data.loader.close()
    say_finished(world, state, assembled.folder)
    return 0


@dataclass
class Assembled:
    """The parts of a run, built and brought to where it goes on."""

    plan: Plan
    folder: RunFolder
    data: Data
    batches: Iterator[Batch]
    module: nn.Module  # maps (input_ids, labels) to the sum of token losses
    parts: RunParts
    document: dict[str, Any]  # run.json
    memory_told: bool = False

    def saver(self, args: Arguments, world: World) -> Saver:
        """What saves this run; every process calls it."""
        from peft_pretraining.resume import run_content
        from peft_pretraining.saver import Saver

        folder, step = self.folder, self.parts.state.update_step
        return Saver(
            folder.path,
            lambda: run_content(folder.path, self.parts, world, self.document),
            world,
            keep=args.keep_checkpoints,
            asynchronous=args.async_save,
            saved_step=step if folder.goes_on_in_place else None,
        )

    def memory_row(self, device: torch.device) -> dict[str, int]:
        """Once, after the first update: measured beside predicted memory, for the record."""
        if self.memory_told:
            return {}
        from peft_pretraining.footprint import comparison, measured_bytes
        from peft_pretraining.metrics import peak_memory_bytes

        self.memory_told = True
        measured = measured_bytes(self.parts.model, self.parts.updates.optimizer)
        return comparison(self.plan.bytes, measured, peak_memory_bytes(device), device.type)


def assemble(args: Arguments, world: World, device: torch.device) -> Assembled | None:
    """Build everything and restore the checkpoint that the run goes on from; None where it is finished already."""
    from peft_pretraining.build import build_data, build_trained_model, build_updates, resolve_dtype
    from peft_pretraining.distributed import device_memory, parallelize
    from peft_pretraining.footprint import return_freed_memory_if_tight
    from peft_pretraining.loss import TokenLoss
    from peft_pretraining.plan import format_plan, make_plan, memory_problems
    from peft_pretraining.resume import RunParts, finished_state, restore_data, restore_run
    from peft_pretraining.run_folder import check_same_data, open_run_folder, run_document
    from peft_pretraining.train import TrainState

    plan = make_plan(args, world, resolve_dtype(args.dtype, device), device.type)
    there = device_memory(device, world)
    if not args.force and (problems := memory_problems(plan, args, there)):
        raise ConfigError([*problems, "--force starts it all the same"])
    folder = open_run_folder(args, plan, world)
    if (state := finished_state(folder.path, folder.checkpoint, args, plan)) is not None:
        say_finished(world, state, folder)
        return None
    data = build_data(args, plan, world, device)
    if world.is_main:
        print(format_plan(plan, args, data.source.describe(), there), file=sys.stderr)

    if folder.checkpoint is not None:
        check_same_data(folder.checkpoint, args, data.source)
        restore_data(folder.checkpoint, data.loader)
    batches = iter(data.loader)  # its workers read and tokenise while the model is built
    return_freed_memory_if_tight(plan.bytes["peak"], there)
    model = build_trained_model(args, plan, device)
    updates = build_updates(args, model, world, device)
    module = TokenLoss(model) if updates.averages_gradients else parallelize(TokenLoss(model), world, device)
    parts = RunParts(model, updates, data.loader, TrainState())
    if folder.checkpoint is not None:
        restore_run(folder.checkpoint, parts, world)
    document = run_document(args, plan, world, folder, data.source)
    return Assembled(plan, folder, data, batches, module, parts, document)


def say_finished(world: World, state: TrainState, folder: RunFolder) -> None:
    """The last line of a run, and the only one of a run that was finished before."""
    if world.is_main:
        print(f"finished {state.update_step:,} updates, {state.tokens_seen:,} tokens; everything is in {folder.path}")


def evaluation_due(args: Arguments, update_step: int, finished: bool) -> bool:
    """Before the first update with --eval_at_start, every eval_every updates, and at the end."""
    if update_step == 0:
        return args.eval_at_start or finished
    return finished or update_step % args.eval_every == 0


def run_evaluation(module: nn.Module, data: Data, world: World) -> EvalResult:
    """The held-out split's loss over all processes."""
    from peft_pretraining.distributed import all_reduce_sum_
    from peft_pretraining.evaluate import evaluate

    # The wrapped module's own forward: evaluation needs no gradient synchronisation, and ranks may differ in batches.
    inner = getattr(module, "module", module)
    return evaluate(
        inner,
        data.eval_set,
        world_reduce=lambda sums: all_reduce_sum_(sums, world),
        bytes_per_id=data.tokenizer.bytes_per_id(),
    )


def check_finite(step: StepResult, update_step: int) -> None:
    """Raise TrainingError where loss or gradient is no number: nothing after it would mean anything, nor be saved."""
    for name, value in (("loss", float(step.loss)), ("gradient norm", float(step.gradnorm))):
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} is {value} at update {update_step}: training has diverged and stops before saving it; go on "
                "from the last checkpoint with a lower --lr or --grad_clipping 1.0 and --allow_changes lr,grad_clipping"
            )


def open_record(args: Arguments, world: World, run: Assembled) -> Recorder:
    """Write run.json and the tokenizer beside it, and open metrics.jsonl, wandb and the bar at the run's position."""
    from peft_pretraining.checkpoint import write_json
    from peft_pretraining.distributed import broadcast_object
    from peft_pretraining.metrics import Recorder
    from peft_pretraining.run_folder import take_up

    folder = run.folder
    if world.is_main:
        take_up(folder)
        write_json(folder.path / "run.json", run.document)
        run.data.tokenizer.save(folder.path / "tokenizer")
    record = Recorder(
        folder.path,
        enabled=world.is_main,
        total_updates=run.plan.num_training_steps,
        start_step=run.parts.state.update_step,
        wandb_settings={
            "mode": args.wandb,
            "id": folder.wandb_id,
            "name": args.name or folder.path.name,
            "tags": [tag.strip() for tag in (args.tags or "").split(",") if tag.strip()],
            "config": run.document,
        },
    )
    # Other nodes may not see this folder, and every process must agree on whether an evaluation is due.
    record.last_evaluated_step = broadcast_object(record.last_evaluated_step, world)
    return record


if __name__ == "__main__":
    sys.exit(main())
