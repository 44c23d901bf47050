"""Measures the memory of a few real updates and compares it with the prediction.

`python benchmarks/memory.py [--updates 2] [--json] FLAGS OF THE TRAINER` builds the model and the optimizer as the trainer does
and trains on random tokens, without data, checkpoints or dashboard. Prints bytes by class and the process's peak (ru_maxrss; on
a GPU torch's max_memory_allocated).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gpu.timing import Stopwatch, free, memory_of, pipelined_seconds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.config.arguments import Arguments, ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.device import device_memory, pick_device, resolve_dtype, set_allocator
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.advice import memory_problems
from peft_pretraining.plan.plan import Plan, make_plan
from peft_pretraining.record.recorder import measured_bytes, peak_memory_bytes
from peft_pretraining.run.build import build_token_loss, build_updates, start_cache
from peft_pretraining.run.folder import versions
from peft_pretraining.run.resume import RunParts
from peft_pretraining.training.update import TrainState, train_step


def load_what_the_trainer_loads() -> None:
    """Imports the other libraries that the trainer imports, about 0.1 GB; missing ones are ignored."""
    for name in ("datasets", "wandb"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@dataclass
class Tokens:
    """A micro-batch of random tokens without padding."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    num_tokens: int
    num_targets: int
    num_bad_records: int = 0


def random_batch(batch_size: int, length: int, vocab_size: int, generator: torch.Generator, device: torch.device) -> Tokens:
    """Returns a micro-batch of random ids, shape (batch_size, length), in pinned memory for a GPU, as the data loader's."""
    ids = torch.randint(vocab_size, (batch_size, length), generator=generator)
    ids, labels = (tensor.pin_memory() if device.type == "cuda" else tensor for tensor in (ids, ids.clone()))
    return Tokens(ids, labels, ids.numel(), batch_size * (length - 1))


class NoData:
    """Replaces the data loader: random tokens have no data position."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": 0, "lanes": {}, "bad_records": {}, "order": {}}

    def warn_of_uneven_passes(self, lanes: Any) -> None:
        """Does nothing."""


def updater(args: Arguments, plan: Plan, device: torch.device) -> tuple[RunParts, Callable[..., float]]:
    """Returns the parts of a run, and a function that makes updates (default: one) and returns the seconds of each on average.

    The host waits for the device before and after the updates only, as the trainer does.
    """
    module = build_token_loss(args, plan, World(), device)
    updates = build_updates(args, module.model, World(), device, plan.gradient_accumulation)
    cached_weights = start_cache(args, plan, module.model)
    generator = torch.Generator().manual_seed(args.seed)
    parts = RunParts(module.model, updates, NoData(), TrainState())  # type: ignore[arg-type]

    def update(count: int = 1) -> float:
        size = (args.batch_size, args.max_length, plan.model.vocab_size)
        batches = [random_batch(*size, generator, device) for _ in range(plan.gradient_accumulation)]

        def step() -> None:
            with cached_weights():
                train_step(module, updates, batches, lr=args.lr, world=World(), device=device)

        parts.state.update_step += count
        return pipelined_seconds(step, device, count)

    return parts, update


def time_steps(parts: RunParts, device: torch.device) -> Stopwatch:
    """Returns a stopwatch that from now on runs during the optimizer's steps (per-layer steps are in the backward pass)."""
    original, stopwatch = parts.updates.finish, Stopwatch(device)

    def finish(loss: torch.Tensor) -> Any:
        stopwatch.start()
        outcome = original(loss)
        stopwatch.stop()
        return outcome

    parts.updates.finish = finish  # type: ignore[method-assign]
    return stopwatch


def predicted_peak(plan: Plan, device: torch.device) -> int:
    """Returns the bytes predicted for what `peak_memory_bytes` measures, which on a GPU excludes context and libraries."""
    return int(plan.bytes["peak"] - (plan.bytes["runtime"] if device.type == "cuda" else 0))


def measure(argv: list[str], num_updates: int) -> dict:
    """Returns predicted and measured bytes of a run with the trainer's arguments `argv`. Raises ConfigError."""
    args = parse_args(argv)
    set_allocator()
    world = World()
    device = pick_device(args.device, world)
    memory = device_memory(device, world)
    plan = make_plan(args, world, resolve_dtype(args.dtype, device), device.type, memory)
    if not args.force and (problems := memory_problems(plan, args, memory)):
        raise ConfigError(problems)
    free(device)
    parts, update = updater(args, plan, device)
    seconds = [update() for _ in range(num_updates)]
    peak = peak_memory_bytes(device)
    predicted = predicted_peak(plan, device)
    return {
        "arguments": argv,
        "predicted": plan.bytes,
        "measured": measured_bytes(parts.model, parts.updates.optimizer) | memory_of(device),
        "peak_predicted": predicted,
        "peak_measured": peak,
        "predicted_to_measured": predicted / peak,
        "seconds_per_update": seconds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": date.today().isoformat(),
    }


def main() -> int:
    """Measures and prints; returns exit code 2 for invalid arguments or too little memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--updates", type=int, default=2, help="updates to make (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    own, argv = parser.parse_known_args()
    load_what_the_trainer_loads()
    try:
        figures = measure(argv, own.updates)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if own.json:
        print(json.dumps(figures))
        return 0
    for name in ("parameters", "support", "optimizer"):
        print(f"{name:<12}{figures['predicted'][name]:>16,} predicted {figures['measured'][name]:>16,} measured")
    print(f"{'peak':<12}{figures['peak_predicted']:>16,} predicted {figures['peak_measured']:>16,} measured")
    print(f"predicted / measured {figures['predicted_to_measured']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
