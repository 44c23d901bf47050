"""--compile gives the same losses up to rounding, compiles once for all layers, and the next start reuses the compiled code."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.model import llama
from peft_pretraining.model.llama import FOLDER_VARIABLE, keep_compiled_code

ROOT = Path(__file__).resolve().parents[2]
# Runs the program, then prints torch.compile's counters.
PROGRAM = """
import json, sys, torch, torchrun_main
code = torchrun_main.main(sys.argv[1:])
counters = torch._dynamo.utils.counters
print(json.dumps({name: dict(counters[name]) for name in ("inductor", "stats", "graph_break")}))
sys.exit(code)
"""


def start(folder: Path, cache: Path, *flags: str) -> tuple[list[dict], dict[str, dict[str, int]]]:
    """Runs the program in a new process; returns the rows of metrics.jsonl and torch.compile's counters."""
    environment = {**os.environ, "SPARSE_LORA_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop(FOLDER_VARIABLE, None)
    command = [sys.executable, "-c", PROGRAM, *flags, "--save_dir", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads(ended.stdout.splitlines()[-1])


def test_compiled_losses_agree_and_the_second_start_compiles_nothing(tmp_path, tiny_run):
    """With the quickstart's model and method. The 12 held-out documents are three full batches, so there is one shape."""
    model = ["--model_config", "configs/llama_quickstart.json", *tiny_run[2:]]
    flags = [
        *(*model, "--peft_model", "sltrain", "--rank", "64", "--sp_ratio", "0.03", "--lora_alpha", "16"),
        *("--optimizer", "adamw", "--lr", "0.003", "--warmup_steps", "1", "--num_training_steps", "3"),
        *("--batch_size", "4", "--max_length", "32", "--wandb", "disabled", "--device", "cpu", "--dtype", "float32"),
        *("--workers", "0"),
    ]
    cache = tmp_path / "cache"
    eager, _ = start(tmp_path / "eager", cache, *flags)
    first, made = start(tmp_path / "first", cache, *flags, "--compile")
    second, found = start(tmp_path / "second", cache, *flags, "--compile")

    # Forward and backward pass of training and forward pass of evaluation, once for all four layers.
    assert made["stats"]["unique_graphs"] == 2
    assert not made["graph_break"]
    assert made["inductor"]["fxgraph_cache_miss"] == 3
    assert found["inductor"]["fxgraph_cache_hit"] == 3
    for counts in (made, found):
        assert "fxgraph_cache_bypass" not in counts["inductor"]
    assert "fxgraph_cache_miss" not in found["inductor"]
    assert any(path.name.startswith("compiled-") for path in cache.iterdir())

    for key, tolerance in (("loss", 1e-5), ("gradnorm", 1e-4), ("final_eval_loss", 1e-5)):
        expected = [row[key] for row in eager if key in row]
        assert expected
        assert [row[key] for row in first if key in row] == pytest.approx(expected, rel=tolerance)
        assert [row[key] for row in second if key in row] == [row[key] for row in first if key in row]


@pytest.mark.parametrize(
    ("module", "name"), [(platform, "machine"), (torch.backends.cpu, "get_cpu_capability"), (llama, "cpu_features")]
)
def test_another_cpu_does_not_reuse_the_compiled_code(tmp_path, monkeypatch, module, name):
    """torch compiles for the CPU in use; on a CPU without its instructions the code would crash."""
    monkeypatch.setenv("SPARSE_LORA_CACHE", str(tmp_path))
    # So that monkeypatch restores the variable after the test.
    monkeypatch.setenv(FOLDER_VARIABLE, "")

    def folder() -> str:
        monkeypatch.delenv(FOLDER_VARIABLE)
        assert keep_compiled_code() is None
        return os.environ[FOLDER_VARIABLE]

    here = folder()
    assert folder() == here
    monkeypatch.setattr(module, name, lambda: "another")
    assert folder() != here


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file" / "x"))
    with pytest.raises(ConfigError, match=f"{FOLDER_VARIABLE}=.*Not a directory"):
        keep_compiled_code()
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("SPARSE_LORA_CACHE", str(tmp_path / "file"))
    problem = keep_compiled_code()
    assert problem is not None
    assert f"set {FOLDER_VARIABLE}" in problem
    assert FOLDER_VARIABLE not in os.environ
