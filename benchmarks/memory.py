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
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.device import device_memory, pick_device, resolve_dtype, set_allocator
from peft_pretraining.distributed.world import World
from peft_pretraining.model.loss import TokenLoss
from peft_pretraining.plan.advice import memory_problems
from peft_pretraining.plan.plan import make_plan
from peft_pretraining.record.recorder import measured_bytes, peak_memory_bytes
from peft_pretraining.run.build import build_module, build_updates
from peft_pretraining.run.folder import versions
from peft_pretraining.training.update import train_step


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


def random_batch(batch_size: int, length: int, vocab_size: int, generator: torch.Generator) -> Tokens:
    """Returns a micro-batch of random ids, shape (batch_size, length)."""
    ids = torch.randint(vocab_size, (batch_size, length), generator=generator)
    return Tokens(ids, ids.clone(), ids.numel(), batch_size * (length - 1))


def measure(argv: list[str], num_updates: int) -> dict:
    """Returns predicted and measured bytes of a run with the trainer's arguments `argv`. Raises ConfigError."""
    args = parse_args(argv)
    set_allocator()
    world = World()
    device = pick_device(args.device, world)
    plan = make_plan(args, world, resolve_dtype(args.dtype, device), device.type)
    memory = device_memory(device, world)
    if not args.force and (problems := memory_problems(plan, args, memory)):
        raise ConfigError(problems)
    load_what_the_trainer_loads()
    model = build_module(args, plan, World(), device).model
    updates = build_updates(args, model, world, device, plan.gradient_accumulation)
    module = TokenLoss(model)
    generator = torch.Generator().manual_seed(args.seed)
    seconds = []
    for _ in range(num_updates):
        size = (args.batch_size, args.max_length, plan.model.vocab_size)
        batches = [random_batch(*size, generator) for _ in range(plan.gradient_accumulation)]
        start = time.perf_counter()
        train_step(module, updates, batches, lr=args.lr, world=world, device=device)
        seconds.append(time.perf_counter() - start)
    peak = peak_memory_bytes(device)
    predicted = plan.bytes["peak"] - (plan.bytes["runtime"] if device.type == "cuda" else 0)
    return {
        "arguments": argv,
        "predicted": plan.bytes,
        "measured": measured_bytes(model, updates.optimizer),
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
