"""Optimizer steps on a CPU and on a GPU: per layer as whole, a GPU as a CPU, and nothing changes after a non-finite gradient."""

import importlib.util
from functools import partial

import pytest
import torch
from torch import nn

from peft_pretraining.distributed.world import World
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.updates import PerLayerUpdate, WholeUpdate


def with_package(name: str, package: str):
    """Returns a parameter that is skipped if the optimizer's package is not installed."""
    missing = importlib.util.find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


QUANTISED = [with_package("adam8bit", "bitsandbytes"), with_package("adamw4bit", "torchao")]
every_optimizer = pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor", *QUANTISED])


def network(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a network with tensors above and below 4,096 elements, the limit of quantising; one of no whole blocks."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(70, 64), nn.Tanh(), nn.Linear(64, 66), nn.Tanh(), nn.Linear(66, 5))
    return layers.to(device, dtype)


def updates_of(model: nn.Module, name: str, per_layer: bool = False):
    build = partial(build_optimizer, name, lr=0.0, weight_decay=0.01, beta1=0.9)
    return (PerLayerUpdate if per_layer else WholeUpdate)(build, dict(model.named_parameters()), World())


def train(model: nn.Module, updates, num_updates: int = 4) -> list[torch.Tensor]:
    """Makes updates on fixed inputs; returns the parameters on the CPU."""
    generator, device = torch.Generator().manual_seed(1), next(model.parameters()).device
    for number in range(num_updates):
        updates.begin(lr=0.01 * (number + 1))
        x = torch.randn(8, 70, generator=generator).to(device, next(model.parameters()).dtype)
        updates.before_backward(last=True)
        model(x).square().sum().backward()
        updates.finish(torch.zeros((), device=device))
    return [parameter.detach().cpu().clone() for parameter in model.parameters()]


@every_optimizer
def test_per_layer_steps_are_those_of_the_whole_update(device, name):
    whole, layered = network(device), network(device)
    first, second = train(whole, updates_of(whole, name)), train(layered, updates_of(layered, name, per_layer=True))
    assert all(map(torch.equal, first, second))


@every_optimizer
def test_a_device_steps_as_the_cpu_does(device, name):
    """Up to rounding; a quantised moment may be rounded to a neighbouring code, which changes a step by some percent."""
    start = [parameter.detach() for parameter in network(torch.device("cpu")).parameters()]
    models = [network(where) for where in (torch.device("cpu"), device)]
    expected, found = (train(model, updates_of(model, name)) for model in models)
    tolerance = 0.05 if "bit" in name else 1e-3
    for before, a, b in zip(start, expected, found, strict=True):
        assert float((a - before).norm()) > 0
        assert float((a - b).norm() / (a - before).norm()) < tolerance


def everything(model: nn.Module, updates) -> list[torch.Tensor]:
    """Returns copies of all parameters, state tensors and step counts."""
    values = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        values += [torch.as_tensor(value).clone() for _, value in sorted(updates.optimizer.state[parameter].items())]
    return values


@every_optimizer
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_non_finite_number_leaves_bits_and_step_counts_unchanged(device, name, where):
    model = network(device)
    updates = updates_of(model, name)
    train(model, updates, num_updates=2)
    before = everything(model, updates)
    updates.begin(lr=0.01)
    updates.before_backward(last=True)
    model(torch.ones(8, 70, device=device)).square().sum().backward()
    if where == "gradient":
        model[2].weight.grad[3, 4] = torch.nan
    loss = torch.full((), torch.inf if where == "loss" else 1.0, device=device)
    assert int(updates.finish(loss).skipped) == 6
    assert all(map(torch.equal, before, everything(model, updates)))


@pytest.mark.parametrize("name", QUANTISED)
def test_a_bfloat16_parameter_is_stepped_with_quantised_moments(device, name):
    model = network(device, torch.bfloat16)
    before = [parameter.detach().cpu().clone() for parameter in model.parameters()]
    after = train(model, updates_of(model, name, per_layer=True))
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert not any(map(torch.equal, before, after))
