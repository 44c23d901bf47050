"""Stepping parameters during the backward pass is bit-identical to stepping them after it; clipping, limits and skipping."""

import itertools

import pytest
import torch
from torch import nn

from peft_pretraining.distributed.world import World
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.updates import GrowthLimit, PerLayerUpdate, WholeUpdate

OPTIMIZERS = ["adam", "adamw", "sgd", "adafactor", "adam8bit", "adamw4bit"]


def network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    # Tensors above and below 4,096 elements, the limit of quantising, and one that is not a multiple of the block size.
    return nn.Sequential(nn.Linear(70, 64), nn.Tanh(), nn.Linear(64, 66), nn.Tanh(), nn.Linear(66, 5)).to(dtype)


def build(name: str):
    return lambda parameters: build_optimizer(name, parameters, lr=0.0, weight_decay=0.01, beta1=0.9)


def updates_of(model: nn.Module, name: str, per_layer: bool, growth: float | None = None):
    parameters = dict(model.named_parameters())
    limit = None if growth is None else GrowthLimit(growth, len(parameters), torch.device("cpu"))
    if per_layer:
        return PerLayerUpdate(build(name), parameters, World(), growth=limit)
    return WholeUpdate(build(name), parameters, World(), growth=limit)


def train(model: nn.Module, updates, accumulation: int, num_updates: int = 4) -> list[float]:
    """Makes updates on fixed inputs with increasing learning rates; returns the gradient norms."""
    generator = torch.Generator().manual_seed(1)
    norms = []
    for number in range(num_updates):
        updates.begin(lr=0.01 * (number + 1))
        for micro_batch in range(accumulation):
            x = torch.randn(8, 70, generator=generator).to(next(model.parameters()).dtype)
            loss = (model(x) * (1 + number)).square().sum()
            updates.before_backward(micro_batch == accumulation - 1)
            loss.backward()
        norms.append(float(updates.finish(torch.zeros(())).gradnorm))
    return norms


