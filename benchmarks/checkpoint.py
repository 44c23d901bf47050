"""Measures how long a checkpoint interrupts training, in units of an update, with and without --async_save.

`python benchmarks/checkpoint.py [--saves 4] [--updates 6] [--out FILE.json] FLAGS OF THE TRAINER` trains on random tokens, as
memory.py does, and saves to a temporary folder. Per checkpoint, "stalled" is the time inside the saver, and "slower" the extra
time of the updates between two saves compared with undisturbed updates (a background save shares the cores). Undisturbed updates
are measured before, between and after the saves, in the same process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from memory import updater

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.checkpoint.saver import Saver
from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.device import pick_device, resolve_dtype
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.plan import make_plan
from peft_pretraining.run.folder import versions
from peft_pretraining.run.resume import run_content


def saving(saver: Saver, update: Callable[[], float], num_saves: int, num_updates: int) -> list[tuple[float, list[float]]]:
    """Returns for each save the seconds inside the saver, and the seconds of each of the updates after it."""
    saves = []
    for _ in range(num_saves):
        update()
        start = time.perf_counter()
        saver.save()
        stalled, seconds = time.perf_counter() - start, []
        for _ in range(num_updates):
            seconds.append(update())
            start = time.perf_counter()
            saver.due(scheduled=False)
            stalled += time.perf_counter() - start
        saves.append((stalled, seconds))
    start = time.perf_counter()
    saver.finish()
    print(f"waited {time.perf_counter() - start:.2f} s for the last save", file=sys.stderr)
    return saves


def measure(argv: list[str], num_saves: int, num_updates: int) -> dict:
    """Measures a run with the trainer's arguments `argv`; returns seconds and ratios. Raises ConfigError."""
    args = parse_args(argv)
    device = pick_device(args.device, World())
    plan = make_plan(args, World(), resolve_dtype(args.dtype, device), device.type)
    parts, update = updater(args, plan, device)
    undisturbed, saves, num_bytes = [update() for _ in range(num_updates + 2)][2:], {}, 0
    with tempfile.TemporaryDirectory(dir=args.save_dir) as folder:
        (Path(folder) / "tokenizer").mkdir()
        for asynchronous in (False, True):
            options = {"keep": 1, "asynchronous": asynchronous}
            saver = Saver(Path(folder), lambda: run_content(Path(folder), parts, World(), {}), World(), **options)
            saves[asynchronous] = saving(saver, update, num_saves, num_updates)
            undisturbed += [update() for _ in range(num_updates)]
        num_bytes = run_content(Path(folder), parts, World(), {}).num_bytes(1)
    step = statistics.median(undisturbed)
    return {
        "arguments": argv,
        "checkpoint_bytes": num_bytes,
        "seconds_per_update": undisturbed,
        "waiting": _in_updates(saves[False], step),
        "async_save": _in_updates(saves[True], step),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": date.today().isoformat(),
    }


def _in_updates(saves: list[tuple[float, list[float]]], step: float) -> dict[str, Any]:
    """Converts seconds to updates of `step` seconds each. The first background save also allocates memory for its copy."""
    stalled = [stall / step for stall, _ in saves]
    slower = [sum(seconds) / step - len(seconds) for _, seconds in saves]
    return {
        "stalled_updates_each": stalled,
        "stalled_updates_median": statistics.median(stalled),
        "slower_updates_each": slower,
        "slower_updates_median": statistics.median(slower),
        "seconds_each": [stall for stall, _ in saves],
    }


def main() -> int:
    """Measures and prints; returns exit code 2 for invalid arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--saves", type=int, default=4, help="checkpoints of each kind (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=6, help="updates between two of them (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    own, argv = parser.parse_known_args()
    try:
        figures = measure(argv, own.saves, own.updates)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if own.out is not None:
        own.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    seconds = statistics.median(figures["seconds_per_update"])
    print(f"update {seconds:.2f} s, checkpoint {figures['checkpoint_bytes'] / 1e9:.2f} GB")
    for name in ("waiting", "async_save"):
        kind = figures[name]
        print(
            f"{name:<12}stalled {kind['stalled_updates_median']:.2f} updates per checkpoint "
            f"(each {', '.join(f'{x:.2f}' for x in kind['stalled_updates_each'])}), "
            f"updates after it slower by {kind['slower_updates_median']:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
