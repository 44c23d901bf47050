"""What a run left, as far as another run must repeat it."""

import json
from pathlib import Path

import torch

from peft_pretraining.checkpoint.step_folder import load_tensors, resolve, tensor_index

TIMES = {"throughput_tokens", "throughput_examples", "throughput_batches", "max_memory"}


def without_times(rows: list[dict]) -> list[dict]:
    """No speeds, and none of the memory that each process measures at its start."""
    return [{key: value for key, value in row.items() if key not in TIMES and not key.startswith("memory_")} for row in rows]


def record(folder: Path) -> list[dict]:
    """The record of a run without times; empty before it has one."""
    path = folder / "metrics.jsonl"
    return without_times([json.loads(line) for line in path.read_text().splitlines()]) if path.exists() else []


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, or of the newest one in a run's folder."""
    path = resolve(path)
    found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in tensor_index(path).items()}
    load_tensors(path, found)
    return found
