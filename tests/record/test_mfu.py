"""The operations of training as the record counts them, beside torch's own count; and the devices' peaks."""

import json
import math
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_runs import flags_of
from torch.utils.flop_counter import FlopCounterMode

import torchrun_main
from peft_pretraining.__main__ import main as command
from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.model_config import ModelConfig, load_model_config
from peft_pretraining.distributed.world import World
from peft_pretraining.methods import METHODS
from peft_pretraining.model.llama import build_model
from peft_pretraining.model.loss import TokenLoss
from peft_pretraining.plan.plan import make_plan
from peft_pretraining.record import mfu
from peft_pretraining.record.mfu import CARDS, card_peak, training_flops
from peft_pretraining.record.recorder import Throughput

ROOT = Path(__file__).resolve().parents[2]
BATCH, LENGTH, TARGETS = 3, 16, 45


def of_product(added_to, left, right, **_) -> int:
    """The operations of a product that is added to its first argument; of shapes."""
    return 2 * math.prod(left) * right[-1]


# Operators that torch's counter lacks.
IN_PLACE = {torch.ops.aten.addmm_: of_product, torch.ops.aten.baddbmm_: of_product}


def tiny() -> ModelConfig:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return replace(load_model_config(ROOT / "configs" / "llama_9m.json"), vocab_size=331, num_key_value_heads=2, **small)


def counted_by_torch(model) -> int:
    """The operations of the matrix products of a forward and a backward pass, without attention's."""
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) + 2
    loss = TokenLoss(model)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        loss(ids, ids, TARGETS).backward()
    return sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("full", []),
        ("relora", ["--relora", "2"]),
        ("lowrank", ["--linear_path", "factored"]),
        ("lowrank", ["--linear_path", "materialised"]),
        *[
            ("sltrain", ["--support", support, "--sp_ratio", "0.25", "--linear_path", path])
            for support in ("uniform", "block")
            for path in ("auto", "factored", "materialised")
        ],
    ],
)
def test_the_models_own_operations_are_those_that_torch_counts(method, flags):
    argv = ["--model_config", "configs/llama_9m.json", "--batch_size", str(BATCH), "--peft_model", method, "--rank", "4", *flags]
    args = parse_args(argv)
    model = build_model(
        tiny(), dtype=torch.float32, device="cpu", seed=3, reparameterize=lambda model: METHODS[method].apply(model, args)
    )
    own, dense = training_flops(model, BATCH, LENGTH)
    # Per layer two products of T^2 / 2 x width, two operations each, and twice as many in backward.
    attention = 2 * 3 * 2 * 2 * LENGTH**2 / 2 * 32
    # Older versions of transformers compute the rotary angles, of half a head's width, by a matrix product.
    angles = 2 * LENGTH * 8 // 2
    assert counted_by_torch(model) - (BATCH * (own[0] - attention) + TARGETS * own[1]) in (0, angles)
    # q and o, k and v (half as wide), gate, up and down; the head.
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert dense == (6 * LENGTH * weights + attention, 6 * 331 * 32)
    assert own == dense or method != "full"


def test_the_path_is_that_of_the_products_dtype_where_parameters_have_another():
    """--parallel fsdp --compute_dtype bfloat16: 768 x 768 weights in blocks are built in bfloat16, and factored in float32."""
    argv = ["--model_config", "configs/llama_130m.json", "--batch_size", "16", "--peft_model", "sltrain", "--rank", "256"]
    args = parse_args([*argv, "--support", "block", "--sp_ratio", "0.03125"])
    change = partial(METHODS["sltrain"].apply, args=args)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(
            load_model_config(ROOT / "configs" / "llama_130m.json"), dtype=dtype, device="meta", seed=3, reparameterize=change
        )
        found[dtype] = [
            training_flops(model, 16, 256, dtype=products)[0][0] for products in (None, torch.float32, torch.bfloat16)
        ]
    of_float32, of_bfloat16 = found[torch.float32][0], found[torch.bfloat16][0]
    assert of_float32 < of_bfloat16
    assert list(found.values()) == [[of_float32, of_float32, of_bfloat16], [of_bfloat16, of_float32, of_bfloat16]]


