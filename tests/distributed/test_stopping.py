"""Several processes under torchrun resume exactly after a stop; if one of them dies, all end with a message."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from outcomes import record, tensors_of
from tiny_model import TINY_MODEL
from torchrun import ranks_below

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def flags(tiny_run) -> list[str]:
    return [
        *tiny_run,
        *("--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--optimizer", "adamw"),
        *("--lr", "0.001", "--warmup_steps", "2", "--num_training_steps", "30", "--batch_size", "2"),
        *("--total_batch_size", "12", "--data_lanes", "6", "--max_length", "48", "--eval_every", "25", "--workers", "1"),
        *("--wandb", "disabled", "--device", "cpu", "--dtype", "float32", "--save_every", "1000"),
    ]


def start(folder: Path, *flags: str, processes: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "peft_pretraining.distributed.launch", "--standalone", "--nproc_per_node", str(processes)]
    command += ["--max-restarts", str(restarts), "torchrun_main.py", "--save_dir", str(folder), *flags]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_updates(running: subprocess.Popen[str], folder: Path, number: int) -> None:
    while len(record(folder)) < number:
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)


def test_three_processes_stopped_by_a_signal_resume_exactly(tmp_path, flags):
    """With three processes the order of sums matters, so DDP must not divide its buckets differently. It has several, because
    embedding and head are larger than its first bucket (1 MiB). Only the stopped run is started by torchrun; the undisturbed
    and the resumed run are forked, which is faster."""
    (tmp_path / "wide.json").write_text(json.dumps(TINY_MODEL | {"vocab_size": 8500}))
    flags += ["--model_config", str(tmp_path / "wide.json")]
    code, output = forked.run([*flags, "--save_dir", str(tmp_path / "whole")], tmp_path / "whole.log", processes=3)
    assert code == 0, output
    running = start(tmp_path / "run", *flags, processes=3)
    wait_for_updates(running, tmp_path / "run", 5)
    running.send_signal(signal.SIGUSR1)
    output = running.communicate()[0]
    marker = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert marker["signal"] == "SIGUSR1", output
    assert 5 <= marker["update_step"] < 30
    messages = ("SIGUSR1: stopping", "saved step_", "stopped on request")
    assert [output.count(text) for text in messages] == [1, 1, 1]
    assert "SignalException" not in output  # in torchrun's own traceback
    assert not ranks_below(running.pid)

    code, output = forked.run([*flags, "--save_dir", str(tmp_path / "run")], tmp_path / "again.log", processes=3)
    assert code == 0, output
    assert record(tmp_path / "run") == record(tmp_path / "whole")
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_killed_process_ends_the_others_with_a_message(tmp_path, flags):
    running = start(tmp_path / "run", *flags, "--num_training_steps", "100000")
    wait_for_updates(running, tmp_path / "run", 3)
    ranks = ranks_below(running.pid)
    assert sorted(ranks.values()) == ["0", "1"]
    os.kill(next(pid for pid, rank in ranks.items() if rank == "1"), signal.SIGKILL)
    output = running.communicate()[0]
    assert running.returncode == 1
    assert 'torchrun_main.py", line' not in output  # torchrun prints its own traceback, the program none
    last = output[output.rindex("Root Cause") :]
    assert "rank      : 1" in last
    assert "SIGKILL" in last


def test_torchruns_summary_shows_the_first_failure(tmp_path, flags):
    """torchrun's summary contains the error message of the process that failed first."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text("no json\n" * 9)
    failing = start(tmp_path / "run", *flags, "--dataset", str(tmp_path / "broken"))
    output = failing.communicate()[0]
    assert failing.returncode == 1
    assert "malformed json" in output[output.rindex("Root Cause") :]


@pytest.mark.full
def test_a_hung_process_ends_the_others_within_the_timeout(tmp_path, flags):
    running = start(tmp_path / "run", *flags, "--num_training_steps", "100000", "--timeout_s", "5")
    wait_for_updates(running, tmp_path / "run", 3)
    hung = next(pid for pid, rank in ranks_below(running.pid).items() if rank == "1")
    os.kill(hung, signal.SIGSTOP)
    output = running.communicate()[0]  # torchrun takes 30 s more to end the hung process
    assert running.returncode == 1
    assert "error: [rank 0] another process of this run has ended" in output
    assert 'torchrun_main.py", line' not in output  # torchrun prints its own traceback, the program none
    assert not ranks_below(running.pid)


@pytest.mark.full
def test_a_run_restarted_by_torchrun_after_a_kill_ends_bit_identical(tmp_path, flags):
    flags = [*flags, "--save_every", "20", "--num_training_steps", "200"]
    whole = start(tmp_path / "whole", *flags)
    output = whole.communicate()[0]
    assert whole.returncode == 0, output
    running = start(tmp_path / "run", *flags, restarts=2)
    wait_for_updates(running, tmp_path / "run", 50)
    os.kill(next(pid for pid, rank in ranks_below(running.pid).items() if rank == "1"), signal.SIGKILL)
    output = running.communicate()[0]
    assert running.returncode == 0, output
    assert record(tmp_path / "run") == record(tmp_path / "whole")
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


LATE = """
import os, sys, time
import torch
from peft_pretraining.distributed.world import World, all_reduce_sum_, process_group

world = World.from_environment()
restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if restart and world.rank == 0:
    time.sleep(2)
with process_group(world, torch.device("cpu"), 30):
    total = all_reduce_sum_(torch.ones(1), world)
    if restart == 0:
        os._exit(3)
sys.stdout.write(f"sum {float(total)} at restart {restart}\\n")  # whole lines: two processes write to one pipe
"""


@pytest.mark.parametrize("shared_store", ["0", pytest.param("1", marks=pytest.mark.full)])
def test_restarted_processes_do_not_use_old_addresses(tmp_path, shared_store):
    """torchrun's store still contains the old addresses if one process restarts later than the other."""
    (tmp_path / "late.py").write_text(LATE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": shared_store}
    command += ["--max-restarts", "1", str(tmp_path / "late.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("sum 2.0 at restart 1") == 2
