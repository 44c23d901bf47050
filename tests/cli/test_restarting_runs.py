"""Runs with restarts, and with optimizers that have states of their own, through the whole program: exact resume.

Also ReLoRA's start from full-rank weights.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from outcomes import tensors_of, without_times

import torchrun_main
from peft_pretraining.__main__ import main as command
from peft_pretraining.checkpoint.step_folder import list_checkpoints
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.world import World
from peft_pretraining.export.load import load_model
from peft_pretraining.plan.plan import learning_rates, make_plan
from sparse_lora import ReLoRALinear, SparseLowRankLinear

BF16 = ("--dtype", "bfloat16")
RELORA = ("--peft_model", "relora", "--relora", "2")
CYCLES = ("--scheduler", "cosine_restarts", "--cycle_length", "2", "--restart_warmup_steps", "1", "--warmup_steps", "1")
SLTRAIN = ("--peft_model", "sltrain", "--restart_every", "2", "--rebalance", "--restart_warmup_steps", "1")
# Optimizers with states of their own: after all updates and per layer, with accumulation, growth limit and a reset of moments.
OWN_STATES = [
    ["--peft_model", "sltrain", "--optimizer", optimizer, "--embedding_lr", "0.01", "--reset_moments_every", "4", *per_layer]
    for optimizer in ("muon", "muon8bit", "spectron", "spectron4bit", "stable_spam")
    for per_layer in ([], ["--per_layer", "--grad_norm_growth", "1.01"])
]
CONDITIONED = ["--condition_gradients", "--reset_moments_every", "4"]
# Gradients accumulated in moments: plain ones in float32 and bfloat16, quantised ones, those of a method with restarts, of int8
# parameters.
IN_MOMENTS = ["--per_layer", "--accumulate", "moments"]
HEAD = ["--head_gradient=slices"]
SLICES = [*HEAD, "--total_batch_size", "4"]
INT8 = ["--weight_dtype", "int8"]


@pytest.fixture
def flags(tiny_run) -> list[str]:
    return [
        *tiny_run,
        *("--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--optimizer", "adamw"),
        *("--lr", "0.003", "--warmup_steps", "1", "--num_training_steps", "6", "--batch_size", "4"),
        *("--total_batch_size", "8", "--max_length", "64", "--eval_every", "3", "--save_every", "3"),
        *("--wandb", "disabled", "--device", "cpu", "--dtype", "float32", "--workers", "0"),
    ]


def train(folder: Path, *flags: str) -> list[dict]:
    assert torchrun_main.main([*flags, "--save_dir", str(folder)]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict]) -> dict[int, float]:
    return {row["update_step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize(
    "extra",
    [
        # The first is resumed in the middle of a cycle, the second at a restart.
        [*RELORA, *CYCLES],
        [*RELORA, "--relora", "3", "--restart_warmup_steps", "1", "--train_scaling"],
        [*RELORA, "--optimizer", "adam8bit_per_layer", "--grad_norm_growth", "1.01"],
        [*RELORA, "--optimizer", "adamw4bit", "--stochastic_rounding", *BF16],
        pytest.param([*RELORA, "--optimizer", "adafactor", "--beta1", "0.9"], marks=pytest.mark.full),
        [*RELORA, "--optimizer", "sgd", "--beta1", "0.9", "--optimizer_random_pruning", "0.5"],
        [*RELORA, "--reset_optimizer_on_relora", "false", "--optimizer_magnitude_pruning", "0.9", "--per_layer"],
        [*SLTRAIN],
        [*SLTRAIN, "--restart_every", "3", "--init", "svd", "--support", "block", "--optimizer", "adam8bit"],
        [*SLTRAIN, "--peft_model", "lowrank", "--per_layer", "--init", "svd", "--train_scaling"],
        *OWN_STATES,
        [*SLTRAIN, "--optimizer", "muon", *CONDITIONED],
        [
            *BF16,
            *SLTRAIN,
            "--optimizer",
            "spectron4bit_per_layer",
            "--stochastic_rounding",
            "--grad_norm_growth",
            "1.01",
            *CONDITIONED,
        ],
        [*BF16, "--peft_model", "full", "--optimizer", "muon8bit_per_layer", "--embedding_states", "8bit", *SLICES, *CONDITIONED],
        [*SLTRAIN, *IN_MOMENTS],
        [*BF16, "--peft_model", "sltrain", *IN_MOMENTS, "--stochastic_rounding"],
        [*RELORA, "--optimizer", "adam8bit", "--embedding_states", "8bit", *IN_MOMENTS],
        [*BF16, "--peft_model", "sltrain", "--optimizer", "spectron4bit", "--embedding_states", "8bit", *IN_MOMENTS],
        [
            *BF16,
            "--peft_model",
            "sltrain",
            "--optimizer",
            "spectron4bit",
            "--embedding_states",
            "4bit",
            *IN_MOMENTS,
            *INT8,
            *HEAD,
        ],
        ["--peft_model", "full", "--optimizer", "adamw4bit", *IN_MOMENTS, *INT8, "--stochastic_rounding", "false"],
        [*BF16, "--peft_model", "sltrain", "--optimizer", "adamw4bit_per_layer", "--embedding_states", "4bit", *SLICES, *INT8],
        [*BF16, "--peft_model", "full", "--optimizer", "adam8bit_per_layer", *SLICES],
        [*BF16, "--stochastic_rounding", "--peft_model", "full", "--optimizer", "muon"],
        [*BF16, "--stochastic_rounding", *RELORA, "--optimizer", "spectron8bit_per_layer"],
        [*BF16, "--stochastic_rounding", *SLTRAIN, "--optimizer", "stable_spam"],
    ],
)
def test_a_resumed_run_continues_exactly(tmp_path, flags, extra):
    """Resumed from update 3, a run has the same losses, parameters and optimizer state as an uninterrupted one."""
    whole = train(tmp_path / "whole", *flags, *extra)
    middle, end = list_checkpoints(tmp_path / "whole")
    continued = train(tmp_path / "continued", *flags, *extra, "--continue_from", str(middle))
    assert without_times(continued) == without_times(whole)
    expected, found = tensors_of(end), tensors_of(list_checkpoints(tmp_path / "continued")[-1])
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    states = [json.loads((path / "state.json").read_text()) for path in (end, tmp_path / "continued" / end.name)]
    assert states[0] == states[1]
    account = next(row for row in whole if "memory_parameters_measured" in row)
    assert account["memory_parameters_measured"] == account["memory_parameters_predicted"]
    if "adafactor" not in extra:  # it keeps one more number per parameter, for its log
        assert account["memory_optimizer_measured"] == account["memory_optimizer_predicted"]


def test_other_micro_batches_are_told_to_change_second_moments(tmp_path, flags, capsys):
    """Accumulated in moments, for which their number counts; the notice names the size that keeps it."""
    flags = [*flags, "--peft_model", "sltrain", *IN_MOMENTS]
    train(tmp_path / "run", *flags)
    resumed = [*flags, "--num_training_steps", "7", "--allow_changes", "num_training_steps"]
    capsys.readouterr()
    train(tmp_path / "run", *resumed, "--batch_size", "2")
    assert "4 micro-batches per update (before: 2)" in (said := capsys.readouterr().err)
    assert "--batch_size times processes is 4" in said
    train(tmp_path / "run", *resumed[:-4], "--num_training_steps", "8", *resumed[-2:], "--batch_size", "2")
    assert "(before:" not in capsys.readouterr().err


@pytest.mark.parametrize("method", [RELORA, SLTRAIN])
def test_a_restart_changes_later_losses_but_not_the_next_one(tmp_path, flags, method):
    """The first loss after a restart equals that of a run without restarts; losses after the next update differ."""
    never = [word if word != "2" else "1000" for word in method]
    restarted, plain = (
        losses(train(tmp_path / name, *flags, *kind, "--warmup_steps", "0", "--restart_warmup_steps", "0"))
        for name, kind in (("restarted", method), ("plain", never))
    )
    for step in (1, 2):
        assert restarted[step] == plain[step]
    assert restarted[3] == pytest.approx(plain[3], rel=1e-5)
    assert restarted[5] != pytest.approx(plain[5], rel=1e-5)


def test_a_relora_run_starts_from_a_full_rank_run(tmp_path, flags, capsys):
    """Weights, update step, data position and record come from the full-rank run; the same command resumes from its own ones."""
    full = [*flags, "--peft_model", "full", "--optimizer", "sgd", "--lr", "0.01"]
    train(tmp_path / "warm", *full, "--num_training_steps", "2", "--eval_every", "2")
    longer = losses(train(tmp_path / "longer", *full, "--scheduler", "linear", "--allow_changes", "scheduler,num_training_steps",
                          "--continue_from", str(tmp_path / "warm")))  # fmt: skip
    warm = [*flags, *RELORA, *CYCLES, "--warmed_up_model", str(tmp_path / "warm"), "--save_every", "1"]
    rows = train(tmp_path / "relora", *warm)
    found = losses(rows)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found[3] == pytest.approx(longer[3], rel=1e-5)  # the same sequences through the same function
    assert found[4] != longer[4]
    start, end = tensors_of(tmp_path / "warm"), tensors_of(tmp_path / "relora" / "step_00000004")
    name = "model/model.layers.0.mlp.up_proj"
    assert torch.equal(start[f"{name}.weight"], end[f"{name}.weight"])
    assert not torch.equal(start["model/lm_head.weight"], end["model/lm_head.weight"])
    # The same command resumes from the run's own checkpoint, not from the full-rank one.
    reference = tensors_of(tmp_path / "relora" / "step_00000006")
    for step in (5, 6):
        damaged = tmp_path / "relora" / f"step_{step:08d}"
        damaged.rename(tmp_path / f"away-{step}")
    capsys.readouterr()
    again = train(tmp_path / "relora", *warm)
    assert without_times(again) == without_times(rows)
    again_end = tensors_of(tmp_path / "relora" / "step_00000006")
    assert all(torch.equal(reference[key], again_end[key]) for key in reference)
    # run.json keeps the full-rank run's arguments for reports, also if its path is written differently.
    warm_up = json.loads((tmp_path / "relora" / "run.json").read_text())["warm_up"]
    assert (warm_up["updates"], warm_up["arguments"]["lr"], warm_up["arguments"]["peft_model"]) == (2, 0.01, "full")
    (tmp_path / "relora" / "step_00000006").rename(tmp_path / "away-again")
    warm[warm.index("--warmed_up_model") + 1] = str(tmp_path / "relora" / ".." / "warm")
    assert without_times(train(tmp_path / "relora", *warm)) == without_times(rows)


@pytest.mark.parametrize(
    ("prepare", "extra", "words"),
    [
        ("sltrain", ["--warmed_up_model", "{}"], ["--warmed_up_model", "--peft_model sltrain", "full"]),
        ("full", ["--warmed_up_model", "{}", "--num_training_steps", "2"], ["its 2 updates", "--num_training_steps 2"]),
        ("full", ["--continue_from", "{}"], ["--peft_model relora", "made with full", "--warmed_up_model"]),
        ("full", ["--warmed_up_model", "{}", "--max_length", "32"], ["--max_length 32", "made with 64"]),
    ],
)
def test_an_invalid_full_rank_start_is_refused(tmp_path, flags, capsys, prepare, extra, words):
    train(tmp_path / "before", *flags, "--peft_model", prepare, "--num_training_steps", "2", "--eval_every", "2")
    capsys.readouterr()
    given = [word.format(tmp_path / "before") for word in extra]
    assert torchrun_main.main([*flags, *RELORA, "--save_dir", str(tmp_path / "run"), *given]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "Traceback" not in said


def test_a_model_is_loaded_from_a_checkpoint(tmp_path, flags):
    """load_model builds the model's layers and loads the checkpoint's tensors."""
    for method, kind in ((RELORA, ReLoRALinear), (SLTRAIN, SparseLowRankLinear)):
        folder = tmp_path / method[1]
        train(folder, *flags, *method, "--init", "svd")
        model, _, _ = load_model(folder, torch.device("cpu"))
        saved = tensors_of(folder)
        assert any(isinstance(module, kind) for module in model.modules())
        assert all(torch.equal(saved[f"model/{name}"], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([], ["--peft_model relora needs --relora"]),
        (["--relora", "0"], ["--relora 0", "at least 1"]),
        (["--relora", "5", "--optimizer_random_pruning", "1.5"], ["--optimizer_random_pruning 1.5", "at most 1"]),
        (
            ["--relora", "5", "--optimizer_magnitude_pruning", "0.9", "--optimizer", "adam8bit"],
            [
                "--optimizer_magnitude_pruning 0.9 with --optimizer adam8bit",
                "no plain number per element",
                "--reset_optimizer_on_relora",
            ],
        ),
        (
            ["--relora", "5", "--optimizer_magnitude_pruning", "0.9", "--reset_optimizer_on_relora", "true"],
            ["--optimizer_magnitude_pruning 0.9 with --reset_optimizer_on_relora", "drop one"],
        ),
        (
            ["--relora", "5", "--optimizer_magnitude_pruning", "0.9", "--optimizer_random_pruning", "0.9"],
            ["--optimizer_random_pruning with --optimizer_magnitude_pruning"],
        ),
        (["--relora", "5", "--restart_every", "5"], ["--restart_every 5 with --peft_model relora"]),
        (["--relora", "5", "--restart_warmup_steps", "5"], ["--restart_warmup_steps 5", "below --relora 5"]),
        (["--relora", "5", "--warmed_up_model", "nowhere"], ["--warmed_up_model nowhere", "no such folder"]),
        (["--relora", "5", "--warmed_up_model", ".", "--continue_from", "."], ["drop one of the two"]),
        (
            ["--relora", "5", *CYCLES, "--max_train_tokens", "1M"],
            ["--max_train_tokens", "cosine_restarts", "--num_training_steps"],
        ),
        (["--peft_model", "sltrain", "--restart_every", "0"], ["--restart_every 0", "at least 1"]),
        (["--peft_model", "sltrain", "--rebalance"], ["--rebalance needs --restart_every"]),
        (
            ["--peft_model", "sltrain", "--restart_every", "4", *CYCLES],
            ["--restart_every 4 with --scheduler cosine_restarts", "cosine or linear"],
        ),
        (["--peft_model", "sltrain", "--init", "pca"], ["--init pca", "svd"]),
        (
            ["--peft_model", "sltrain", "--init", "svd", "--rank", "40"],
            ["--rank 40 with --init svd", "--rank 32 or less"],
        ),
        (
            ["--peft_model", "lowrank", "--restart_every", "4", "--rebalance", "--rank", "40"],
            ["--rank 40 with --rebalance", "--rank 32 or less"],
        ),
    ],
)
def test_invalid_combinations_are_refused_with_one_message(flags, capsys, extra, words):
    assert torchrun_main.main([*flags, "--peft_model", "relora", *extra, "--dry_run"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([*RELORA], ["--relora 2 with --scheduler cosine", "--restart_warmup_steps"]),
        ([*RELORA, "--relora", "6"], ["--relora 6 with --num_training_steps 6", "never merged"]),
        ([*RELORA, *CYCLES, "--relora", "3"], ["--relora 3 with --cycle_length 2", "--cycle_length 3"]),
        ([*RELORA, *CYCLES], ["factors merged every 2 updates, their moments zeroed", "are frozen"]),
        ([*RELORA, "--optimizer_magnitude_pruning", "0.9"], ["90% zeroed (magnitude)"]),
        ([*SLTRAIN], ["linears' moments set to zero every 2 updates, balanced factors"]),
        (["--peft_model", "full", "--restart_every", "2"], ["--restart_every has no effect with --peft_model full"]),
        (["--peft_model", "sltrain", "--relora", "2"], ["--relora has no effect with --peft_model sltrain"]),
        ([*RELORA, "--sp_ratio", "0.1"], ["--sp_ratio has no effect with --peft_model relora"]),
        ([*SLTRAIN, "--restart_every", "6"], ["--restart_every 6 with --num_training_steps 6", "before a restart"]),
        (
            [*RELORA, "--optimizer", "sgd", "--optimizer_random_pruning", "0.5"],
            ["--optimizer_random_pruning has no effect with --optimizer sgd without --beta1", "no moments"],
        ),
        (
            ["--peft_model", "lowrank", "--restart_every", "2", "--optimizer", "sgd"],
            ["--restart_every has no effect with --optimizer sgd without --beta1"],
        ),
        (
            ["--peft_model", "galore", "--rank", "32"],
            ["--rank 32 with --peft_model galore", "shorter side", "--rank 8"],
        ),
    ],
)
def test_plan_and_notices_describe_restarts(flags, capsys, extra, words):
    assert torchrun_main.main([*flags, *extra, "--dry_run"]) == 0
    said = capsys.readouterr()
    assert all(word in said.out + said.err for word in words), said


@pytest.mark.parametrize(
    "extra",
    [
        # The scheduler's cycles warm up after each merge.
        [*RELORA, "--cycle_length", "2"],
        [*RELORA, "--optimizer", "sgd", "--beta1", "0.9", "--optimizer_random_pruning", "0.5", *CYCLES],
        [*SLTRAIN, "--optimizer", "sgd"],
        [*SLTRAIN, "--restart_every", "5"],
        ["--peft_model", "galore"],
    ],
)
def test_flags_with_an_effect_give_no_warning(flags, capsys, extra):
    assert torchrun_main.main([*flags, *extra, "--dry_run"]) == 0
    said = capsys.readouterr()
    assert "warning: --" not in said.out
    assert not any(f"--{name} has no effect" in said.err for name in ("restart_every", "optimizer_random_pruning"))


def test_the_learning_rate_warms_up_after_a_restart(flags):
    args = parse_args([*flags, *SLTRAIN, "--restart_every", "3", "--warmup_steps", "0", "--scheduler", "linear"])
    plan = make_plan(args, World())
    rates = [learning_rates(args, plan).at(step, 0) / (0.003 * (6 - step) / 6) for step in range(6)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 1, 1])


def test_the_learning_rate_warms_up_once_after_a_merge(flags):
    """A scheduler without restarts is multiplied by a warm-up; one with restarts has its own."""
    relora = ["--peft_model", "relora", "--relora", "3", "--restart_warmup_steps", "2", "--warmup_steps", "2"]

    def rates(*schedule: str) -> list[float]:
        args = parse_args([*flags, *relora, "--scheduler", *schedule])
        return [learning_rates(args, make_plan(args, World())).at(step, 0) / 0.003 for step in range(6)]

    assert rates("linear") == pytest.approx([0, 1 / 2, 1, 3 / 4 / 3, 2 / 4 * 2 / 3, 1 / 4])
    # One cosine from update 2 to 6; after the merge a warm-up from 0 to its value.
    at_merge = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 3 / 4))
    restarting = rates("cosine_restarts", "--cycle_length", "3", "--min_lr_ratio", "0.2")
    assert restarting == pytest.approx([0, 1 / 2, 1, 0, at_merge / 2, at_merge])


def test_estimate_of_relora_needs_no_merge_interval(flags, capsys):
    """Without --relora, estimate gives ReLoRA's row of the paper's table."""
    flags = ["--model_config", "configs/llama_60m.json", "--peft_model", "relora", "--rank", "128", "--json"]
    assert command(["estimate", *flags, "--dtype", "bfloat16", "--optimizer", "adamw"]) == 0
    found = json.loads(capsys.readouterr().out)
    factors = found["parameters"]["low_rank"]
    assert found["parameters"]["total"] == 58_073_600 + factors == 58_073_600 + 42_770_944 - 32_776_704
    assert found["paper"] == {"parameters_G": 0.14, "optimizer_G": 0.04, "total_G": 0.18}
    assert found["bytes"]["gradients"] == 2 * (32_776_704 + factors)
    assert found["bytes"]["parameters"] == 2 * found["parameters"]["total"]
    assert math.isclose(found["bytes"]["optimizer"], 4 * (32_776_704 + factors), rel_tol=1e-4)
