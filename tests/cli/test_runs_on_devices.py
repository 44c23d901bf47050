"""The program on a CPU and on a GPU: saved and resumed, in the background, per layer, with 4-bit moments; out of memory."""

from pathlib import Path

import pytest
import torch
from outcomes import record, tensors_of
from tiny_runs import flags_of

import torchrun_main
from peft_pretraining.checkpoint.step_folder import list_checkpoints


def train(folder: Path, flags: list[str]) -> Path:
    assert torchrun_main.main([*flags, "--save_dir", str(folder)]) == 0
    return folder


RESUMED = {
    "block": ("sltrain_block", ["--async_save"], "torch"),
    "4-bit": ("sltrain_bf16", ["--optimizer", "adamw4bit", "--stochastic_rounding"], "torchao"),
    "per-layer": ("sltrain_bf16", ["--optimizer", "adamw_per_layer", "--grad_norm_growth", "1.1", "--async_save"], "torch"),
    "masked": ("full_packed", ["--async_save"], "torch"),
    "8-bit": ("sltrain_bf16", ["--optimizer", "adam8bit", "--workers", "1"], "bitsandbytes"),
    "galore": ("galore", ["--optimizer", "adam8bit", "--dtype", "bfloat16"], "bitsandbytes"),
}


# On a CPU test_program.py resumes runs with most of these settings, without saving in the background.
@pytest.mark.parametrize(
    ("where", "case"),
    [
        *(pytest.param("cpu", case, marks=[] if case in ("per-layer", "masked") else pytest.mark.full) for case in RESUMED),
        *(pytest.param("cuda", case, marks=pytest.mark.gpu) for case in RESUMED),
    ],
)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path, tiny_run, where, case):
    """Bit-identical on a CPU; on a GPU, where sums may be taken in another order, with nearly the same losses."""
    name, more, package = RESUMED[case]
    pytest.importorskip(package)
    flags = [*flags_of(name, tiny_run), *more, "--device", where, "--save_every", "4"]
    whole = train(tmp_path / "whole", flags)
    middle, end = list_checkpoints(whole)
    continued = train(tmp_path / "continued", [*flags, "--continue_from", str(middle)])
    expected, found = record(whole), record(continued)
    if where == "cpu":
        assert found == expected
        states = tensors_of(end), tensors_of(list_checkpoints(continued)[-1])
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert [row["loss"] for row in found if "loss" in row] == pytest.approx(
        [row["loss"] for row in expected if "loss" in row], rel=1e-3
    )


# Generating code takes a CPU half a minute, and tests/training compile on one.
@pytest.mark.parametrize("where", [pytest.param("cpu", marks=pytest.mark.full), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["sltrain", "sltrain_block"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path, tiny_run, where, name):
    flags = [*flags_of(name, tiny_run), "--device", where]
    rows = [record(train(tmp_path / key, [*flags, *more])) for key, more in {"eager": [], "compiled": ["--compile"]}.items()]
    eager, compiled = ([row["loss"] for row in part if "loss" in row] for part in rows)
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_a_device_that_runs_out_of_memory_is_explained(tmp_path, tiny_run, device, monkeypatch, capsys):
    """With the error that the device's own allocator raises."""
    import peft_pretraining.training.update as training

    def step(*args, **kwargs):
        torch.empty(2**60, dtype=torch.int8, device=device)

    monkeypatch.setattr(training, "train_step", step)
    flags = [*flags_of("sltrain", tiny_run), "--device", str(device), "--save_dir", str(tmp_path / "run")]
    assert torchrun_main.main(flags) == 1
    message = capsys.readouterr().err
    assert "memory ran out" in message
    assert "--activation_checkpointing" in message
    assert "Traceback" not in message
