"""Runs with --weight_dtype int8: bit-exact resume, the account, checkpoints with codes and scales, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from outcomes import assert_equal_runs, tensors_of
from tiny_runs import flags_of

import torchrun_main
from peft_pretraining.checkpoint.step_folder import CheckpointError, list_checkpoints, resolve
from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.checks import check
from peft_pretraining.plan.plan import make_plan


def train(folder: Path, tiny_run: list[str], *flags: str) -> Path:
    assert torchrun_main.main([*flags_of("sltrain_int8", tiny_run), *flags, "--save_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "adamw4bit", "--dtype", "bfloat16"],
        ["--optimizer", "spectron8bit", "--support", "block", "--async_save", "--condition_gradients"],
        ["--optimizer", "muon", "--peft_model", "lowrank", "--init", "svd", "--restart_every", "4", "--rebalance"],
        ["--optimizer", "stable_spam", "--peft_model", "full", "--stochastic_rounding", "false"],
    ],
)
def test_whole_per_layer_and_resumed_runs_are_bit_identical(tiny_run, tmp_path, flags):
    """Resumed per layer, with recomputed activations, from a checkpoint of the whole run."""
    whole = train(tmp_path / "whole", tiny_run, *flags, "--save_every", "3", "--keep_checkpoints", "9")
    layered = train(tmp_path / "layered", tiny_run, *flags, "--per_layer")
    assert_equal_runs(whole, layered)
    start = ["--continue_from", str(whole / "step_00000003"), "--per_layer", "--activation_checkpointing", "selective"]
    assert_equal_runs(whole, train(tmp_path / "resumed", tiny_run, *flags, *start))


def test_relora_names_the_full_rank_run_that_it_can_start_from(tiny_run, tmp_path, capsys):
    full = train(tmp_path / "full", tiny_run, "--peft_model", "full", "--num_training_steps", "2")
    flags = [*flags_of("relora", tiny_run), "--warmed_up_model", str(full), "--save_dir", str(tmp_path / "relora")]
    assert torchrun_main.main(flags) == 2
    message = capsys.readouterr().err
    assert re.search(r"--warmed_up_model .*: its weights are stored in int8, .* made without --weight_dtype", message)
    assert "--weight_dtype not given" not in message


def test_the_account_is_exact_and_the_checkpoint_holds_codes_and_scales_only(trained):
    run = trained("sltrain_int8")
    (row,) = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if "memory_parameters_measured" in row]
    tensors = {name: t for name, t in tensors_of(run).items() if name.startswith("model/") and ".support." not in name}
    codes = [t for name, t in tensors.items() if f"{name}.scales" in tensors]
    plain = [t for name, t in tensors.items() if f"{name}.scales" not in tensors and not name.endswith(".scales")]
    assert {t.dtype for t in codes} == {torch.int8}
    assert all(t.dim() == 1 for t in plain)  # norms
    assert sum("lora_A.scales" in name for name in tensors) == sum("sparse_value.scales" in name for name in tensors) == 7 * 2
    by_hand = sum(t.numel() + 4 * -(-t.numel() // 128) for t in codes) + sum(t.nbytes for t in plain)
    assert row["memory_parameters_measured"] == row["memory_parameters_predicted"] == by_hand
    for name in ("support", "optimizer"):
        assert row[f"memory_{name}_measured"] == row[f"memory_{name}_predicted"]


def test_a_corrupted_scale_is_found(trained, tiny_run, tmp_path):
    train(tmp_path / "run", tiny_run, "--save_every", "4", "--keep_checkpoints", "2")
    path = list_checkpoints(tmp_path / "run")[-1]
    scale = tensors_of(path)["model/model.layers.0.mlp.up_proj.sparse_value.scales"].numpy().tobytes()
    (file,) = path.glob("tensors/*.distcp")
    content = bytearray(file.read_bytes())
    assert content.count(scale) == 1
    content[content.find(scale)] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        resolve(path)
    assert resolve(tmp_path / "run") == path.parent / "step_00000004"


@pytest.mark.parametrize(
    ("method", "flags", "said"),
    [
        ("sltrain", ["--weight_dtype", "int8"], "--weight_dtype int8: .* was made without it; leave it out"),
        ("sltrain_int8", ["--stochastic_rounding", "false"], "--stochastic_rounding False: .* was made with True; use True"),
        ("sltrain_int8", None, "--weight_dtype not given: .* was made with int8; use int8"),
    ],
)
def test_a_run_does_not_go_on_with_parameters_stored_otherwise(trained, tiny_run, capsys, method, flags, said):
    run = trained(method)
    capsys.readouterr()
    words = [
        *flags_of("sltrain" if flags is None else method, tiny_run),
        "--lora_alpha",
        "2",
        "--save_dir",
        str(run),
        *(flags or []),
    ]
    assert torchrun_main.main([*words, "--num_training_steps", "9", "--allow_changes", "num_training_steps"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(said, line), line


@pytest.mark.parametrize(
    ("flags", "ways_out"),
    [
        ("--peft_model galore", ["--peft_model galore", "full, lowrank or sltrain"]),
        ("--peft_model relora --relora 4", ["--peft_model relora", "full, lowrank or sltrain"]),
        ("--optimizer sgd", ["--optimizer sgd", "adamw4bit"]),
        ("--optimizer adafactor", ["--optimizer adafactor", "spectron8bit"]),
        ("--compile", ["--compile", "leave one of the two out"]),
        ("--parallel fsdp", ["--parallel fsdp", "--parallel ddp"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(tiny_run, flags, ways_out):
    with pytest.raises(ConfigError) as refused:
        check(parse_args([*flags_of("sltrain_int8", tiny_run), *flags.split()]), World(size=2))
    (problem,) = refused.value.problems
    assert all(part in problem for part in ("--weight_dtype int8", *ways_out))


def test_rounding_is_stochastic_unless_it_is_said_not_to_be(tiny_run):
    def rounds(*flags: str) -> bool:
        return parse_args([*flags_of("sltrain", tiny_run), *flags]).stochastic_rounding

    assert rounds("--weight_dtype", "int8")
    assert rounds("--weight_dtype", "int8", "--stochastic_rounding", "true")
    assert not rounds("--weight_dtype", "int8", "--stochastic_rounding", "false")
    assert not rounds()
    folders = {
        make_plan(parse_args([*flags_of("sltrain", tiny_run), *flags]), World()).save_dir
        for flags in ([], ["--weight_dtype", "int8"], ["--weight_dtype", "int8", "--stochastic_rounding", "false"])
    }
    assert len(folders) == 3


def test_the_plan_says_how_weights_are_stored(tiny_run, capsys):
    for more, said in (([], "stochastically"), (["--stochastic_rounding", "false"], "to nearest")):
        assert torchrun_main.main([*flags_of("sltrain_int8", tiny_run), *more, "--dry_run"]) == 0
        assert f"float32, weights stored in int8, rounded {said}" in capsys.readouterr().out
