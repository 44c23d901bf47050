"""Section memory: LLaMA 7B with per-layer updates and 8-bit or 4-bit moments: predicted and allocated bytes beside nvidia-smi's.

The settings are those of benchmarks/memory_7b.py: r = 1024, delta = .05, bfloat16, 1 x 256 tokens, layer checkpointing.
"""

from __future__ import annotations

import os
from typing import Any

from memory import measure
from memory_table import HERE, settings

from gpu.quick import quick_initial_values
from gpu.record import Options, Record
from gpu.updates import TINY_LAYER, tiny_config


def run(record: Record, options: Options) -> None:
    """Measures the section's steps."""
    os.chdir(HERE.parent)
    for name, argv in settings("7b").items():
        record.step(f"7b {name}", lambda argv=argv: setting([*argv, "--device", options.device], options.tiny))


def setting(argv: list[str], tiny: bool) -> dict[str, Any]:
    """Makes two updates with the trainer's arguments and returns predicted and measured bytes."""
    with quick_initial_values(), tiny_config() as config:
        if tiny:
            argv = [*argv, "--model_config", config, *TINY_LAYER, "--max_length", "16"]
        return measure([*argv, "--force"], num_updates=2)
