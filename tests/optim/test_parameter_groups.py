"""Each parameter group has its own learning rate and weight decay; the flags of one group leave the other groups alone."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import METHODS, flags_of

import torchrun_main
from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.config.parameter_groups import PARAMETER_GROUPS, group_of
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.checks import notices
from peft_pretraining.plan.plan import format_plan, learning_rates, make_plan
from peft_pretraining.record.summary import read_metrics
from peft_pretraining.run.build import build_token_loss, build_updates

CPU = torch.device("cpu")


def model_and_updates(tiny_run, method: str, *flags: str):
    """A tiny model with its loss, its update procedure and the learning rate."""
    args = parse_args([*flags_of(method, tiny_run), *flags, "--save_dir", "unused"])
    module = build_token_loss(args, make_plan(args, World()), World(), CPU)
    return module, build_updates(args, module.model, World(), CPU), args.lr


def after_one_update(tiny_run, method: str, *flags: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All trained parameters of a tiny model by name, before and after its first update."""
    module, updates, lr = model_and_updates(tiny_run, method, *flags)
    trained = {name: parameter for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        if name.endswith("lora_B") and not parameter.any():
            # A would have no gradient.
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    tokens = torch.arange(32).view(2, 16) + 3
    updates.begin(lr)
    updates.before_backward(last=True)
    loss = module(tokens, tokens, 30)
    loss.backward()
    updates.finish(loss.detach())
    return before, {name: parameter.detach().clone() for name, parameter in trained.items()}


# Every optimizer with SLTrain; with the other methods one of each kind that they can have.
PAIRS = [
    *(("sltrain", optimizer) for optimizer in OPTIMIZERS),
    *(("full", optimizer) for optimizer in ("adamw", "adam8bit", "muon", "stable_spam")),
    *(("relora", optimizer) for optimizer in ("adamw", "spectron")),
    ("sltrain", "muon --condition_gradients"),
    ("lowrank", "adamw"),
    ("lowrank", "spectron"),
    ("sltrain_scaled", "adamw"),
    *(("galore", optimizer) for optimizer in ("adamw", "sgd", "adam8bit")),
]


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_a_rate_moves_its_group_and_no_other(tiny_run, method, optimizer, per_layer):
    """With rate r and with 3 r; every optimizer's first step is proportional to its rate."""
    flags = ["--optimizer", *optimizer.split(), *(["--per_layer"] if per_layer else [])]
    groups_of_method = [group for group in PARAMETER_GROUPS if group != "sparse" or method.startswith("sltrain")]
    _, plain = after_one_update(tiny_run, method, *flags)
    for group in groups_of_method:
        before, changed = after_one_update(tiny_run, method, *flags, f"--{group}_lr", "0.03")
        for name, values in changed.items():
            if group_of(name, values.dim()) != group:
                assert torch.equal(values, plain[name]), (group, name)
            else:
                assert not torch.equal(plain[name], before[name]), (group, name)
                moved, moved_plain = values - before[name], plain[name] - before[name]
                torch.testing.assert_close(moved, 3 * moved_plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_undecayed_groups_have_no_weight_decay(tiny_run, optimizer):
    flags = ["--optimizer", optimizer, "--weight_decay"]
    _, plain = after_one_update(tiny_run, "sltrain", *flags, "0")
    _, decayed = after_one_update(tiny_run, "sltrain", *flags, "1")
    for flag, undecayed in (("decay_embedding", ("embedding", "head")), ("decay_norms", ("norm",))):
        _, values = after_one_update(tiny_run, "sltrain", *flags, "1", f"--{flag}", "false")
        for name, value in values.items():
            group = group_of(name, value.dim())
            expected = plain if group in undecayed else decayed
            assert torch.equal(value, expected[name]), (flag, name)
    assert not torch.equal(plain["lm_head.weight"], decayed["lm_head.weight"])


@pytest.mark.parametrize("optimizer", [name for name, optimizer in OPTIMIZERS.items() if optimizer.has_adam])
def test_beta2_and_eps_reach_adam(tiny_run, optimizer):
    """Also where Adam steps only what muon and spectron leave to it."""
    method = "sltrain" if OPTIMIZERS[optimizer].steps_pairs else "full"
    _, plain = after_one_update(tiny_run, method, "--optimizer", optimizer)
    # With a large eps the first step is smaller.
    before, damped = after_one_update(tiny_run, method, "--optimizer", optimizer, "--eps", "1")
    name = "model.embed_tokens.weight"
    assert (damped[name] - before[name]).norm() < 0.5 * (plain[name] - before[name]).norm()
    _, updates, _ = model_and_updates(tiny_run, method, "--optimizer", optimizer, "--beta2", "0.5")
    assert {group["betas"][1] for group in updates.optimizer.param_groups if "betas" in group} == {0.5}


@pytest.mark.parametrize("method", METHODS)
def test_start_scale_scales_the_weights_of_the_linears_and_nothing_else(tiny_run, method):
    plain, _, _ = model_and_updates(tiny_run, method)
    scaled, _, _ = model_and_updates(tiny_run, method, "--start_scale", "0.25")
    for (name, left), (_, right) in zip(plain.named_modules(), scaled.named_modules(), strict=True):
        if name.endswith("_proj"):
            inputs = torch.randn(3, left.in_features, generator=torch.Generator().manual_seed(0)).to(
                next(left.parameters()).dtype
            )
            torch.testing.assert_close(right(inputs), left(inputs) / 4, rtol=1e-5, atol=1e-6)
        elif not name.rpartition(".")[0].endswith("_proj"):
            for before, after in zip(left.parameters(recurse=False), right.parameters(recurse=False), strict=True):
                assert torch.equal(before, after), name


def test_rates_of_groups_are_logged_planned_and_restored(tiny_run, tmp_path, capsys):
    flags = [*flags_of("sltrain", tiny_run), "--embedding_lr", "0.02", "--sparse_lr", "0.001", "--save_every", "5"]
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "whole")]) == 0
    assert "peak lr of embedding 0.02, sparse 0.001" in capsys.readouterr().err
    rows = [row for row in read_metrics(tmp_path / "whole") if "lr" in row]
    for row in rows:
        assert row["lr/embedding"] == pytest.approx(2 * row["lr"])
        assert row["lr/sparse"] == pytest.approx(0.1 * row["lr"])
        assert row["lr/head"] == row["lr/matrix"] == row["lr/norm"] == row["lr"]
    assert rows[3]["lr"] > 0
    resumed = ["--continue_from", str(tmp_path / "whole" / "step_00000005"), "--embedding_lr", "0.04"]
    assert torchrun_main.main([*flags, *resumed, "--save_dir", str(tmp_path / "resumed")]) == 2
    flags += ["--allow_changes", "embedding_lr"]
    assert torchrun_main.main([*flags, *resumed, "--save_dir", str(tmp_path / "resumed")]) == 0
    after = [row for row in read_metrics(tmp_path / "resumed") if "lr" in row]
    assert [row["lr"] for row in after] == [row["lr"] for row in rows]
    ratios = [row["lr/embedding"] / row["lr"] for row in after if row["lr"]]
    assert ratios == pytest.approx([2] * (len(ratios) - len(rows) + 5) + [4] * (len(rows) - 5))


