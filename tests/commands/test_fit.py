"""`estimate --fit` lists flags that fit, the least work first, and keeps those that are given."""

import itertools
import json
import shlex
from pathlib import Path

import pytest
import torch

from peft_pretraining.__main__ import main as command
from peft_pretraining.commands.fit import multiplications_per_token
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.plan import make_plan, setting_of
from peft_pretraining.record.mfu import training_flops
from peft_pretraining.run.build import build_token_loss

ROOT = Path(__file__).resolve().parents[2]
ONE_B = ["--model_config", str(ROOT / "configs/llama_1b.json"), "--peft_model", "sltrain", "--rank", "512", "--sp_ratio", "0.03"]


def fits(capsys, *flags: str) -> list[dict]:
    command(["estimate", "--json", *flags])
    return json.loads(capsys.readouterr().out)


def peak(capsys, *flags: str) -> int:
    assert command(["estimate", "--json", "--device_type", "cuda", *flags]) == 0
    return json.loads(capsys.readouterr().out)["bytes"]["peak"]


@pytest.mark.parametrize("memory", ["4GB", "6GB"])
def test_typed_flags_of_every_choice_give_its_peak_and_fit(capsys, memory):
    found = fits(capsys, *ONE_B, "--fit", memory)
    limit = int(memory[0]) * 10**9
    assert found
    for choice in found:
        assert peak(capsys, *ONE_B, *shlex.split(choice["flags"])) == choice["peak"] <= limit
    works = [choice["work"] for choice in found]
    assert all(later > 0.97 * earlier for earlier, later in itertools.pairwise(works))


@pytest.mark.parametrize("total", ["1", "512"])
def test_7b_fits_a_card_of_8_gb_with_the_published_batch_too(capsys, total):
    model = ["--model_config", str(ROOT / "configs/llama_7b.json"), "--peft_model", "sltrain", "--rank", "1024"]
    batch = ["--sp_ratio", "0.05", "--batch_size", "1", "--total_batch_size", total, "--device_type", "cuda"]
    found = fits(capsys, *model, *batch, "--fit", "8GB")
    assert found
    assert all(choice["peak"] <= 8e9 for choice in found)
    assert all(("--accumulate moments" in choice["flags"]) == (total == "512") for choice in found)


def test_a_larger_micro_batch_than_proposed_would_not_fit(capsys):
    flags = [
        "--total_batch_size",
        "256",
        "--per_layer",
        "false",
        "--activation_checkpointing",
        "layer",
        "--head_gradient",
        "whole",
    ]
    fixed = [*flags, "--optimizer", "adamw", "--weight_dtype", "int8"]
    (choice,) = fits(capsys, *ONE_B, *fixed, "--fit", "8GB")
    assert choice["flags"] == f"--batch_size {choice['batch_size']}"
    twice = str(2 * choice["batch_size"])
    assert peak(capsys, *ONE_B, *fixed, "--batch_size", twice) > 8 * 10**9


def test_given_flags_stay_and_open_ones_are_chosen(capsys):
    found = fits(capsys, *ONE_B, "--optimizer", "adam8bit", "--weight_dtype", "int8", "--batch_size", "2", "--fit", "6GB")
    assert found
    assert not any(
        flag in choice["flags"] for choice in found for flag in ("--optimizer", "--weight_dtype", "--batch_size", "--peft_model")
    )


def test_with_enough_memory_nothing_but_the_batch_changes(capsys):
    (choice,) = fits(capsys, *ONE_B, "--batch_size", "4", "--fit", "80GB")
    assert choice["flags"] == ""
    assert command(["estimate", *ONE_B, "--batch_size", "4", "--fit", "80GB"]) == 0
    assert "no more flags" in capsys.readouterr().out


def test_too_little_memory_and_a_size_without_unit_are_told(capsys):
    assert command(["estimate", *ONE_B, "--fit", "1GB"]) == 1
    assert "no choice of flags fits in 0.93 GiB" in capsys.readouterr().out
    assert command(["estimate", *ONE_B, "--fit", "8"]) == 2
    assert "--fit 8: write a size in bytes with its unit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method",
    ["full", "lowrank", "sltrain --support uniform", "sltrain --support block", "galore"],
    ids=lambda text: text.split()[-1],
)
def test_work_equals_the_arithmetic_of_the_built_model(method):
    """record.mfu counts it on the built model's layers; checkpointing and a sliced gradient add parts of it."""
    name, *support = method.split()
    flags = ["--model_config", str(ROOT / "configs/llama_demo.json"), "--peft_model", name, "--dtype", "float32", "--lr", "0.1"]
    layer = [] if name == "full" else ["--rank", "32"]
    layer += ["--sp_ratio", "0.1"] if name == "sltrain" else []
    size = ["--batch_size", "2", "--max_length", "32", "--num_training_steps", "2", "--warmup_steps", "0", "--dataset", "demo"]
    args = parse_args([*flags, *layer, *size])
    plan = make_plan(args, World(), "float32", "cpu")
    model = build_token_loss(args, plan, World(), torch.device("cpu")).model
    (per_sequence, per_token), _ = training_flops(model, 2, 32)
    work = multiplications_per_token(setting_of(plan, args, "cpu"))
    assert 2 * work == pytest.approx(per_sequence / 32 + per_token, rel=1e-9)
