"""Steps of parameters stored in int8: those of plain float32 parameters, rounded; the same on every replica."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from peft_pretraining.distributed.world import World
from peft_pretraining.model.int8 import Int8Tensor
from peft_pretraining.optim import adam8bit, moments, orthogonal
from peft_pretraining.optim.accumulation import AccumulatingUpdate
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.orthogonal import pairs_of_factors
from peft_pretraining.optim.slices import StochasticRounding

ADAMS = ["adam", "adamw", "adam8bit", "adamw4bit"]
ORTHOGONAL = ["muon", "muon8bit", "muon4bit", "spectron", "spectron8bit", "spectron4bit"]
OPTIMIZERS = [*ADAMS, "stable_spam", *ORTHOGONAL]
# Elements of the last slice beyond whole blocks of int8, and of 4- and 8-bit moments.
SHAPES = {"lora_A": (48, 300), "lora_B": (130, 48), "sparse_value": (8192 * 2 + 128 + 60,)}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    for module in (adam8bit, moments, orthogonal):
        monkeypatch.setattr(module, "SLICE_ELEMENTS", 8192)


def both(seed: int = 0) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Stored parameters, and plain ones with their values in float32."""
    generator, stored, plain = torch.Generator().manual_seed(seed), {}, {}
    for name, shape in SHAPES.items():
        values = 0.1 * torch.randn(shape, generator=generator)
        made = Int8Tensor.like(values)
        made.copy_(values)
        stored[f"layer.{name}"] = nn.Parameter(made)
        plain[f"layer.{name}"] = nn.Parameter(made.dequantised().clone())
    return stored, plain


def steps_of(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.scales.repeat_interleave(128)[: parameter.numel()].view(parameter.shape)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_plain_one_rounded(name, seed):
    """By at most a step of the block, half a step to nearest; a spectral norm is estimated from the same values."""
    stored, plain = both()
    settings = {"lr": 0.01, "weight_decay": 0.1}
    rounding = None if seed is None else StochasticRounding(seed)
    ours = build_optimizer(name, stored, **settings, rounding=rounding, sliced=True)
    theirs = build_optimizer(name, plain, **settings, sliced=True)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in stored.items():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        plain[key].grad = parameter.grad.clone()
    ours.step()
    theirs.step()
    for key, parameter in stored.items():
        apart = (parameter.detach().dequantised() - plain[key].detach()).abs() / steps_of(parameter)
        assert float(apart.max()) <= (0.5001 if seed is None else 1.0001), key
        assert float(apart.mean()) > 0.1, key  # they were rounded


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("name", [*ADAMS, *ORTHOGONAL])
def test_a_step_from_accumulated_moments_is_the_plain_one_rounded(name, seed):
    """Two micro-batches; the moments of both are equal, as are the values that decay."""
    both_of_them = both()
    rounding = None if seed is None else StochasticRounding(seed)
    for parameters in both_of_them:
        build = partial(build_optimizer, name, lr=0.0, weight_decay=0.1, rounding=rounding, sliced=True)
        joint = pairs_of_factors(parameters) if name.startswith("spectron") else []
        updates = AccumulatingUpdate(build, parameters, World(), num_micro_batches=2, seed=0, joint=joint)
        generator = torch.Generator().manual_seed(1)
        updates.begin(0.01)
        for last in (False, True):
            updates.before_backward(last=last)
            sum((p * torch.randn(p.shape, generator=generator)).sum() for p in parameters.values()).backward()
        assert int(updates.finish(torch.zeros(())).skipped) == 0
    stored, plain = both_of_them
    for key, parameter in stored.items():
        apart = (parameter.detach().dequantised() - plain[key].detach()).abs() / steps_of(parameter)
        assert float(apart.max()) <= (0.5001 if seed is None else 1.0001), key
        assert float(apart.mean()) > 0.1, key  # they were rounded


def test_adamw_equals_its_formula_in_float64():
    """Three updates; the values that are stepped are the rounded ones of the update before."""
    stored, _ = both()
    optimizer = build_optimizer("adamw", stored, lr=0.01, weight_decay=0.1, rounding=StochasticRounding(0), sliced=True)
    generator = torch.Generator().manual_seed(2)
    moments = dict.fromkeys(stored, (0.0, 0.0))
    for step in (1, 2, 3):
        expected = {}
        for key, parameter in stored.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            g, w = parameter.grad.double(), parameter.detach().dequantised().double()
            m, v = (b * old + (1 - b) * new for b, old, new in zip((0.9, 0.999), moments[key], (g, g * g), strict=True))
            moments[key] = m, v
            root = (v / (1 - 0.999**step)).sqrt() + 1e-8
            expected[key] = w * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**step)) / root
        optimizer.step()
        for key, parameter in stored.items():
            assert ((parameter.detach().dequantised() - expected[key]).abs() <= 1.0001 * steps_of(parameter)).all()


