"""Two processes that are stopped by a signal and started again end bit-identical to two that were not stopped."""

import itertools
import json
import signal
import time

import forked
import pytest
import torch
from outcomes import record, tensors_of

from peft_pretraining.checkpoint.step_folder import list_checkpoints, resolve

METHODS, OPTIMIZERS = ("sltrain", "full", "lowrank"), ("adamw", "adam8bit", "adam8bit_per_layer")
COVER = [
    ("sltrain", "adam8bit_per_layer", "padded", "2", "SIGTERM", "ddp"),
    ("full", "adam8bit", "packed", "0", "SIGUSR1", "ddp"),
    ("lowrank", "adamw", "packed", "2", "SIGINT", "ddp"),
    ("sltrain", "adam8bit_per_layer", "padded", "0", "SIGTERM", "fsdp"),
]
ALL = [
    *itertools.product(METHODS, OPTIMIZERS, ("padded", "packed"), ("0", "2"), ("SIGTERM",), ("ddp",)),
    *itertools.product(METHODS, OPTIMIZERS, ("padded",), ("0",), ("SIGTERM",), ("fsdp",)),
]


@pytest.fixture
def flags(tiny_run) -> list[str]:
    return [
        *tiny_run,
        *("--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--lr", "0.003", "--warmup_steps", "2"),
        *("--num_training_steps", "30", "--batch_size", "2", "--total_batch_size", "8", "--data_lanes", "6"),
        *("--max_length", "48", "--eval_every", "4", "--save_every", "1000"),
        *("--wandb", "disabled", "--device", "cpu", "--dtype", "float32"),
    ]


@pytest.mark.parametrize(
    ("method", "optimizer", "layout", "workers", "name", "parallel"),
    [*COVER, *(pytest.param(*case, marks=pytest.mark.full) for case in ALL if case not in COVER)],
)
def test_two_stopped_processes_resume_bit_identically(tmp_path, flags, method, optimizer, layout, workers, name, parallel):
    """With gradient accumulation 2 and evaluations. Only one of the two processes gets the signal, and both stop."""
    flags += ["--peft_model", method, "--optimizer", optimizer, "--workers", workers, "--parallel", parallel]
    flags += ["--packing"] if layout == "packed" else []
    code, output = forked.run([*flags, "--save_dir", str(tmp_path / "whole")], tmp_path / "log", processes=2)
    assert code == 0, output
    folder = tmp_path / "run"
    program = forked.start([*flags, "--save_dir", str(folder)], tmp_path / "log-1", processes=2)
    while len(record(folder)) < 5 and program.processes[0].is_alive():
        time.sleep(0.002)
    forked.Program(program.processes[1:], program.log).send(getattr(signal, name))
    assert program.wait() == 0, program.output
    marker = json.loads((folder / "stopped.json").read_text())
    assert 4 <= marker["update_step"] < 30
    assert [path.name for path in list_checkpoints(folder)] == [f"step_{marker['update_step']:08d}"]

    code, output = forked.run([*flags, "--save_dir", str(folder)], tmp_path / "log-2", processes=2)
    assert code == 0, output
    assert output.count(f"going on from step_{marker['update_step']:08d}") == 1  # by rank 0 alone
    assert record(folder) == record(tmp_path / "whole")
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(folder)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    states = [json.loads((resolve(place) / "state.json").read_text()) for place in (folder, tmp_path / "whole")]
    assert states[0] == states[1]  # including the data position
