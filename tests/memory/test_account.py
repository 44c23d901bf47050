"""The memory account: its classes and peak for all settings, and the flags that lower the peak."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.memory.account import CLASSES, _linear_scratch, account
from peft_pretraining.memory.counts import parameter_counts
from peft_pretraining.memory.setting import MemorySetting
from sparse_lora import kernels

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def setting(size: str = "7b", **changes) -> MemorySetting:
    model = load_model_config(str(ROOT / f"configs/llama_{size}.json"))
    base = MemorySetting(model, "sltrain", 1024, 0.05, "adam8bit", "bfloat16", 1, 256, embedding_bits=8)
    return replace(base, **changes)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "adafactor", "adam8bit", "adamw4bit"])
@pytest.mark.parametrize("method", ["full", "lowrank", "relora", "sltrain", "galore"])
def test_every_combination_has_an_account(optimizer, method):
    for per_layer, accumulation in itertools.product((False, True), (1, 4)):
        here = setting("60m", optimizer=optimizer, peft_model=method, per_layer=per_layer, gradient_accumulation=accumulation)
        sizes = account(here)
        assert all(sizes[name] >= 0 for name in CLASSES), here
        assert sizes["total"] == sum(sizes[name] for name in CLASSES), here
        static = sum(sizes[name] for name in ("parameters", "support", "optimizer", "runtime"))
        assert static < sizes["peak"] <= sizes["total"], here


def test_per_layer_frees_gradients_unless_they_accumulate():
    """With accumulation all gradients stay; otherwise only the largest single one counts."""
    whole, layered = account(setting()), account(setting(per_layer=True))
    accumulating = account(setting(per_layer=True, gradient_accumulation=2))
    assert accumulating["gradients"] == whole["gradients"] == whole["parameters"]
    assert layered["gradients"] == 32_000 * 4096 * 2  # the embedding's


def test_embeddings_with_32_bit_moments_cost_the_documented_bytes():
    """1.57e9 bytes at 7B: 262M elements with 8 bytes instead of 2 plus a scale per block."""
    cost = account(setting(embedding_bits=32))["optimizer"] - account(setting())["optimizer"]
    assert cost == pytest.approx(262_144_000 * (8 - 2 - 8 / 256), rel=1e-6)


def test_kernels_of_a_gpu_need_a_table_of_block_starts(monkeypatch):
    """Four bytes per 32 entries of the weight, in bfloat16 and for a uniform support, if the kernels may be used."""

    def more_than_on_a_cpu(**changes) -> int:
        on_gpu, on_cpu = (
            _linear_scratch(setting("60m", device_type=device_type, **changes), (1376, 512)) for device_type in ("cuda", "cpu")
        )
        return on_gpu - on_cpu

    asked = {"linear_path": "materialised", "kernels": "triton"}
    assert more_than_on_a_cpu(dtype="bfloat16", **asked) == 4 * (1376 * 512 // 32 + 1)
    assert more_than_on_a_cpu(dtype="float32", **asked) == 0
    monkeypatch.setattr(kernels, "RELATIVE_TIMES", {})
    assert more_than_on_a_cpu(dtype="bfloat16", **asked | {"kernels": "auto"}) == 0
    monkeypatch.setitem(kernels.RELATIVE_TIMES, "9.0", 0.9)
    assert more_than_on_a_cpu(dtype="bfloat16", **asked | {"kernels": "auto"}) > 0
    assert more_than_on_a_cpu(dtype="bfloat16", **asked | {"kernels": "torch"}) == 0
    assert more_than_on_a_cpu(support="block", linear_path="factored") == 0


@pytest.mark.parametrize(
    "optimizer", ["adamw", "stable_spam", "muon", "muon8bit", "muon4bit", "spectron", "spectron8bit", "spectron4bit"]
)
def test_stochastic_rounding_costs_its_temporaries_with_every_optimizer(optimizer):
    """Random bits and a float32 copy of a slice of 2M elements: the embedding has more elements than that."""
    plain = account(setting("60m", rank=128, optimizer=optimizer, embedding_bits=None))
    rounding = account(setting("60m", rank=128, optimizer=optimizer, embedding_bits=None, stochastic_rounding=True))
    assert rounding["scratch"] >= 36 * 2**21
    assert rounding["scratch"] >= plain["scratch"]


@pytest.mark.parametrize("optimizer", ["muon", "spectron8bit"])
def test_conditioning_costs_three_numbers_per_tensor_and_whole_gradients(optimizer):
    """Of all tensors but the 7 x 8 pairs of factors at 60m: embedding, head, 17 norms and 56 sparse parts."""

    def accounts(**changes) -> tuple[dict[str, int], dict[str, int]]:
        here = setting("60m", rank=128, optimizer=optimizer, embedding_bits=None, **changes)
        return account(here), account(replace(here, condition_gradients=True))

    for device_type in ("cpu", "cuda"):
        plain, conditioned = accounts(device_type=device_type)
        assert conditioned["optimizer"] - plain["optimizer"] == 12 * (2 + 17 + 56)
        assert conditioned["scratch"] >= max(9 * 2**21, plain["scratch"])
    slices = {"per_layer": True, "head_gradient": "slices", "stochastic_rounding": True}
    plain, conditioned = accounts(**slices)
    assert conditioned["gradients"] == 2 * 32_000 * 512
    assert plain["gradients"] < conditioned["gradients"]


def test_a_save_in_the_background_costs_a_copy_of_the_state():
    """On a GPU the copy is in host memory."""
    for device_type, copies in (("cpu", 1), ("cuda", 0)):
        plain, copying = (account(setting("60m", device_type=device_type, async_save=on)) for on in (False, True))
        state = sum(plain[name] for name in ("parameters", "support", "optimizer"))
        for name in ("scratch", "peak", "total"):
            assert copying[name] - plain[name] == copies * state


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "adam8bit", "adamw4bit"])
@pytest.mark.parametrize("method", ["full", "lowrank", "relora", "sltrain"])
def test_every_combination_of_sharded_runs_has_an_account(optimizer, method):
    """The peak lies between the permanent classes and the sum of all classes, and falls with the number of processes."""
    for per_layer, accumulation, device_type in itertools.product((False, True), (1, 4), ("cpu", "cuda")):
        here = setting("350m", peft_model=method, optimizer=optimizer, per_layer=per_layer, device_type=device_type)
        here = replace(here, gradient_accumulation=accumulation, parallel="fsdp")
        peaks = []
        for world_size, changes in itertools.product(
            (2, 3, 8), ({}, {"reshard_after_forward": False}, {"dtype": "float32", "compute_dtype": "bfloat16"})
        ):
            sizes = account(replace(here, world_size=world_size, **changes))
            assert sizes["total"] == sum(sizes[name] for name in CLASSES), here
            static = sum(sizes[name] for name in ("parameters", "support", "optimizer", "runtime"))
            assert static < sizes["peak"] <= sizes["total"], here
            peaks += [sizes["peak"]] if not changes else []
        assert peaks == sorted(peaks, reverse=True), here
        assert peaks[0] > peaks[-1], here


def test_galores_account_at_7b_equals_its_tensors():
    """Calculated by hand: moments (k x longer side) and projections (k x shorter side) of 224 matrices; other tensors in full."""
    found = account(setting(peft_model="galore", optimizer="adamw", embedding_bits=None))
    hidden, mlp, rank, layers = 4096, 11008, 1024, 32
    base = 2 * 32_000 * hidden + (2 * layers + 1) * hidden
    moments = layers * rank * (4 * hidden + 3 * mlp)
    tensors = 2 + 2 * layers + 1 + 7 * layers
    assert found["parameters"] == found["gradients"] == 2 * 6_738_415_616
    assert found["optimizer"] == 2 * (2 * (base + moments) + layers * rank * 7 * hidden) + 4 * tensors
    assert found["scratch"] >= 4 * 3 * hidden * mlp  # an SVD: at least a copy and two results


def test_one_process_shards_nothing():
    for changes in ({}, {"compute_dtype": "bfloat16", "dtype": "float32"}):
        alone = setting("60m", **changes)
        assert account(replace(alone, parallel="fsdp")) == account(alone)


def test_sharding_divides_parameters_gradients_and_moments_only():
    """Parameters, gradients and moments are divided among the processes; supports, activations and the loss are not."""
    one, eight = (account(setting("350m", parallel="fsdp", world_size=size, embedding_bits=8)) for size in (1, 8))
    for name in ("parameters", "gradients", "optimizer"):
        assert eight[name] == pytest.approx(one[name] / 8, rel=0.01)
    for name in ("support", "activations", "loss"):
        assert eight[name] == one[name]


def test_accumulated_gradients_are_unsharded():
    """They have the reduce dtype; without accumulation a process has its shard in the parameters' dtype."""
    sharded = setting("60m", peft_model="full", parallel="fsdp", world_size=4, dtype="float32", compute_dtype="bfloat16")
    accumulating = replace(sharded, gradient_accumulation=2)
    assert account(sharded)["gradients"] == 4 * 58_073_600 / 4
    assert account(accumulating)["gradients"] == 2 * 58_073_600
    assert account(replace(accumulating, reduce_dtype="float32"))["gradients"] == 4 * 58_073_600


