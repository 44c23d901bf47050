"""Reads the results of a run that another run must reproduce: its record without times, and its tensors."""

import json
from pathlib import Path

import torch

from peft_pretraining.checkpoint.step_folder import load_tensors, resolve, tensor_index

TIMES = {"throughput_tokens", "throughput_examples", "throughput_batches", "max_memory"}
TIMES |= {"flops_per_second", "flops_per_second_dense", "mfu", "mfu_dense"}


def without_times(rows: list[dict]) -> list[dict]:
    """Returns the rows without speeds and without memory, which differ from one process to the next."""
    return [{key: value for key, value in row.items() if key not in TIMES and not key.startswith("memory_")} for row in rows]


def record(folder: Path) -> list[dict]:
    """Returns the rows of a run's metrics.jsonl without times; [] if the file does not exist yet."""
    path = folder / "metrics.jsonl"
    return without_times([json.loads(line) for line in path.read_text().splitlines()]) if path.exists() else []


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a checkpoint, or of the newest checkpoint in a run's folder."""
    path = resolve(path)
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in tensor_index(path).items()}
    load_tensors(path, tensors)
    return tensors


def assert_equal_runs(one: Path, other: Path) -> None:
    """Asserts that the last four rows of two runs' records and all tensors of their newest checkpoints are bit-identical."""
    assert record(one)[-4:] == record(other)[-4:]
    left, right = tensors_of(one), tensors_of(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
