"""Optimizer states are saved and restored bit-identically, and states that do not fit are refused."""

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn

from peft_pretraining.distributed.world import World
from peft_pretraining.optim.build import OptimizerUnavailable, build_optimizer
from peft_pretraining.optim.state import load_optimizer_state, optimizer_state, plain_moments
from peft_pretraining.optim.updates import WholeUpdate

NAMES = ["adam", "adamw", "sgd", "adafactor", "adam8bit", "adamw4bit"]


def make(dtype):
    torch.manual_seed(0)
    # One tensor above and one below the 4,096 elements from which bitsandbytes keeps 8-bit states.
    return nn.Sequential(nn.Linear(80, 64), nn.Linear(64, 8)).to(dtype)


def updates_of(model, name, **settings):
    return WholeUpdate(partial(build_optimizer, name, **settings), dict(model.named_parameters()), World())


def step(model, updates, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    updates.optimizer.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_resumes_bit_identically(name, dtype):
    settings = {"lr": 1e-2, "weight_decay": 0.01, "beta1": 0.9 if name in ("sgd", "adafactor") else 0.0}
    model, other = make(dtype), make(dtype)
    updates, resumed = updates_of(model, name, **settings), updates_of(other, name, **settings)
    for seed in range(3):
        step(model, updates, seed)
    state = optimizer_state(updates, dict(model.named_parameters()))
    assert not state.own
    saved = {key: tensor.clone() for key, tensor in state.shared.items()}
    scalars = json.loads(json.dumps(state.scalars))

    other.load_state_dict(model.state_dict())
    index = {key: (tensor.shape, tensor.dtype) for key, tensor in saved.items()}
    load_optimizer_state(resumed, dict(other.named_parameters()), index, scalars, partial(fill, saved))
    for seed in range(3, 6):
        step(model, updates, seed)
        step(other, resumed, seed)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_parameters_are_stepped_like_float32_ones(name, beta1):
    """For tensors of any size: kernels process the elements beyond the last full vector in a separate loop."""
    for size in (3, 64, 100, 4099):
        ends = []
        for dtype in (torch.float32, torch.bfloat16):
            parameter = nn.Parameter(torch.full((size,), 1.5, dtype=dtype))
            make = partial(build_optimizer, name, lr=0.05, weight_decay=0.5, beta1=beta1)
            updates = WholeUpdate(make, {"p": parameter}, World())
            for _ in range(3):
                parameter.grad = torch.full_like(parameter, 1.0)
                updates.optimizer.step()
            ends.append(parameter.detach().float())
        torch.testing.assert_close(*ends, rtol=0, atol=0.02)
        assert float(ends[0].max()) < 1.4


@pytest.mark.parametrize("form", ["torch's AdamW", "sliced AdamW"])
@pytest.mark.parametrize("name", ["muon8bit", "muon4bit", "spectron8bit"])
def test_plain_moments_of_an_earlier_version_are_quantised(name, form):
    """Those of what is no matrix, which was stepped by torch's AdamW, or (rounded stochastically) by a sliced one."""
    shapes = {"x.lora_A": (8, 40), "x.lora_B": (40, 8), "x.sparse_value": (5000,), "norm.weight": (40,)}
    ends = []
    for kind, settings in (("adamw", {"sliced": form == "sliced AdamW"}), (name, {})):
        generator = torch.Generator().manual_seed(0)
        parameters = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in shapes.items()}
        updates = WholeUpdate(partial(build_optimizer, kind, lr=0.01, weight_decay=0.0, **settings), parameters, World())
        for _ in range(3):
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            updates.optimizer.step()
        ends.append((parameters, updates))
    (parameters, before), (others, updates) = ends
    old, own = optimizer_state(before, parameters), optimizer_state(updates, others)
    saved = {key: tensor.clone() for key, tensor in own.shared.items() if "lora" in key}
    saved |= {key: tensor for key, tensor in old.shared.items() if "lora" not in key}
    scalars = {key: old.scalars.get(key, {}) if "lora" not in key else value for key, value in own.scalars.items()}
    index = {key: (tensor.shape, tensor.dtype) for key, tensor in saved.items()}
    updates = WholeUpdate(partial(build_optimizer, name, lr=0.01, weight_decay=0.0), others, World())
    assert load_optimizer_state(updates, others, index, scalars, partial(fill, saved))
    for key, allowed in (("x.sparse_value", 0.25 if name == "muon4bit" else 0.02), ("norm.weight", 1e-6)):
        state, expected = updates.optimizer.state[others[key]], before.optimizer.state[parameters[key]]
        assert state["step"] == 3
        for found, names in zip(plain_moments(state), (("exp_avg", "moment1"), ("exp_avg_sq", "moment2")), strict=True):
            (moment,) = (expected[each].flatten() for each in names if each in expected)
            assert float((found - moment).abs().max()) <= allowed * float(moment.abs().max()), key


def fill(saved, targets):
    for name, target in targets.items():
        target.copy_(saved[name])


def test_state_of_another_model_is_refused():
    model = make(torch.float32)
    updates = updates_of(model, "adamw", lr=1e-3, weight_decay=0.0)
    index = {"9.weight/exp_avg": (torch.Size([3]), torch.float32)}
    with pytest.raises(ValueError, match=r"'9\.weight'"):
        load_optimizer_state(updates, dict(model.named_parameters()), index, {}, partial(fill, {}))


@pytest.mark.parametrize("name", ["adam8bit", "adamw4bit"])
@pytest.mark.parametrize("damage", ["shorter", "missing", "other dtype"])
def test_an_inconsistent_quantised_state_is_refused(name, damage):
    """The kernels would read beyond the end of a short tensor, and a checkpoint may come from an untrusted source."""
    model = make(torch.float32)
    updates = updates_of(model, name, lr=1e-3, weight_decay=0.0)
    step(model, updates, 0)
    saved = optimizer_state(updates, dict(model.named_parameters())).shared
    index = {key: (tensor.shape, tensor.dtype) for key, tensor in saved.items()}
    scales = f"0.weight/{'absmax1' if name == 'adam8bit' else 'scale1'}"
    if damage == "missing":
        del index[scales]
    else:
        size, dtype = index[scales]
        index[scales] = (torch.Size([1]), dtype) if damage == "shorter" else (size, torch.float64)
    with pytest.raises(ValueError, match=scales):
        load_optimizer_state(updates, dict(model.named_parameters()), index, {}, partial(fill, saved))


def test_an_unknown_optimizer_name_is_refused():
    with pytest.raises(ValueError, match="'lion'"):
        build_optimizer("lion", {"x": nn.Parameter(torch.zeros(1))}, lr=1.0, weight_decay=0.0)


@pytest.mark.parametrize(
    ("name", "package"),
    [("adam8bit", "bitsandbytes"), ("muon8bit", "bitsandbytes"), ("spectron8bit", "bitsandbytes"), ("adamw4bit", "torchao")],
)
def test_a_missing_package_is_named_with_the_way_out(monkeypatch, name, package):
    """Instead of a traceback, when the optimizer is built."""
    for module in (package, "peft_pretraining.optim.adam8bit", "peft_pretraining.optim.adam_ao"):
        monkeypatch.setitem(sys.modules, module, None)
    matrix = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(OptimizerUnavailable, match=f"need {package}, which cannot be imported.*pip install {package}, or use"):
        build_optimizer(name, {"model.layers.0.mlp.up_proj.weight": matrix}, lr=0.1, weight_decay=0.0)