def test_rates_are_operations_per_sequence_and_token_times_their_number_per_second(monkeypatch):
    monkeypatch.setattr("time.perf_counter", iter([100.0]).__next__)
    throughput = Throughput(8, 2, {"flops_per_second": (1000.0, 10.0), "mfu": (0.1, 0.001)})
    rates = throughput.rates(200, 1, done_at=104.0)
    assert rates["flops_per_second"] == pytest.approx((8 * 1000 + 200 * 10) / 4)
    assert rates["mfu"] == pytest.approx((8 * 0.1 + 200 * 0.001) / 4)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32", "tf32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5, 156),
        ("NVIDIA A100 80GB PCIe", 312, 19.5, 156),
        ("NVIDIA H100 80GB HBM3", 989.5, 67, 494.5),
        ("NVIDIA H100 PCIe", 756, 51, 378),
        ("NVIDIA H100 NVL", 835.5, 60, 417.5),
        ("NVIDIA H200", 989.5, 67, 494.5),
        ("NVIDIA H200 NVL", 835.5, 60, 417.5),
        ("NVIDIA B200", 2250, 75, 1125),
        ("NVIDIA L4", 121, 30.3, 60),
        ("NVIDIA L40S", 362, 91.6, 183),
        ("NVIDIA L40", 181, 90.5, 90.5),
        ("NVIDIA A10", 125, 31.2, 62.5),
        ("NVIDIA A10G", 70, 35, 35),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("Tesla T4", None, 8.1, 8.1),
        ("Tesla V100-SXM2-16GB", None, 15.7, 15.7),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None, None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None, None),
        ("NVIDIA GeForce GTX 1080 Ti", None, None, None),
    ],
)
def test_a_cards_peak_is_found_by_the_name_that_cuda_gives_it(name, bf16, fp32, tf32):
    cases = [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)]
    found = [card_peak(name, dtype, tf32) for dtype, tf32 in cases]
    assert found == [None if peak is None else pytest.approx(1e12 * peak) for peak in (bf16, fp32, tf32)]


def test_every_cards_peaks_grow_with_fewer_bits():
    for pattern, fp32, tf32, bf16 in CARDS:
        assert fp32 <= (tf32 or fp32) < (bf16 or 10 * fp32), pattern


def flops_of(monkeypatch, *flags: str, world: World | None = None, peak: float | None = None) -> dict:
    argv = ["--model_config", "configs/llama_9m.json", "--batch_size", "2", "--dtype", "float32", *flags]
    args: Arguments = parse_args(argv)
    monkeypatch.setattr(mfu, "device_peak", lambda device, dtype: peak)
    monkeypatch.setattr(mfu, "training_flops", lambda *_: ((60.0, 6.0), (120.0, 12.0)))
    world = world or World()
    return mfu.flop_rates(args, make_plan(args, World(size=world.size)), world, None, torch.device("cpu"))


def test_mfu_divides_by_the_peak_of_all_devices_which_the_user_may_give(monkeypatch):
    two = World(size=2)
    assert flops_of(monkeypatch, world=two, peak=3.0) == {
        "flops_per_second": (60.0, 6.0),
        "flops_per_second_dense": (120.0, 12.0),
        "mfu": (10.0, 1.0),
        "mfu_dense": (20.0, 2.0),
    }
    assert flops_of(monkeypatch, "--peak_tflops", "2", peak=3.0)["mfu"] == (30e-12, 3e-12)
    assert flops_of(monkeypatch, world=World(rank=1, size=2), peak=3.0) == {}


def test_an_unknown_device_costs_one_notice_and_the_shares(monkeypatch, capsys):
    assert flops_of(monkeypatch, peak=None).keys() == {"flops_per_second", "flops_per_second_dense"}
    said = capsys.readouterr().err
    assert said.count("notice:") == 1
    assert "the peak of cpu in float32 is not known" in said
    assert "--peak_tflops" in said


def test_a_run_records_its_rates_and_the_report_their_medians(tmp_path, tiny_run, capsys):
    flags = [*flags_of("sltrain", tiny_run), "--peak_tflops", "0.001", "--save_dir", str(tmp_path / "run")]
    assert torchrun_main.main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert all(row["mfu"] == pytest.approx(row["flops_per_second"] / 1e9) for row in rows)
    assert all(row["mfu_dense"] == pytest.approx(row["flops_per_second_dense"] / 1e9) for row in rows)
    own = statistics.median(row["flops_per_second"] for row in rows)
    shares = [statistics.median(row[name] for row in rows) for name in ("mfu", "mfu_dense")]
    capsys.readouterr()
    assert command(["report", str(tmp_path / "run")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("operations per second"))
    assert f" {own / 1e9:,.1f} / " in line
    assert line.endswith(f"MFU {shares[0]:.1%} / {shares[1]:.1%}")
    assert command(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0
    assert f"{100 * shares[0]:.1f} / {100 * shares[1]:.1f}" in (tmp_path / "report" / "report.html").read_text()


def test_the_measured_peak_leaves_the_generator_and_is_measured_once():
    mfu._measured_peak.cache_clear()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = mfu.device_peak(torch.device("cpu"), torch.float32)
    assert first is not None
    assert first > 0
    assert mfu.device_peak(torch.device("cpu"), torch.float32) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert mfu._measured_peak.cache_info().misses == 1