def test_a_tied_head_has_no_rate_of_its_own(tiny_run, tmp_path):
    config = json.loads(Path(tiny_run[1]).read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied.json").write_text(json.dumps(config))
    args = parse_args([*flags_of("full", ["--model_config", str(tmp_path / "tied.json"), *tiny_run[2:]]), "--head_lr", "0.1"])
    with pytest.raises(ConfigError, match=r"--head_lr 0\.1: .* ties .*--embedding_lr"):
        make_plan(args, World())
    args.head_lr, args.embedding_lr = None, 0.1
    plan = make_plan(args, World())
    assert "peak lr of embedding and output head (tied) 0.1" in format_plan(plan, args, "data", None)
    assert learning_rates(args, plan).row(1.0).keys() == {"lr", "lr/embedding", "lr/matrix", "lr/norm"}


def test_the_plan_says_what_weight_decay_applies_to(tiny_run):
    def text(*flags: str) -> str:
        args = parse_args([*flags_of("full", tiny_run), *flags])
        return format_plan(make_plan(args, World()), args, "data", None)

    assert "weight decay" not in text()
    assert "weight decay 0.1 on every parameter" in text("--weight_decay", "0.1")
    without = text("--weight_decay", "0.1", "--decay_norms", "false", "--decay_embedding", "false")
    assert "weight decay 0.1 except on embedding, output head, norms and biases" in without


def test_a_rate_that_has_no_effect_is_neither_planned_nor_logged(tiny_run):
    args = parse_args([*flags_of("full", tiny_run), "--sparse_lr", "0.1", "--head_lr", "0.2"])
    plan = make_plan(args, World())
    assert "peak lr of head 0.2\n" in format_plan(plan, args, "data", None)
    row = learning_rates(args, plan).row(args.lr)
    assert row == {
        "lr/embedding": args.lr,
        "lr/head": pytest.approx(0.2),
        "lr/matrix": args.lr,
        "lr/norm": args.lr,
        "lr": args.lr,
    }


def test_the_plan_says_when_all_moments_are_reset(tiny_run):
    def text(*flags: str) -> str:
        args = parse_args([*flags_of("full", tiny_run), *flags])
        return "\n".join([format_plan(make_plan(args, World()), args, "data", None), *notices(args)])

    assert "moments" not in text("--optimizer", "adamw")
    assert "all moments set to zero every 1,000 updates" in text("--optimizer", "stable_spam")
    assert "all moments set to zero every 3 updates" in text("--optimizer", "muon", "--reset_moments_every", "3")
    assert "--reset_moments_every 900 with --num_training_steps" in text("--reset_moments_every", "900")
    assert "all moments" not in text("--optimizer", "stable_spam", "--reset_moments_every", "0")
    assert "--reset_moments_every has no effect with --optimizer sgd" in text("--optimizer", "sgd", "--reset_moments_every", "3")
    assert "gradients of what Adam steps conditioned" in text("--optimizer", "muon", "--condition_gradients")
    ineffective = text("--optimizer", "stable_spam", "--condition_gradients")
    assert "--condition_gradients has no effect with --optimizer stable_spam: it conditions all gradients" in ineffective
    assert "gradients of what" not in ineffective
    assert "--beta1 has no effect with --optimizer muon: its momentum is --muon_momentum" in text(
        "--optimizer", "muon", "--beta1", "0.9"
    )


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ("--lr 0.004", "--lr 0.004: "),
        ("--lr 0.004 --matrix_lr 0.001", None),
        ("--lr 0.001 --matrix_lr 0.004", "--matrix_lr 0.004: "),
        ("--lr 0.004 --optimizer spectron", None),
    ],
)
def test_the_factors_rate_is_the_one_that_is_warned_about(tiny_run, flags, warned):
    args = parse_args([*flags_of("sltrain", tiny_run), "--rank", "8", "--lora_alpha", "8", *flags.split()])
    warnings = [line for line in make_plan(args, World()).warnings if "stalled" in line]
    assert len(warnings) == (warned is not None)
    assert all(warned in line for line in warnings)
