"""Optimizers are the libraries' own, and their state goes through a checkpoint without losing a bit."""

import json

import pytest
import torch
from torch import nn

from peft_pretraining.optim import build_optimizer, load_optimizer_state, optimizer_state

NAMES = ["adam", "adamw", "sgd", "adafactor", "adam8bit", "adamw4bit"]


def make(dtype):
    torch.manual_seed(0)
    # One tensor above and one below the 4,096 elements from which bitsandbytes keeps 8-bit states.
    model = nn.Sequential(nn.Linear(80, 64), nn.Linear(64, 8)).to(dtype)
    return model, {parameter: name for name, parameter in model.named_parameters()}


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_bit_for_bit(name, dtype):
    settings = {"lr": 1e-2, "weight_decay": 0.01, "beta1": 0.9 if name in ("sgd", "adafactor") else 0.0}
    model, names = make(dtype)
    optimizer = build_optimizer(name, dict(model.named_parameters()), **settings)
    for seed in range(3):
        step(model, optimizer, seed)
    tensors, scalars = optimizer_state(optimizer, names)
    saved = {key: tensor.clone() for key, tensor in tensors.items()}
    scalars = json.loads(json.dumps(scalars))

    other, other_names = make(dtype)
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(name, dict(other.named_parameters()), **settings)
    load_optimizer_state(resumed, other_names, saved, scalars)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_state_of_another_model_is_refused():
    model, names = make(torch.float32)
    optimizer = build_optimizer("adamw", dict(model.named_parameters()), lr=1e-3, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"'9\.weight'"):
        load_optimizer_state(optimizer, names, {"9.weight/exp_avg": torch.zeros(3)}, {})


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'lion'"):
        build_optimizer("lion", {"x": nn.Parameter(torch.zeros(1))}, lr=1.0, weight_decay=0.0)