@pytest.mark.parametrize("name", ["adam", "adamw", "adam8bit", "adamw4bit", "muon", "spectron"])
def test_equal_seeds_round_alike_and_updates_differently(name):
    ends = []
    for seed in (0, 0, 1):
        stored, _ = both()
        optimizer = build_optimizer(name, stored, lr=0.001, weight_decay=0.0, rounding=StochasticRounding(seed), sliced=True)
        for _ in range(2):
            for parameter in stored.values():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        ends.append(torch.cat([parameter.codes.flatten() for parameter in stored.values()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("name", ["adam", "adamw", "adam8bit", "adamw4bit"])
def test_small_updates_are_lost_to_nearest_only(name):
    """Fifty steps of 1e-5 of values in blocks with a 1: a step of a block is 1/127, 16 times as much as all of them."""
    ends = []
    for rounding in (None, StochasticRounding(0)):
        made = Int8Tensor.like(torch.empty(128 * 1000))
        made.copy_(torch.full((1000, 128), 64 / 127).index_fill_(1, torch.tensor([0]), 1.0).flatten())
        parameter = nn.Parameter(made)
        optimizer = build_optimizer(
            name, {"x.sparse_value": parameter}, lr=1e-5, weight_decay=0.0, rounding=rounding, sliced=True
        )
        for _ in range(50):
            parameter.grad = torch.ones_like(parameter).view(1000, 128).index_fill_(1, torch.tensor([0]), 0.0).flatten()
            optimizer.step()
        ends.append(float(64 / 127 - parameter.detach().view(1000, 128)[:, 1:].mean()))
    assert ends[0] == pytest.approx(0, abs=1e-7)
    # The mean of 127,000 elements, each with a deviation of at most sqrt(50 * p) steps, p = 1e-5 * 127.
    assert ends[1] == pytest.approx(50e-5, abs=5 * math.sqrt(50 * 1.27e-3) / 127 / math.sqrt(127_000))


@pytest.mark.parametrize("name", ["adamw", "adam8bit", "adamw4bit"])
def test_rows_without_gradient_and_decay_stay_bit_identical(name):
    """A row has two blocks, and one block of 8-bit moments, which may round a zero to another number."""
    values = torch.randn(100, 256, generator=torch.Generator().manual_seed(3))
    made = Int8Tensor.like(values)
    made.copy_(values)
    before, parameter = made.clone(), nn.Parameter(made)
    rounding = StochasticRounding(0)
    optimizer = build_optimizer(
        name, {"embed_tokens.weight": parameter}, lr=0.01, weight_decay=0.0, rounding=rounding, sliced=True
    )
    for _ in range(3):
        parameter.grad = torch.zeros(100, 256).index_fill_(0, torch.tensor([4, 90]), 1.0)
        optimizer.step()
    changed = (parameter.codes != before.codes).any(1) | (parameter.scales != before.scales).view(100, 2).any(1)
    changed = changed.nonzero().flatten()
    assert changed.tolist() == [4, 90]
