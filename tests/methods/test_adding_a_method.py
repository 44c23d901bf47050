"""The example of docs/adding_a_method.md, a method in one file outside the package, works in every part of the program."""

import json
import re
from pathlib import Path

import nonlinear
import pytest
import torch
from outcomes import tensors_of, without_times

import torchrun_main
from peft_pretraining.__main__ import main as command
from peft_pretraining.checkpoint.step_folder import list_checkpoints
from peft_pretraining.config.arguments import METHOD_NAMES
from peft_pretraining.export.load import load_model
from peft_pretraining.methods import METHODS, register

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--peft_model", "nonlinear", "--rank", "8")


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Makes the example a choice of --peft_model, during this file's tests only."""
    register(nonlinear.METHOD)
    yield
    del METHODS["nonlinear"]
    del METHOD_NAMES["nonlinear"]


@pytest.fixture(scope="module")
def flags(tiny_run) -> list[str]:
    return [
        *(*tiny_run, *FLAGS, "--optimizer", "adamw", "--lr", "0.01", "--warmup_steps", "1", "--num_training_steps", "6"),
        *("--batch_size", "8", "--max_length", "64", "--eval_every", "3", "--save_every", "3", "--wandb", "disabled"),
        *("--device", "cpu", "--dtype", "float32", "--workers", "0"),
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """Returns the folder of a run of six updates."""
    folder = tmp_path_factory.mktemp("nonlinear") / "whole"
    assert torchrun_main.main([*flags, "--save_dir", str(folder)]) == 0
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_page_shows_the_examples_file():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_method.md").read_text(), re.DOTALL)
    shown = [line for line in "\n".join(blocks).splitlines() if line]
    assert shown == [line for line in Path(nonlinear.__file__).read_text().splitlines() if line]


def test_the_example_method_trains(whole):
    losses = [row["loss"] for row in rows_of(whole) if "loss" in row]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_the_example_method_resumes_bit_identically(whole, flags, tmp_path):
    middle, end = list_checkpoints(whole)
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path), "--continue_from", str(middle)]) == 0
    assert without_times(rows_of(tmp_path)) == without_times(rows_of(whole))
    expected, resumed = tensors_of(end), tensors_of(tmp_path)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.parametrize("more", [("--per_layer",), ("--optimizer", "adam8bit")])
def test_the_example_method_trains_per_layer_and_with_another_optimizer(flags, more, tmp_path):
    assert torchrun_main.main([*flags, *more, "--num_training_steps", "2", "--save_dir", str(tmp_path)]) == 0


def test_estimated_parameters_equal_those_of_the_model(whole, flags, capsys):
    assert command(["estimate", "--json", *flags]) == 0
    estimated = json.loads(capsys.readouterr().out)
    model, _, record = load_model(whole, torch.device("cpu"))
    parameters = dict(model.named_parameters())
    factors = sum(parameter.numel() for name, parameter in parameters.items() if "lora_" in name)
    assert estimated["parameters"]["total"] == sum(parameter.numel() for parameter in parameters.values())
    assert estimated["parameters"]["low_rank"] == factors > 0
    assert estimated["parameters"] == record["plan"]["parameters"]


def test_predicted_bytes_equal_the_measured_ones(whole):
    measured = next(row for row in rows_of(whole) if "memory_parameters_measured" in row)
    for kind in ("parameters", "optimizer"):
        assert measured[f"memory_{kind}_measured"] == measured[f"memory_{kind}_predicted"]


def test_the_report_shows_the_methods_title(whole, tmp_path):
    assert command(["report", str(whole), "--out", str(tmp_path)]) == 0
    assert any(nonlinear.METHOD.title in page.read_text() for page in tmp_path.glob("*.html"))


def test_an_export_of_dense_weights_is_refused(whole, tmp_path, capsys):
    assert command(["export", "--checkpoint", str(whole), "--out", str(tmp_path / "export")]) != 0
    assert "has linears without an equal dense weight" in capsys.readouterr().err


def test_the_methods_warnings_and_notices_are_printed(flags, tmp_path, capsys):
    """Its warnings are in the plan, and arguments that it does not read give a notice."""
    assert torchrun_main.main([*flags, "--rank", "48", "--sp_ratio", "0.1", "--dry_run", "--save_dir", str(tmp_path)]) == 0
    output = "".join(capsys.readouterr())
    assert "have more parameters than the weight" in output
    assert "--sp_ratio has no effect with --peft_model nonlinear" in output
