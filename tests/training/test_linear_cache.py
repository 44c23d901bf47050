"""Runs with --linear_cache: the same numbers, memory that the account counts, and what `auto` chooses."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from outcomes import assert_equal_runs
from tiny_runs import flags_of

import torchrun_main
from peft_pretraining.commands.estimate import estimate
from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.model_config import linear_shapes
from peft_pretraining.distributed.device import DeviceMemory
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.account import account
from peft_pretraining.methods import METHODS
from peft_pretraining.model.llama import build_model
from peft_pretraining.plan.advice import out_of_memory_problem
from peft_pretraining.plan.checks import check, notices
from peft_pretraining.plan.plan import format_plan, make_plan, setting_of
from peft_pretraining.record import mfu
from peft_pretraining.run import assemble
from sparse_lora.cache import WeightCache
from sparse_lora.uniform import UniformSupport

ROOT = Path(__file__).resolve().parents[2]
ON_60M = f"--model_config {ROOT}/configs/llama_60m.json --peft_model sltrain --rank 128 --sp_ratio 0.03 --dtype bfloat16".split()
ON_60M += ["--batch_size", "16", "--num_training_steps", "100", "--warmup_steps", "10", "--dataset", "demo"]


def train(folder: Path, flags: list[str]) -> Path:
    assert torchrun_main.main([*flags, "--save_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("sltrain", ["--batch_size", "2", "--total_batch_size", "8", "--restart_every", "3", "--rebalance"]),
        ("sltrain", ["--batch_size", "4", "--total_batch_size", "8", "--per_layer", "--activation_checkpointing", "layer"]),
        ("sltrain_scaled", ["--per_layer"]),
        ("sltrain_int8", ["--batch_size", "4", "--total_batch_size", "8"]),
        ("lowrank", ["--init", "svd"]),
    ],
)
def test_a_run_with_cached_weights_has_the_same_bits_and_resumes_without(tiny_run, tmp_path, method, flags):
    """W is built, as on a large model; a tiny one would choose the factored path."""
    flags = [*flags_of(method, tiny_run), *flags, "--linear_path", "materialised", "--eval_every", "4"]
    plain = train(tmp_path / "plain", [*flags, "--linear_cache", "none"])
    cached = train(tmp_path / "cached", [*flags, "--linear_cache", "weights", "--save_every", "4", "--keep_checkpoints", "9"])
    assert_equal_runs(plain, cached)
    resumed = [*flags, "--continue_from", str(cached / "step_00000004"), "--linear_cache", "positions"]
    assert_equal_runs(plain, train(tmp_path / "resumed", resumed))


def test_a_resumed_run_caches_the_positions_of_its_checkpoint(tiny_run, tmp_path, monkeypatch):
    """The model of the resumed run is built with other positions, as that of an imported checkpoint is."""
    flags = [*flags_of("sltrain", tiny_run), "--linear_cache", "positions", "--save_every", "4", "--keep_checkpoints", "9"]
    whole = train(tmp_path / "whole", flags)
    draw = UniformSupport.draw_
    monkeypatch.setattr(UniformSupport, "draw_", lambda support, generator: draw(support, torch.Generator().manual_seed(5)))
    resumed = train(tmp_path / "resumed", [*flags, "--continue_from", str(whole / "step_00000004")])
    assert_equal_runs(whole, resumed)


@pytest.mark.parametrize("kept", ["positions", "weights"])
def test_the_account_counts_what_is_cached(tiny_run, tmp_path, monkeypatch, kept):
    """After the last update positions are still there; weights are gone between updates."""
    runs, held = [], []
    original, filled = assemble.next_micro_batches, WeightCache.filled

    def next_micro_batches(run, world):
        runs.append(run)
        return original(run, world)

    monkeypatch.setattr(assemble, "next_micro_batches", next_micro_batches)
    monkeypatch.setattr(WeightCache, "filled", lambda cache: held.append(cache) or filled(cache))
    train(tmp_path / "run", [*flags_of("sltrain", tiny_run), "--linear_path", "materialised", "--linear_cache", kept])
    model, plan = runs[-1].parts.model, runs[-1].plan
    decoded = sum(module.decoded.nbytes for module in model.modules() if isinstance(module, UniformSupport))
    weights = {id(layer): 4 * layer.in_features * layer.out_features for cache in held for layer in cache.layers}
    assert plan.bytes["cache"] == decoded + sum(weights.values())
    assert (len(held), len(weights)) == ((8, 14) if kept == "weights" else (0, 0))
    assert all(layer.cached_weight is None for cache in held for layer in cache.layers)


def plan_of(*flags: str, memory: float | None = None, device_type: str = "cuda"):
    args = parse_args([*ON_60M, *flags])
    device = None if memory is None else DeviceMemory("the device", int(memory), device_type)
    return args, make_plan(args, World(), device_type=device_type, memory=device)


def test_auto_keeps_positions_on_a_gpu_with_room_and_never_weights():
    _, unknown = plan_of()
    peak = unknown.bytes["peak"]
    assert (unknown.linear_cache, unknown.bytes["cache"]) == ("none", 0)
    _, roomy = plan_of(memory=2 * peak)
    args, positions = plan_of("--linear_cache", "positions")
    assert (roomy.linear_cache, roomy.bytes) == ("positions", positions.bytes)
    assert account(setting_of(roomy, args, "cuda")) == roomy.bytes
    shapes = linear_shapes(roomy.model) * 8
    assert roomy.bytes["cache"] == 4 * sum(int(0.03 * rows * columns) for rows, columns in shapes)
    for memory, device_type, flags in (
        (1.2 * peak, "cuda", ()),
        (9 * peak, "cpu", ()),
        (9 * peak, "cuda", ("--support", "block")),
    ):
        assert plan_of("--sp_ratio", "0.03125", *flags, memory=memory, device_type=device_type)[1].linear_cache == "none"
    assert plan_of("--linear_cache", "none", memory=9 * peak)[1].linear_cache == "none"


def test_cached_weights_cost_the_dense_weights_and_save_the_decoding():
    args, plan = plan_of("--linear_cache", "weights", "--linear_path", "materialised")
    positions = plan_of("--linear_cache", "positions")[1].bytes["cache"]
    assert plan.bytes["cache"] == positions + 2 * 8 * sum(rows * columns for rows, columns in linear_shapes(plan.model))
    setting = setting_of(plan, args, "cuda")
    factored = account(replace(setting, linear_path="factored"))
    assert factored["cache"] == positions
    without = account(replace(setting, linear_cache="none"))
    assert without["scratch"] > plan.bytes["scratch"]


def test_sharded_factors_are_not_cached_as_weights():
    with pytest.raises(ConfigError, match="--linear_cache weights: between layers a process has only a part"):
        check(parse_args([*ON_60M, "--parallel", "fsdp", "--linear_cache", "weights"]), World(size=2))


def test_what_is_cached_is_a_line_of_the_plan():
    for flags, memory, line in (
        (("--linear_cache", "weights"), None, "decoded positions and, during an update, their weights (--linear_cache weights)"),
        ((), 80e9, "decoded positions (--linear_cache auto)"),
        (("--peft_model", "full", "--linear_cache", "weights"), None, None),
        (("--linear_cache", "positions", "--support", "block", "--sp_ratio", "0.03125"), None, None),
    ):
        args, plan = plan_of(*flags, memory=memory)
        lines = [text for text in format_plan(plan, args, "words", None).splitlines() if text.startswith("linears")]
        assert lines == ([f"linears     keep {line}"] if line else [])


def test_a_cache_that_keeps_nothing_is_a_warning():
    """Without a sparse part all linears of this size are factored."""
    _, plan = plan_of("--peft_model", "lowrank", "--linear_cache", "weights")
    assert plan.linear_cache == "none"
    assert [text for text in plan.warnings if text.startswith("--linear_cache weights: with 4,096 rows")]
    _, plan = plan_of("--peft_model", "lowrank", "--linear_cache", "positions")
    assert plan.linear_cache == "none"
    assert [text for text in plan.warnings if text.startswith("--linear_cache positions: without a sparse part")]


def test_running_out_of_memory_advises_to_drop_what_auto_keeps():
    args, plan = plan_of(memory=80e9)
    assert plan.linear_cache == "positions"
    assert "--linear_cache none" in out_of_memory_problem(plan, args, "cuda", "full")


def test_estimate_and_the_dry_run_agree_on_what_auto_keeps():
    args = parse_args([*ON_60M, "--memory", "80GB"])
    figures = estimate(args, "cuda", 1)
    assert figures["bytes"] == plan_of(memory=80e9)[1].bytes
    assert figures["bytes"]["cache"] > 0


def test_cached_weights_count_fewer_operations():
    """W is built once for the 4 micro-batches of an update instead of 8 times: 1.75 products of B and A less per micro-batch."""
    own = {}
    for kept in ("none", "weights"):
        flags = ("--linear_path", "materialised", "--total_batch_size", "64", "--peak_tflops", "1", "--linear_cache", kept)
        args, plan = plan_of(*flags)
        model = build_model(
            plan.model, dtype=torch.bfloat16, device="meta", seed=1, reparameterize=partial(METHODS["sltrain"].apply, args=args)
        )
        own[kept], _ = mfu.flop_rates(args, plan, World(), model, torch.device("meta"))["flops_per_second"]
    products = 8 * sum(128 * rows * columns for rows, columns in linear_shapes(plan.model))
    assert own["none"] - own["weights"] == pytest.approx(2 * 1.75 * products / 16, rel=1e-9)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--linear_cache positions --support block --sp_ratio 0.03125", "without a uniform support"),
        ("--linear_cache weights --linear_path factored", "which builds no weights"),
        ("--linear_cache weights", None),
        ("--linear_cache positions", None),
    ],
)
def test_a_cache_of_nothing_is_a_notice(flags, reason):
    lines = [line for line in notices(parse_args([*ON_60M, *flags.split()])) if "--linear_cache" in line]
    assert ([reason in line for line in lines] == [True]) if reason else lines == []