@pytest.mark.parametrize("growth", [None, 1.01])
@pytest.mark.parametrize(("name", "accumulation"), list(itertools.product(OPTIMIZERS, [1, 3])))
def test_per_layer_updates_are_bit_identical_to_whole_ones(name, accumulation, growth):
    whole, layered = network(), network()
    norms = train(whole, updates_of(whole, name, False, growth), accumulation)
    assert norms == train(layered, updates_of(layered, name, True, growth), accumulation)
    for left, right in zip(whole.parameters(), layered.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", ["adam8bit", "adamw4bit"])
def test_per_layer_moments_are_made_before_the_first_backward_pass(name):
    """They stay at the same addresses. Allocated among a backward pass's temporaries they would fragment memory."""
    model = network()
    updates = updates_of(model, name, per_layer=True)
    states = updates.optimizer.state

    def places() -> dict[tuple[int, str], int]:
        tensors = {(n, k): v for n, p in enumerate(model.parameters()) for k, v in states[p].items() if torch.is_tensor(v)}
        return {key: tensor.data_ptr() for key, tensor in tensors.items() if tensor.numel()}

    before = places()
    assert {number for number, _ in before} == set(range(6))
    train(model, updates, accumulation=1)
    assert places() == before


def test_per_layer_updates_free_gradients_during_the_backward_pass():
    """With one micro-batch at most one gradient is alive at any time."""
    model = network()
    updates = updates_of(model, "adamw", True)
    alive = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    train(model, updates, accumulation=1, num_updates=2)
    assert alive == [0] * len(alive)  # the hook of PerLayerUpdate runs first and frees the gradient
    assert len(alive) == 2 * len(list(model.parameters()))


def test_clipping_scales_the_whole_update_and_logs_the_norm_before():
    free, clipped = network(), network()
    parameters = dict(clipped.named_parameters())
    whole = updates_of(free, "sgd", False)
    limited = WholeUpdate(build("sgd"), parameters, World(), grad_clipping=0.5)
    before = [p.detach().clone() for p in free.parameters()]
    (norm,) = train(free, whole, 1, num_updates=1)
    assert train(clipped, limited, 1, num_updates=1) == [norm]
    assert norm > 0.5
    for start, left, right in zip(before, free.parameters(), clipped.parameters(), strict=True):
        decayed = 0.01 * 0.01 * start  # weight decay is not clipped
        torch.testing.assert_close(right - start + decayed, (left - start + decayed) * 0.5 / norm, rtol=1e-4, atol=1e-7)


def test_gradient_norm_is_summed_in_float32():
    """In bfloat16 the sum of squares of 10,000 equal entries would be a few percent too small."""
    parameter = nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    for per_layer in (False, True):
        model = nn.ParameterList([parameter])
        updates = updates_of(model, "sgd", per_layer)
        updates.begin(0.0)
        updates.before_backward(True)
        (parameter * 0.125).sum().backward()
        assert float(updates.finish(torch.zeros(())).gradnorm) == pytest.approx(12.5, rel=1e-6)
        parameter.grad = None


def test_growth_limit_bounds_each_tensors_norm_by_its_previous_one():
    """The first non-zero norm is unlimited; each later one is at most 1.5 times the previous limited norm."""
    limit = GrowthLimit(1.5, 2, torch.device("cpu"))
    passed = []
    for norm in (0.0, 4.0, 100.0, 2.0, 100.0):
        gradient = torch.tensor([norm, 0.0])
        limit.limit_(1, gradient, torch.linalg.vector_norm(gradient))
        passed.append(float(gradient[0]))
    assert passed == [0.0, 4.0, 6.0, 2.0, 3.0]
    assert limit.previous.tolist() == [0.0, 3.0]  # the other tensor has its own history


def everything(model: nn.Module, updates) -> list[torch.Tensor]:
    """Returns copies of all parameters, state tensors and step counts."""
    values = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        values += [torch.as_tensor(value).clone() for _, value in sorted(updates.optimizer.state[parameter].items())]
    return values


def backward(model: nn.Module, updates, poisoned: int | None) -> None:
    """Makes an update's backward pass with a non-finite gradient of the parameter number `poisoned`."""
    updates.begin(lr=0.01)
    loss = model(torch.ones(8, 70)).square().sum()
    if poisoned is not None:
        list(model.parameters())[poisoned].register_hook(lambda gradient: gradient * torch.nan)
    updates.before_backward(last=True)
    loss.backward()


@pytest.mark.parametrize("growth", [None, 1.01])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_non_finite_gradient_changes_nothing(name, growth):
    model = network()
    updates = updates_of(model, name, False, growth)
    train(model, updates, accumulation=1, num_updates=2)
    before, norms = everything(model, updates), None if growth is None else updates.growth.previous.clone()
    backward(model, updates, poisoned=2)
    outcome = updates.finish(torch.ones(()))
    assert int(outcome.skipped) == 6
    assert all(map(torch.equal, before, everything(model, updates)))
    assert norms is None or torch.equal(norms, updates.growth.previous)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_non_finite_loss_changes_nothing(name):
    """Although all gradients are finite; also in the first update, before there are moments."""
    model = network()
    updates = updates_of(model, name, False)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model, updates, poisoned=None)
    assert int(updates.finish(torch.tensor(torch.inf)).skipped) == 6
    assert all(map(torch.equal, before, model.parameters()))
    backward(model, updates, poisoned=None)
    assert int(updates.finish(torch.ones(())).skipped) == 0
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_per_layer_a_non_finite_first_gradient_changes_nothing(name):
    """Other tensors have been stepped already, and torch's SGD would leave an uninitialised momentum."""
    bad, good = network(), network()
    updates = updates_of(bad, name, True)
    backward(bad, updates, poisoned=2)  # the last layers' tensors are stepped before
    updates.finish(torch.ones(()))
    third = list(bad.parameters())[2]
    assert torch.equal(third, list(good.parameters())[2])
    states = [value for value in updates.optimizer.state[third].values() if torch.is_tensor(value)]
    assert all(torch.isfinite(value).all() for value in states if value.is_floating_point())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_per_layer_only_the_tensor_with_a_non_finite_gradient_is_skipped(name):
    model = network()
    updates = updates_of(model, name, True, 1.01)
    train(model, updates, accumulation=1, num_updates=2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    norms = updates.growth.previous.clone()
    backward(model, updates, poisoned=2)
    assert int(updates.finish(torch.ones(())).skipped) == 1
    assert [torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)] == [n == 2 for n in range(6)]
    assert torch.isfinite(updates.growth.previous).all()
    assert updates.growth.previous[2] == norms[2]
