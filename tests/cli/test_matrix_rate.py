"""benchmarks/matrix_rate.py scales the steps and initial values it names, and never resumes a run with another scaling."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from outcomes import tensors_of

from peft_pretraining.model import llama
from peft_pretraining.optim.updates import WholeUpdate

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "matrix_rate.py"
MATRIX = "model/model.layers.0.mlp.up_proj"
HEAD = "model/lm_head.weight"


@pytest.fixture
def trained(monkeypatch, tmp_path, tiny_run):
    """Makes a run of one update with the benchmark's command line; returns its folder."""
    spec = importlib.util.spec_from_file_location("matrix_rate", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(name: str, *flags: str, expected: int = 0) -> Path:
        # The benchmark's changes in this process are undone afterwards.
        with monkeypatch.context() as patch:
            patch.setattr(llama, "prepare_to_train", llama.prepare_to_train)
            patch.setattr(WholeUpdate, "finish", WholeUpdate.finish)
            common = [
                "--rank",
                "8",
                "--sp_ratio",
                "0.1",
                "--batch_size",
                "4",
                "--max_length",
                "64",
                "--num_training_steps",
                "1",
            ]
            common += [
                "--warmup_steps",
                "0",
                "--optimizer",
                "sgd",
                "--eval_every",
                "1",
                "--wandb",
                "disabled",
                "--device",
                "cpu",
            ]
            common += ["--dtype", "float32", "--workers", "0", "--lr", "0.5", "--grad_clipping", "0"]
            patch.setattr(sys, "argv", ["x", *tiny_run, *common, *flags, "--save_dir", str(tmp_path / name)])
            assert module.main() == expected
        return tmp_path / name

    return run


@pytest.mark.parametrize("init", ["default", "svd"])
def test_initial_values_of_every_init_are_scaled(trained, init):
    still = ["--peft_model", "sltrain", "--init", init, "--lr", "1e-30"]
    plain, scaled = (
        tensors_of(trained(name, *still, "--start", start, "--start_names", "lora_A"))
        for name, start in (("plain", "1"), ("scaled", "0.25"))
    )
    assert torch.equal(scaled[f"{MATRIX}.lora_A"], plain[f"{MATRIX}.lora_A"] / 4)
    # By default B starts at 0, and an update with a learning rate of 1e-30 changes it very little.
    torch.testing.assert_close(scaled[f"{MATRIX}.lora_B"], plain[f"{MATRIX}.lora_B"], rtol=0, atol=1e-20)
    assert torch.equal(scaled[HEAD], plain[HEAD])


def test_steps_of_matrices_are_scaled(trained):
    still, whole, quarter = (
        tensors_of(trained(name, "--peft_model", "full", "--lr", lr, "--scale", scale))
        for name, lr, scale in (("still", "1e-30", "1"), ("whole", "0.5", "1"), ("quarter", "0.5", "0.25"))
    )
    name = f"{MATRIX}.weight"
    step, smaller = (tensors[name] - still[name] for tensors in (whole, quarter))
    assert step.abs().max() > 0
    torch.testing.assert_close(smaller, step / 4, rtol=1e-4, atol=1e-7)
    assert torch.equal(quarter[HEAD], whole[HEAD])


def test_a_folder_with_another_scaling_is_refused(trained, capsys):
    flags = ["--peft_model", "sltrain", "--start", "0.5"]
    folder = trained("run", *flags)
    trained("run", *flags)  # finished
    for other in (["--start", "0.25"], ["--start", "0.5", "--start_names", "lora_A"], ["--scale", "0.5"]):
        with pytest.raises(SystemExit):
            trained("run", "--peft_model", "sltrain", *other)
        assert "contains a run made with {'scale': 1.0, 'start': 0.5" in capsys.readouterr().err
    (folder / "scaled.json").unlink()
    with pytest.raises(SystemExit):
        trained("run", *flags)
    assert "no scaling" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["arguments"]["peft_model"] == "sltrain"


def test_names_that_match_nothing_are_refused(trained, capsys):
    trained("run", "--peft_model", "sltrain", "--start", "0.5", "--start_names", "lora_b", expected=2)
    assert "--start_names lora_b: no parameter's name contains it" in capsys.readouterr().err
    trained("run", "--peft_model", "sltrain", "--start", "0.5", "--start_names", "lora_B")  # nothing was made there
