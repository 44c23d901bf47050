"""A run that is killed at arbitrary times and started again ends bit-identical to an undisturbed one, with the same record."""

import random
import signal
import time
from pathlib import Path

import forked
import pytest
import torch
from outcomes import record, tensors_of

from peft_pretraining.checkpoint.step_folder import list_checkpoints, resolve

UPDATES = 60


@pytest.fixture
def flags(tiny_run) -> list[str]:
    return [
        *tiny_run,
        *("--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1"),
        *("--lr", "0.003", "--warmup_steps", "2", "--num_training_steps", str(UPDATES), "--batch_size", "4"),
        *("--max_length", "64", "--eval_every", "20", "--save_every", "2", "--keep_checkpoints", "3"),
        *("--wandb", "disabled", "--device", "cpu", "--dtype", "float32"),
    ]


def wait_for(program: forked.Program, happened) -> None:
    """Waits until `happened()` is true or the program has ended."""
    while not happened() and program.processes[0].is_alive():
        time.sleep(0.0005)


def end_somewhere(program: forked.Program, folder: Path, chance: random.Random, number: int, kind: str) -> bool:
    """Sends a signal in a "save", an "update" or the "start", and waits for the end; returns True if a save was interrupted."""
    lines = chance.randrange(1, 12)
    metrics = folder / "metrics.jsonl"
    before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if kind == "save":
        skipped = {path.name for path in folder.glob(".*step_*")}
        complete_one_first = chance.randrange(3) > 0
        newest = list_checkpoints(folder)[-1:]
        wait_for(
            program,
            lambda: (
                list_checkpoints(folder)[-1:] != newest
                if complete_one_first
                else any(path.name not in skipped for path in folder.glob(".partial-step_*"))
            ),
        )
        if complete_one_first:
            wait_for(program, lambda: any(folder.glob(".partial-step_*")))
        time.sleep(chance.uniform(0, 0.004))
    elif kind == "update":
        wait_for(program, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= before + lines)
        time.sleep(chance.uniform(0, 0.01))
    else:
        time.sleep(chance.uniform(0, 3))
    program.send(number)
    assert program.wait() in (0, -number)
    return any(folder.glob(".partial-step_*"))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("SIGKILL", "spectron8bit_per_layer --weight_dtype int8 --batch_size 2 --total_batch_size 4 --accumulate moments"),
        ("SIGTERM", "adamw"),
        pytest.param("SIGKILL", "adamw", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.full)])
def test_a_killed_run_started_again_ends_bit_identical(tmp_path, flags, kills, name, optimizer):
    flags += ["--optimizer", *optimizer.split()]
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    code, output = forked.run([*flags, "--workers", "0", "--save_dir", str(tmp_path / "whole")], tmp_path / "log")
    assert code == 0, output
    folder = tmp_path / "killed"
    interrupted = 0
    for number in range(kills):
        options = ["--workers", str(number % 2), *(["--async_save"] if chance.random() < 0.5 else [])]
        program = forked.start([*flags, *options, "--save_dir", str(folder)], tmp_path / f"log-{number}")
        # The first one during a save, so that at least one is sent to a run that is not finished.
        kind = chance.choice(["save", "save", "update", "start"]) if number else "save"
        interrupted += end_somewhere(program, folder, chance, getattr(signal, name), kind)
        assert number or len(record(folder)) < len(record(tmp_path / "whole"))
        # A killed trainer's data worker may be sending a batch: multiprocessing's thread then prints where it was.
        assert "Traceback" not in program.output or (name == "SIGKILL" and "resource_sharer" in program.output), program.output
        for path in list_checkpoints(folder):
            resolve(path)  # raises an error for a damaged one
    code, output = forked.run([*flags, "--workers", "0", "--save_dir", str(folder)], tmp_path / "log-end")
    assert code == 0, output
    print(f"{interrupted} of {kills} kills interrupted a save")
    assert record(folder) == record(tmp_path / "whole")
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(folder)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    names = [{path.name for path in run.iterdir()} - {"metrics.old-1.jsonl"} for run in (folder, tmp_path / "whole")]
    if name == "SIGTERM":  # a stopped run saves, so that other checkpoints are kept
        names = [{item for item in group if not item.startswith("step_")} for group in names]
    assert names[0] == names[1]  # interrupted saves leave nothing
