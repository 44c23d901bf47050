"""Two machines, simulated on one by two torchrun agents that find each other by an address."""

import contextlib
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
from torchrun import ranks_below

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def flags(tiny_run) -> list[str]:
    return [
        *tiny_run,
        *("--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--optimizer", "adamw"),
        *("--lr", "0.001", "--warmup_steps", "2", "--num_training_steps", "30", "--batch_size", "3"),
        *("--total_batch_size", "12", "--data_lanes", "6", "--max_length", "48", "--eval_every", "25", "--workers", "1"),
        *("--wandb", "disabled", "--device", "cpu", "--dtype", "float32", "--save_every", "5", "--timeout_s", "10"),
    ]


@contextlib.contextmanager
def two_agents(folder: Path, flags: list[str]):
    """Starts agents of two machines with one process each; yields (agent, log) and ends all processes afterwards."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{forked.free_port()}", "--rdzv_id", "two"]
    command += ["torchrun_main.py", "--save_dir", str(folder), *flags]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents, logs = [], []
    for number in range(2):
        logs.append(folder.with_name(f"{folder.name}-{number}.log"))
        with logs[-1].open("w") as log:
            agents.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        yield list(zip(agents, logs, strict=True))
    finally:
        for agent in agents:
            for pid in ranks_below(agent.pid):
                os.kill(pid, signal.SIGKILL)
            agent.kill()
            agent.wait()


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.full)])
def test_a_hung_machine_ends_the_other_and_the_run_resumes_exactly(tmp_path, flags, parallel):
    """The hung run is started by torchrun; the undisturbed and the resumed run are forked, which is faster."""
    flags += ["--parallel", parallel]
    code, output = forked.run([*flags, "--save_dir", str(tmp_path / "whole")], tmp_path / "whole.log", processes=2)
    assert code == 0, output
    with two_agents(tmp_path / "run", flags) as agents:
        while len(record(tmp_path / "run")) < 12:
            assert all(agent.poll() is None for agent, _ in agents), [log.read_text() for _, log in agents]
            time.sleep(0.01)
        ranks = {rank: (pid, agent) for agent, _ in agents for pid, rank in ranks_below(agent.pid).items()}
        os.kill(ranks["1"][0], signal.SIGSTOP)
        other, log = next((agent, log) for agent, log in agents if agent is ranks["0"][1])
        assert other.wait() == 1
        assert "error: [rank 0] another process of this run has ended" in log.read_text()
        assert 'torchrun_main.py", line' not in log.read_text()
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert document["plan"]["world_size"] == 2
    assert (document["world"]["processes"], document["world"]["local_processes"]) == (2, 1)
    code, output = forked.run([*flags, "--save_dir", str(tmp_path / "run")], tmp_path / "resumed.log", processes=2)
    assert code == 0, output
    assert record(tmp_path / "run") == record(tmp_path / "whole")
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
