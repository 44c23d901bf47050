"""Checkpoints of an earlier version go on: written at commit 32d0810, before the program was divided into folders."""

import json
import tarfile
from pathlib import Path

import pytest
from tiny_model import TINY_MODEL
from tiny_runs import write_inputs

import torchrun_main

# The run folders of METHODS at that commit, with their checkpoint after 4 of 8 updates and their metrics of all 8.
ARCHIVE = Path(__file__).with_name("written_at_32d0810.tar.xz")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
METHODS = {
    "sltrain": ["--lora_alpha", "2", "--sp_ratio", "0.1"],
    "galore": ["--update_proj_gap", "3"],
    "relora": ["--lora_alpha", "2", "--relora", "3"],
}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_an_earlier_version_goes_on_as_it_did_then(tmp_path, monkeypatch, method):
    """The same command resumes at update 4; losses, gradient norms and the evaluation are those of the earlier version."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "runs", filter="data")
    inputs = Path("inputs")
    inputs.mkdir()
    write_inputs(inputs)
    (inputs / "small.json").write_text(json.dumps(TINY_MODEL | SMALL))
    then = rows(Path("runs", method))
    flags = ["--model_config", "inputs/small.json", "--tokenizer", "inputs/tiny.model", "--dataset", "inputs/corpus"]
    flags += ["--dtype", "float32", "--optimizer", "adamw", "--lr", "0.01", "--warmup_steps", "2", "--num_training_steps", "8"]
    flags += ["--batch_size", "8", "--max_length", "64", "--eval_every", "8", "--save_every", "4", "--wandb", "disabled"]
    flags += ["--device", "cpu", "--workers", "0", "--peft_model", method, "--rank", "4", *METHODS[method]]
    assert torchrun_main.main([*flags, "--save_dir", f"runs/{method}"]) == 0
    now = rows(Path("runs", method))
    assert [row["update_step"] for row in now] == [row["update_step"] for row in then] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    for name in ("loss", "gradnorm", "lr", "tokens_seen", "final_eval_loss"):
        values = [[row[name] for row in found if name in row] for found in (now, then)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), name
    assert Path("runs", method, "step_00000008").is_dir()
