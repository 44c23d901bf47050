"""The account follows how an update goes: what is alive together, what stays, and what would make it fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from peft_pretraining.account import CLASSES, Setting, account
from peft_pretraining.config import parse_args
from peft_pretraining.distributed import DeviceMemory, World
from peft_pretraining.model_config import load_model_config
from peft_pretraining.plan import format_plan, make_plan, memory_problems
from peft_pretraining.savings import fitting_flags, savings

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def setting(size: str = "7b", **changes) -> Setting:
    model = load_model_config(str(ROOT / f"configs/llama_{size}.json"))
    base = Setting(model, "sltrain", 1024, 0.05, "adam8bit", "bfloat16", 1, 256, embedding_bits=8)
    return replace(base, **changes)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "adafactor", "adam8bit", "adamw4bit"])
@pytest.mark.parametrize("method", ["full", "lowrank", "sltrain"])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_combination_has_an_account(optimizer, method, per_layer, accumulation):
    found = account(
        setting("60m", optimizer=optimizer, peft_model=method, per_layer=per_layer, gradient_accumulation=accumulation)
    )
    assert all(found[name] >= 0 for name in CLASSES)
    assert found["total"] == sum(found[name] for name in CLASSES)
    static = sum(found[name] for name in ("parameters", "support", "optimizer", "runtime"))
    assert static < found["peak"] <= found["total"]


def test_per_layer_frees_gradients_unless_micro_batches_add_up():
    """With accumulation they stay; the largest single gradient is what is left otherwise."""
    whole, layered = account(setting()), account(setting(per_layer=True))
    accumulating = account(setting(per_layer=True, gradient_accumulation=2))
    assert accumulating["gradients"] == whole["gradients"] == whole["parameters"]
    assert layered["gradients"] == 32_000 * 4096 * 2  # the embedding's


def test_embeddings_with_32_bit_moments_cost_what_is_said():
    """1.57e9 bytes at 7B: 262M elements, 8 bytes instead of 2 and a share of a scale."""
    cost = account(setting(embedding_bits=32))["optimizer"] - account(setting())["optimizer"]
    assert cost == pytest.approx(262_144_000 * (8 - 2 - 8 / 256), rel=1e-6)


def test_a_save_in_the_background_costs_a_copy_of_the_state():
    """On a GPU the copy lies in the machine's memory."""
    for device_type, copies in (("cpu", 1), ("cuda", 0)):
        plain, copying = (account(setting("60m", device_type=device_type, async_save=on)) for on in (False, True))
        state = sum(plain[name] for name in ("parameters", "support", "optimizer"))
        for name in ("scratch", "peak", "total"):
            assert copying[name] - plain[name] == copies * state
    assert "--async_save false" in {saving.text for saving in savings(setting("60m", async_save=True))}


def test_savings_lower_the_peak_and_come_in_their_order():
    here = setting("1b", rank=512, sp_ratio=0.03, optimizer="adamw", embedding_bits=None, batch_size=16)
    found = savings(here)
    peaks = [saving.peak for saving in found]
    assert peaks == sorted(peaks)
    assert all(saving.peak == account(saving.setting)["peak"] < account(here)["peak"] for saving in found)
    assert {"--activation_checkpointing", "--batch_size 8", "--optimizer adam8bit"} <= {s.text for s in found}


@pytest.mark.parametrize("gib", [28, 20, 16])
def test_fitting_flags_make_it_fit(gib):
    """Applied as they are printed, to the command line itself."""
    flags = ["--model_config", str(ROOT / "configs/llama_7b.json"), "--batch_size", "8", "--dtype", "bfloat16"]
    flags += ["--peft_model", "sltrain", "--rank", "1024", "--sp_ratio", "0.05", "--optimizer", "adamw"]
    start = make_plan(parse_args(flags), World())
    assert start.bytes["peak"] > gib * GIB
    found = fitting_flags(
        setting(optimizer="adamw", embedding_bits=None, batch_size=8, per_layer=False), limit=gib * GIB
    )
    printed = [word for saving in found for word in saving.text.split()] + ["--total_batch_size", "8"]
    assert make_plan(parse_args([*flags, *printed]), World()).bytes["peak"] <= gib * GIB


def test_what_does_not_fit_is_refused_with_the_way_out():
    flags = ["--model_config", str(ROOT / "configs/llama_7b.json"), "--batch_size", "1", "--optimizer", "adamw"]
    args = parse_args([*flags, "--dtype", "bfloat16"])
    plan, device = make_plan(args, World()), DeviceMemory("this machine's memory", 24 * GIB, "cpu")
    (problem, single) = memory_problems(plan, args, device)
    assert "would fit with" in problem
    assert "--per_layer" in problem
    assert "--optimizer adam8bit" in single
    assert "does NOT fit" in format_plan(plan, args, "data", device)
    assert memory_problems(plan, args, DeviceMemory("a large one", 100 * GIB, "cpu")) == []
