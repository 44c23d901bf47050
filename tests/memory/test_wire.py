"""Bytes and seconds of communication equal numbers calculated by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.model_config import ModelConfig, load_model_config
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.communication import (
    Link,
    backward_share,
    format_wire,
    full_rank,
    in_processes,
    scaling,
    stops_scaling_at,
    traffic,
    update_seconds,
    wire_figures,
    world_sizes,
)
from peft_pretraining.memory.setting import MemorySetting
from peft_pretraining.plan.plan import format_plan, make_plan

ROOT = Path(__file__).resolve().parents[2]
# Embedding and head 10 x 4, two layers: q, k, v, o 4 x 4, gate, up, down 6 x 4 and two norms, and a final norm.
EMBEDDING, LAYER, ROOT_ELEMENTS = 40, 4 * 16 + 3 * 24 + 2 * 4, 40 + 4
TOTAL = EMBEDDING + 2 * LAYER + ROOT_ELEMENTS


def small() -> ModelConfig:
    sizes = {"vocab_size": 10, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return replace(load_model_config(ROOT / "configs/llama_9m.json"), **sizes, **heads)


def setting(**changes) -> MemorySetting:
    base = {"optimizer": "adamw", "dtype": "float32", "batch_size": 2, "max_length": 50, "world_size": 2}
    return MemorySetting(small(), "full", 2, 0.1, **(base | changes))


def test_ddp_sends_the_bytes_of_a_ring_all_reduce():
    """Each process sends 2 (N - 1) / N of the gradients' bytes, for any gradient accumulation."""
    for accumulation in (1, 8):
        assert traffic(setting(gradient_accumulation=accumulation)).sent == 2 * (1 / 2) * 4 * TOTAL
    assert traffic(setting(world_size=4)).sent == 2 * (3 / 4) * 4 * TOTAL
    assert traffic(setting(dtype="bfloat16")).sent == 2 * (1 / 2) * 2 * TOTAL
    assert traffic(setting(dtype="bfloat16", reduce_dtype="float32")).sent == 2 * (1 / 2) * 4 * TOTAL
    assert traffic(setting(world_size=1)).sent == 0


def test_accumulation_in_moments_sums_the_gradients_of_every_micro_batch():
    """8 times the bytes of one reduction; in time, each backward pass of 8/3 s (as below) hides its own."""
    one, eight = (traffic(setting(accumulate="moments", gradient_accumulation=number)) for number in (1, 8))
    assert eight.sent == 8 * one.sent == 8 * 2 * (1 / 2) * 4 * TOTAL
    assert eight.sent_backward(last=False) == eight.sent_backward(last=True) == one.sent_backward(last=True) == one.sent
    sequential = Link(bytes_per_s=one.sent / 5, overlap=0)
    found = setting(accumulate="moments", gradient_accumulation=3)
    assert update_seconds(found, 25, sequential) == pytest.approx(3 * (4 + 5))
    assert update_seconds(found, 25, replace(sequential, overlap=1)) == pytest.approx(3 * (4 / 3 + 5))
    assert traffic(setting(accumulate="moments", gradient_accumulation=3, world_size=1)).sent == 0


def test_fsdp_gathers_for_every_pass_and_reduces_once():
    """10, 4 and 6 rows are divided evenly by two processes, so nothing is padded."""
    one = traffic(setting(parallel="fsdp"))
    assert (one.gathered_forward, one.gathered_backward) == (4 * TOTAL, 4 * (TOTAL - ROOT_ELEMENTS))
    assert one.reduce_scattered == 4 * TOTAL
    assert one.sent == (1 / 2) * 4 * (3 * TOTAL - ROOT_ELEMENTS)
    three = traffic(setting(parallel="fsdp", gradient_accumulation=3))
    assert three.sent == (1 / 2) * 4 * (3 * (2 * TOTAL - ROOT_ELEMENTS) + TOTAL)
    kept = traffic(setting(parallel="fsdp", reshard_after_forward=False))
    assert kept.sent == (1 / 2) * 4 * 2 * TOTAL
    mixed = traffic(setting(parallel="fsdp", compute_dtype="bfloat16", reduce_dtype="float32"))
    assert mixed.sent == (1 / 2) * (2 * (2 * TOTAL - ROOT_ELEMENTS) + 4 * TOTAL)


def test_rows_that_do_not_divide_evenly_are_padded():
    """With three processes 10 rows are padded to 12 and 4 to 6; 6 rows need no padding."""
    padded_layer = 4 * 6 * 4 + 2 * 6 * 4 + 6 * 6 + 2 * 6
    expected = 2 * 12 * 4 + 2 * padded_layer + 6
    assert traffic(setting(parallel="fsdp", world_size=3)).reduce_scattered == 4 * expected


@pytest.mark.parametrize(("size", "rank", "sparsity"), [("60m", 128, 0.03), ("350m", 256, 0.03), ("7b", 1024, 0.05)])
@pytest.mark.parametrize("world_size", [2, 256])
def test_sltrain_sends_in_proportion_to_its_parameters(size, rank, sparsity, world_size):
    model = load_model_config(ROOT / f"configs/llama_{size}.json")
    ours = MemorySetting(model, "sltrain", rank, sparsity, "adamw", "bfloat16", 1, 256, world_size=world_size)
    shares = {"60m": (43_529_832, 58_073_600), "350m": (194_293_544, 367_969_280), "7b": (3_144_735_808, 6_738_415_616)}
    counted, whole = shares[size]
    assert traffic(ours).sent / traffic(full_rank(ours)).sent == pytest.approx(counted / whole, rel=1e-12)


