"""Stepping parameters during the backward pass is bit-identical to stepping them after it; clipping, limits and skipping."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pretraining.distributed.world import World
from peft_pretraining.optim import updates as module
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.updates import GrowthLimit, PerLayerUpdate, WholeUpdate, l2_norm

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
        limited = limit.limit_(1, gradient, torch.linalg.vector_norm(gradient))
        limit.remember(1, limited, torch.tensor(False))
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


def repeated(kind: str, dtype: torch.dtype, times: int) -> tuple[torch.Tensor, float]:
    """A million values `times` times over, and the norm of all of them by float64 arithmetic."""
    generator = torch.Generator().manual_seed(times)
    values = torch.full((2**20,), 0.1) if kind == "equal" else torch.randn(2**20, generator=generator)
    values = values.to(dtype)
    return values.repeat(times), math.sqrt(times * float(values.double().square().sum()))


@pytest.mark.parametrize(
    ("kind", "dtype", "times"),
    [
        ("normal", torch.float32, 4),
        ("equal", torch.float32, 5),
        ("normal", torch.bfloat16, 5),
        ("normal", torch.float32, 125),  # 131 million elements: the embedding of the 7B model
    ],
)
def test_norms_are_those_of_float64_for_any_size(kind, dtype, times):
    tensor, expected = repeated(kind, dtype, times)
    assert float(l2_norm(tensor)) == pytest.approx(expected, rel=3e-7)
    # No whole number of pieces or slices, and a start that is not aligned.
    cut = tensor[3:2_100_000]
    assert float(l2_norm(cut)) == pytest.approx(math.sqrt(float(cut.double().square().sum())), rel=3e-7)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000, 1024, 1025, 5000, 65_536, 70_001])
def test_norms_of_small_tensors(count):
    generator = torch.Generator().manual_seed(count)
    tensor = torch.randn(count, generator=generator)
    for values in (tensor, tensor.double(), tensor.bfloat16(), tensor.view(-1, 5).t() if count % 5 == 0 else tensor):
        norm = l2_norm(values)
        assert norm.dtype == torch.promote_types(values.dtype, torch.float32)
        assert float(norm) == pytest.approx(math.sqrt(float(values.double().square().sum())), rel=3e-7)


def test_norms_of_values_that_are_not_finite_are_not_finite():
    for value in (math.nan, math.inf, -math.inf):
        for place in (0, 2999):
            tensor = torch.ones(3000)
            tensor[place] = value
            assert not math.isfinite(float(l2_norm(tensor)))


def test_norms_have_the_same_bits_for_any_number_of_threads():
    """The library's own norm has not: each thread adds up another part."""
    tensor, threads, norms = repeated("normal", torch.float32, 4)[0], torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            norms.add(float(l2_norm(tensor)))
    finally:
        torch.set_num_threads(threads)
    assert len(norms) == 1


class LargestResult(TorchDispatchMode):
    """Notes the number of elements of the largest new tensor."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_need_no_memory_of_the_tensors_size(monkeypatch, dtype):
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 8192)
    tensor = torch.ones(10 * 8192, dtype=dtype)
    with LargestResult() as results:
        l2_norm(tensor)
    assert 0 < results.largest <= 8192


def test_adafactor_clips_large_tensors_by_their_true_rms():
    """A gradient that grows tenfold makes an update of an RMS above 1, which is scaled to exactly 1 times the learning rate."""
    weight = nn.Parameter(torch.zeros(4_000_000))
    optimizer = build_optimizer("adafactor", {"weight": weight}, lr=0.5, weight_decay=0.0)
    before = weight.detach()[0].clone()
    for gradient in (0.01, 0.1):
        before = weight.detach()[0].clone()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    assert float(before - weight.detach()[0]) == pytest.approx(0.5, rel=1e-6)


def large_update(per_layer: bool, gradient: float, **options) -> tuple[PerLayerUpdate | WholeUpdate, nn.ParameterList]:
    """An update, before its end, of a vector of 4 million zeros and one of 3, all gradients equal; SGD without decay."""
    model = nn.ParameterList([torch.zeros(4_000_000), torch.zeros(3)])
    parameters = dict(model.named_parameters())
    kind = PerLayerUpdate if per_layer else WholeUpdate
    sgd = lambda named: build_optimizer("sgd", named, lr=0.0, weight_decay=0.0)  # noqa: E731
    updates = kind(sgd, parameters, World(), **options)
    updates.begin(1.0)
    updates.before_backward(last=True)
    sum((parameter * gradient).sum() for parameter in model).backward()
    return updates, model


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_gradient_norm_of_a_large_tensor_is_that_of_float64(per_layer):
    updates, _ = large_update(per_layer, 0.1)
    assert float(updates.finish(torch.zeros(())).gradnorm) == pytest.approx(0.1 * math.sqrt(4_000_003), rel=5e-7)


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_growth_limit_of_a_large_tensor_is_that_of_float64(per_layer):
    """Of an earlier norm of 1, twice is let through: each of the equal entries becomes 2 / sqrt(their number)."""
    growth = GrowthLimit(2.0, 2, torch.device("cpu"))
    growth.previous.fill_(1.0)
    updates, model = large_update(per_layer, 0.1, growth=growth)
    updates.finish(torch.zeros(()))
    assert float(model[0].detach()[0]) == pytest.approx(-2 / math.sqrt(4_000_000), rel=1e-6)


def test_clipping_of_a_large_tensor_is_that_of_float64():
    updates, model = large_update(False, 0.1, grad_clipping=1.0)
    updates.finish(torch.zeros(()))
    assert float(model[0].detach()[0]) == pytest.approx(-1 / math.sqrt(4_000_003), rel=1e-6)


def test_clipping_follows_the_growth_limit():
    """Both at once: gradients of norms 3 and 4 of which 1.5 and 4 are let through are clipped by the norm of these two.

    Clipped first, or by the norm before the growth limit, both would become smaller.
    """
    model = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    growth = GrowthLimit(1.5, 2, torch.device("cpu"))
    growth.previous.copy_(torch.tensor([1.0, 4.0]))
    sgd = lambda named: build_optimizer("sgd", named, lr=0.0, weight_decay=0.0)  # noqa: E731
    updates = WholeUpdate(sgd, dict(model.named_parameters()), World(), growth=growth, grad_clipping=2.0)
    updates.begin(1.0)
    (model[0] * 3 + model[1] * 4).backward()
    outcome = updates.finish(torch.zeros(()))
    assert float(outcome.gradnorm) == 5.0
    limited = math.hypot(1.5, 4.0)
    assert [-float(p.detach()) for p in model] == pytest.approx([1.5 * 2 / limited, 4 * 2 / limited], rel=1e-5)
    assert growth.previous.tolist() == [1.5, 4.0]  # of what the growth limit let through, not of what clipping left


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_tensor_without_a_gradient_adds_nothing_to_the_norm(per_layer):
    """Though it had one in the update before."""
    model = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    parameters = dict(model.named_parameters())
    sgd = lambda named: build_optimizer("sgd", named, lr=0.0, weight_decay=0.0)  # noqa: E731
    updates = (PerLayerUpdate if per_layer else WholeUpdate)(sgd, parameters, World())
    norms = []
    for loss in (lambda: model[0] * 3 + model[1] * 4, lambda: model[0] * 3):
        updates.begin(0.0)
        updates.before_backward(last=True)
        loss().backward()
        norms.append(float(updates.finish(torch.zeros(())).gradnorm))
    assert norms == [5.0, 3.0]