def test_layers_that_stay_gathered_cost_the_whole_model():
    sharded = setting("350m", peft_model="full", parallel="fsdp", world_size=8)
    freed, kept = (account(replace(sharded, reshard_after_forward=value)) for value in (True, False))
    assert kept["scratch"] >= 2 * 367_969_280 > 2 * freed["scratch"]


def test_summing_in_another_dtype_takes_one_more_bucket():
    """A bucket of DDP has 25 MiB or one larger tensor; per-layer updates convert one tensor at a time."""
    here = setting("350m", peft_model="full", world_size=2, optimizer="adamw", embedding_bits=None)
    for per_layer in (False, True):
        plain, wide = (account(replace(here, per_layer=per_layer, reduce_dtype=name)) for name in (None, "float32"))
        assert wide["scratch"] - plain["scratch"] == 4 * 32_000 * 1024
    small = setting("9m", peft_model="full", world_size=2, optimizer="adamw", embedding_bits=None)
    plain, wide = (account(replace(small, reduce_dtype=name)) for name in (None, "float32"))
    counted = parameter_counts(small.model, method="full", rank=1, sparsity=0.0)
    assert wide["scratch"] - plain["scratch"] == 4 * counted.total < 4 * 25 * 2**20 // 2  # all gradients are in one bucket
    assert account(replace(here, world_size=1, reduce_dtype="float32")) == account(replace(here, world_size=1))