def test_factors_of_fewer_rows_than_processes_are_padded():
    """With rank 128 and 256 processes, FSDP2 pads A to 256 rows and exchanges twice as much."""
    model = load_model_config(ROOT / "configs/llama_60m.json")
    few, many = (
        MemorySetting(model, "lowrank", 128, 0.0, "adamw", "bfloat16", 1, 256, world_size=size, parallel="fsdp")
        for size in (128, 256)
    )
    rows_of_a = 128 * 8 * (6 * 512 + 1376)
    assert traffic(many).reduce_scattered - traffic(few).reduce_scattered >= 2 * rows_of_a


def test_seconds_of_an_update_equal_those_calculated_by_hand():
    """100 tokens at 25 per second: 4 s of arithmetic per micro-batch, of which forward takes 4/3 and backward 8/3."""
    ddp = setting(gradient_accumulation=3)
    for seconds, hidden in ((2.0, 12.0), (8 / 3, 12.0), (5.0, 12.0 + 5.0 - 8 / 3)):
        link = Link(bytes_per_s=4 * TOTAL / seconds)
        assert update_seconds(ddp, 25, link) == pytest.approx(hidden)
        assert update_seconds(ddp, 25, replace(link, overlap=0)) == pytest.approx(12 + seconds)
        assert update_seconds(ddp, 25, replace(link, overlap=0.5)) == pytest.approx((hidden + 12 + seconds) / 2)
    # FSDP: gathering all parameters takes 4 s. Forward takes 4 s, backward 4 s less the root's, and the last backward 4 s more.
    fsdp = setting(gradient_accumulation=2, parallel="fsdp")
    link, backward = Link(bytes_per_s=(1 / 2) * 4 * TOTAL / 4), 4 * (TOTAL - ROOT_ELEMENTS) / TOTAL
    assert backward > 8 / 3
    assert update_seconds(fsdp, 25, link) == pytest.approx(2 * 4 + backward + (backward + 4))


def test_the_backward_pass_takes_a_larger_share_with_checkpointing():
    assert backward_share(setting()) == pytest.approx(2 / 3)
    assert backward_share(setting(activation_checkpointing="layer")) == pytest.approx(3 / 4)


def test_more_processes_divide_the_same_update():
    start = setting(batch_size=8, gradient_accumulation=16, world_size=1)
    for world_size, batch_size, accumulation in ((1, 8, 16), (4, 8, 4), (16, 8, 1), (32, 4, 1), (128, 1, 1)):
        divided = in_processes(start, world_size)
        assert (divided.world_size, divided.batch_size, divided.gradient_accumulation) == (
            world_size,
            batch_size,
            accumulation,
        )
    assert list(world_sizes(start)) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert list(world_sizes(setting(batch_size=3, world_size=3))) == [1, 3]


def test_efficiency_falls_below_one_half_where_calculated():
    """DDP with 64 sequences of 50 tokens at 100 tokens per second: 32 / N s of arithmetic in each of N processes, and
    2 (N - 1) / N s on the link. Without overlap, communication takes longer than arithmetic from N = 32 on (1.94 s and 1 s); at
    N = 16 it takes 1.88 s and arithmetic 2 s."""
    start, link = setting(batch_size=1, gradient_accumulation=64, world_size=1), Link(bytes_per_s=4 * TOTAL, overlap=0)
    assert scaling(start, 1, 100, link).efficiency == 1
    at_16, at_32 = (scaling(start, size, 100, link) for size in (16, 32))
    assert at_16.seconds_per_update == pytest.approx(2 + 2 * 15 / 16)
    assert at_16.efficiency == pytest.approx(2 / (2 + 2 * 15 / 16))
    assert at_16.tokens_per_s == pytest.approx(3200 / (2 + 2 * 15 / 16))
    assert at_32.efficiency < 0.5 < at_16.efficiency
    assert stops_scaling_at(start, 100, link) == 32
    # With overlap, 1/3 s is hidden by the last micro-batch's backward pass: at 32 processes an update takes 1 + 1.94 - 1/3 s.
    assert scaling(start, 32, 100, replace(link, overlap=1)).seconds_per_update == pytest.approx(1 + 2 * 31 / 32 - 1 / 3)
    assert stops_scaling_at(start, 100, Link(bytes_per_s=4e6 * TOTAL)) is None


def test_the_plan_shows_the_communication_of_several_processes():
    flags = ["--model_config", str(ROOT / "configs/llama_60m.json"), "--batch_size", "1", "--dtype", "bfloat16"]
    flags += ["--peft_model", "sltrain", "--rank", "128", "--sp_ratio", "0.03", "--dataset", "demo"]
    texts = {}
    for world_size, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        args = parse_args([*flags, "--parallel", parallel])
        texts[world_size, parallel] = format_plan(make_plan(args, World(size=world_size)), args, "data", None)
    assert "wire" not in texts[1, "ddp"]
    # 43,529,832 and 58,073,600 parameters of 2 bytes, each sent 2 x 1/2 times.
    assert "0.087 GB sent per update and process by ddp (all-reduce 0.087), 75% of full-rank's 0.116" in texts[2, "ddp"]
    assert "by fsdp (all-gather 0.141 + reduce-scatter 0.087), " in texts[2, "fsdp"]


def test_communication_figures_include_seconds_and_scaling_if_known():
    assert "seconds" not in wire_figures(setting(), None, None)
    assert "overlapped" not in wire_figures(setting(), 10.0, None)
    found = wire_figures(setting(), 4 * TOTAL / 1e9, 25.0)
    assert found["seconds"] == pytest.approx(1.0)
    assert [row["world_size"] for row in found["overlapped"]["scaling"]] == [1, 2, 4]
    assert format_wire(wire_figures(setting(world_size=1), None, None)) == "none (a single process)"