def test_reloras_account_at_7b_equals_its_tensors():
    """Gradients and moments are those of trained parameters; frozen ones count as parameters and when gathered."""
    trained, frozen = 2_820_935_680, 6_476_005_376
    found = account(setting(peft_model="relora", optimizer="adamw", embedding_bits=None))
    assert found["parameters"] == 2 * (trained + frozen)
    assert found["gradients"] == 2 * trained
    tensors = 2 + 2 * 32 + 1 + 2 * 7 * 32
    assert found["optimizer"] == 2 * 2 * trained + 4 * tensors
    assert found["support"] == 0
    sharded = account(setting(peft_model="relora", optimizer="adamw", parallel="fsdp", world_size=8))
    assert sharded["parameters"] == pytest.approx(found["parameters"] / 8, rel=1e-3)
    assert sharded["gradients"] == pytest.approx(found["gradients"] / 8, rel=1e-3)


def test_the_peak_includes_the_memory_of_a_restart():
    """If an update takes little else: balancing factors in float32, and before the start a decomposition in float64."""
    small = setting("60m", rank=512, optimizer="sgd", batch_size=1, max_length=2, per_layer=True, support="block")
    plain = account(small)["peak"]
    factors = 512 * (1376 + 512)
    assert account(replace(small, rebalance=True))["peak"] >= plain + 4 * (2 * factors - 32_000 * 512)
    assert account(replace(small, init="svd"))["peak"] >= plain + 8 * 1376 * 512 - 4 * 32_000 * 512
    for other in (replace(small, peft_model="full"), replace(small, device_type="cuda")):
        assert account(replace(other, init="svd")) == account(other)


def test_fragmentation_by_small_activations_is_counted():
    """This concerns activations below 4 MiB on a CPU; 2,048 rows of 1,024 bfloat16 numbers are 4 MiB."""
    small, large = (setting("350m", batch_size=size) for size in (7, 8))
    beside = account(large)["runtime"]
    assert account(small)["runtime"] - beside == int(0.3 * account(small)["activations"]) > 0
    assert account(replace(small, dtype="float32"))["runtime"] == beside
    assert account(replace(small, parallel="fsdp", world_size=2))["runtime"] == beside
    on_gpu = [account(replace(each, device_type="cuda"))["runtime"] for each in (small, large)]
    assert on_gpu[0] == on_gpu[1]


def test_nccls_buffers_are_counted_for_several_processes_on_gpus():
    alone = setting("60m", device_type="cuda")
    assert account(replace(alone, world_size=2))["runtime"] - account(alone)["runtime"] == 256 * 2**20
    on_cpu = replace(alone, device_type="cpu")
    assert account(replace(on_cpu, world_size=2))["runtime"] == account(on_cpu)["runtime"]


@pytest.mark.parametrize("accumulation", [1, 512])
def test_7b_fits_a_card_of_8_gb_at_any_batch(accumulation):
    """At most 7.4e9 bytes are allocated, context and workspaces apart; docs/memory.md has both figures."""
    stored = {"weight_dtype": "int8", "stochastic_rounding": True, "embedding_bits": 4, "head_gradient": "slices"}
    update = {"per_layer": True, "activation_checkpointing": "layer", "gradient_accumulation": accumulation}
    sizes = account(setting(device_type="cuda", accumulate="moments", optimizer="adamw4bit", **stored, **update))
    allocated = sizes["peak"] - sizes["runtime"]
    assert allocated <= 7.4e9
    assert sizes["peak"] <= 8e9
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert f"{sizes['peak'] / 1e9:.2f}e9 bytes predicted, of which torch allocates {allocated / 1e9:.2f}e9" in page
