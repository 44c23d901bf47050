"""GaLore: its step is galore-torch's, and keeps every promise of the other optimizers."""

import itertools
import json
from functools import partial

import pytest
import torch
from torch import nn

from peft_pretraining.config.arguments import PROJ_TYPES
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.counts import subspace_shapes
from peft_pretraining.optim import (
    GrowthLimit,
    PerLayerUpdate,
    StochasticRounding,
    Subspace,
    WholeUpdate,
    build_galore,
    load_optimizer_state,
    optimizer_state,
)

OPTIMIZERS = ["adam", "adamw", "sgd", "adafactor", "adam8bit", "adamw4bit"]
MATRICES = ("0.weight", "2.weight")  # upright and lying; the last one is stepped as it is


def network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    # Moments above the 4,096 elements from which they are quantised, and below.
    layers = (nn.Linear(70, 600), nn.Tanh(), nn.Linear(600, 66), nn.Tanh(), nn.Linear(66, 5))
    return nn.Sequential(*layers).to(dtype)


def updates_of(model, name, *, per_layer=False, growth=None, clipping=None, rounding=None, decay=0.01, **subspace):
    parameters = dict(model.named_parameters())
    chosen = Subspace(**({"rank": 8, "gap": 3} | subspace))
    build = partial(build_galore, name, matrices=MATRICES, subspace=chosen, world=World(), lr=0.0, weight_decay=decay, beta1=0.9)
    build = partial(build, rounding=rounding)
    limit = None if growth is None else GrowthLimit(growth, len(parameters), torch.device("cpu"))
    if per_layer:
        return PerLayerUpdate(build, parameters, World(), growth=limit)
    return WholeUpdate(build, parameters, World(), growth=limit, grad_clipping=clipping)


def train(model, updates, accumulation=1, numbers=range(5)):
    """Updates on fixed numbers, the learning rate changing."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        updates.begin(lr=0.001 * (number + 1))
        for micro_batch in range(accumulation):
            x = torch.randn(8, 70, generator=generator).to(next(model.parameters()).dtype)
            loss = (model(x) * (1 + number)).square().sum()
            updates.before_backward(micro_batch == accumulation - 1)
            loss.backward()
        updates.finish(torch.zeros(()))


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for one, other in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_the_step_is_that_of_galore_torch(proj_type, shape, decay):
    """Ten updates of AdamW, projected anew after the fourth and eighth, with gradients whose singular values are apart."""
    theirs = pytest.importorskip("galore_torch", reason="galore-torch is not installed (pip install --no-deps)")
    torch.manual_seed(0)
    ours, reference = (nn.Parameter(torch.randn(shape)) for _ in range(2))
    plain, plain_reference = (nn.Parameter(torch.randn(7)) for _ in range(2))
    reference.data.copy_(ours.data)
    plain_reference.data.copy_(plain.data)
    subspace = Subspace(rank=6, gap=4, scale=0.25, proj_type=proj_type)
    updates = WholeUpdate(
        partial(build_galore, "adamw", matrices=("m",), subspace=subspace, world=World(), lr=0.0, weight_decay=decay),
        {"m": ours, "plain": plain},
        World(),
    )
    projected = {"params": [reference], "rank": 6, "update_proj_gap": 4, "scale": 0.25, "proj_type": proj_type}
    # Their epsilon is added before the bias correction: with one that vanishes beside the gradients both say the same.
    groups = [projected, {"params": [plain_reference]}]
    other = theirs.GaLoreAdamW(groups, lr=0.0, eps=1e-8, weight_decay=decay, no_deprecation_warning=True)
    start = ours.detach().clone()
    for number in range(10):
        lr = 0.01 * (1 + number)
        gradient = torch.randn(shape) * torch.linspace(0.5, 2, shape[1])
        if proj_type == "full" and number % 4 == 0:
            # There the projected gradient is diagonal, and Adam makes steps of full size of what rounding leaves beside the
            # diagonal: here nothing, since the singular vectors are unit vectors.
            gradient = torch.zeros(shape)
            places = torch.randperm(24), torch.randperm(24)
            gradient[places] = torch.linspace(0.5, 2, 24)
        gradient *= 1000
        updates.begin(lr)
        ours.grad, reference.grad = gradient.clone(), gradient.clone()
        plain.grad = torch.randn(7)
        plain_reference.grad = plain.grad.clone()
        updates.finish(torch.zeros(()))
        for group in other.param_groups:
            group["lr"] = lr
        other.step()
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
        if not decay:  # torch's AdamW, which steps what is not projected, decays before its step, theirs after it
            torch.testing.assert_close(plain, plain_reference, rtol=1e-5, atol=1e-5)
    assert float((ours.detach() - start).abs().max()) > 0.02  # far above the tolerance


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("name", ["adafactor", "adam8bit"])
def test_the_other_published_optimizers_step_as_in_galore_torch(name, shape, monkeypatch):
    """Ten updates, projected anew after the fourth and eighth; what is projected is large enough for moments of 8 bits."""
    theirs = pytest.importorskip("galore_torch", reason="galore-torch is not installed (pip install --no-deps)")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # theirs waits for a GPU
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    reference = nn.Parameter(ours.detach().clone())
    build = partial(build_galore, name, matrices=("m",), subspace=Subspace(48, gap=4), world=World(), lr=0.0)
    updates = WholeUpdate(partial(build, weight_decay=0.0), {"m": ours}, World())
    groups = [{"params": [reference], "rank": 48, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}]
    if name == "adafactor":
        other = theirs.GaLoreAdafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)
    else:
        other = theirs.GaLoreAdamW8bit(groups, lr=1e-3, weight_decay=0.0)
    start = ours.detach().clone()
    for number in range(10):
        gradient = torch.randn(shape) * torch.linspace(0.5, 2, shape[1])
        updates.begin(0.01 * (1 + number))
        ours.grad, reference.grad = gradient.clone(), gradient.clone()
        updates.finish(torch.zeros(()))
        for group in other.param_groups:
            group["lr"] = 0.01 * (1 + number)
        other.step()
    moved, wanted = ours.detach() - start, reference.detach() - start
    assert float((moved - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adam"])
def test_weight_decay_is_that_of_the_optimizer_itself(name, dtype):
    """Of a gradient of zeros nothing else is left, where the subspace is the whole space."""
    found = []
    for matrices in (("m",), ()):
        matrix = nn.Parameter(torch.full((8, 8), 1.5, dtype=dtype))
        subspace = Subspace(8, scale=1.0)
        build = partial(build_galore, name, matrices=matrices, subspace=subspace, world=World(), lr=0.0)
        updates = WholeUpdate(partial(build, weight_decay=0.5), {"m": matrix}, World())
        updates.begin(0.1)
        matrix.grad = torch.zeros_like(matrix)
        updates.finish(torch.zeros(()))
        found.append(matrix.detach().float())
    torch.testing.assert_close(*found, rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=0)
    assert float(found[0].mean()) == pytest.approx(1.5 * 0.95, rel=2**-8)


def test_a_small_decay_of_bfloat16_weights_is_rounded_together_with_the_step():
    """Rounded after it, a decay below half of a bfloat16's spacing would be lost whole."""
    torch.manual_seed(0)
    start, gradient = torch.randn(256, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    ends = {}
    for decay in (0.0, 0.01):
        matrix = nn.Parameter(start.clone())
        build = partial(build_galore, "adamw", matrices=("m",), subspace=Subspace(8), world=World(), lr=0.0)
        updates = WholeUpdate(partial(build, weight_decay=decay), {"m": matrix}, World())
        updates.begin(0.1)
        matrix.grad = gradient.clone()
        updates.finish(torch.zeros(()))
        ends[decay] = matrix.detach().double()
    shrunk = ((ends[0.01] - ends[0.0]) * ends[0.0]).sum() / ends[0.0].square().sum()
    assert float(shrunk) == pytest.approx(-0.1 * 0.01, rel=0.1)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_the_projection_is_the_best_of_its_rank(proj_type):
    """By its definition, without the sign of a singular vector: what it leaves of the gradient is the smaller singular values."""
    torch.manual_seed(0)
    for rows, columns in ((30, 20), (20, 30)):
        matrix = nn.Parameter(torch.zeros(rows, columns))
        subspace = Subspace(rank=5, proj_type=proj_type)
        build = partial(build_galore, "sgd", matrices=("m",), subspace=subspace, world=World(), lr=0.0)
        updates = WholeUpdate(partial(build, weight_decay=0.0), {"m": matrix}, World())
        updates.begin(1.0)
        matrix.grad = gradient = torch.randn(rows, columns)
        updates.finish(torch.zeros(()))
        left = torch.linalg.matrix_norm(gradient + matrix.detach() / 0.25)
        wanted = torch.linalg.svdvals(gradient)[5:].square().sum().sqrt()
        torch.testing.assert_close(left, wanted)
        shapes = subspace_shapes((rows, columns), 5, proj_type)
        kept = {key: tuple(v.shape) for key, v in updates.optimizer.state[matrix].items() if torch.is_tensor(v)}
        wanted_shapes = {"projection_left": shapes.left, "projection_right": shapes.right}
        assert kept == {key: shape for key, shape in wanted_shapes.items() if shape}


@pytest.mark.parametrize("growth", [None, 1.01])
@pytest.mark.parametrize(("name", "accumulation"), list(itertools.product(OPTIMIZERS, [1, 4])))
def test_per_layer_equals_whole_bit_for_bit(name, accumulation, growth):
    """With a projection change on the way; the projection sees the gradient of the whole update."""
    whole, layered = network(), network()
    train(whole, updates_of(whole, name, growth=growth), accumulation)
    train(layered, updates_of(layered, name, growth=growth, per_layer=True), accumulation)
    assert_same(whole, layered)


def test_accumulation_projects_the_gradient_of_the_whole_update():
    """Not that of its first or last micro-batch."""
    model = network()
    updates = updates_of(model, "adamw", per_layer=True, rank=1)
    updates.begin(0.0)
    total = torch.zeros(600, 70)
    for number in range(4):
        loss = model(torch.randn(8, 70)).square().sum()
        total += torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0]
        updates.before_backward(number == 3)
        loss.backward()
    updates.finish(torch.zeros(()))
    found = updates.optimizer.state[model[0].weight]["projection_right"][0]
    wanted = torch.linalg.svd(total, full_matrices=False).Vh[0]
    assert abs(float(found @ wanted)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_state_survives_in_the_middle_of_a_gap(name, dtype, per_layer, proj_type):
    """Bit for bit, past the next projection."""
    model, other = network(dtype), network(dtype)
    updates, resumed = (updates_of(m, name, per_layer=per_layer, proj_type=proj_type) for m in (model, other))
    train(model, updates, numbers=range(4))
    state = optimizer_state(updates, dict(model.named_parameters()))
    saved = {key: tensor.clone() for key, tensor in state.shared.items()}
    scalars = json.loads(json.dumps(state.scalars))
    assert {key for name in MATRICES for key in scalars[name]} >= {"num_updates"}
    other.load_state_dict(model.state_dict())
    index = {key: (tensor.shape, tensor.dtype) for key, tensor in saved.items()}

    def read(targets):
        for key, target in targets.items():
            target.copy_(saved[key])

    load_optimizer_state(resumed, dict(other.named_parameters()), index, scalars, read)
    train(model, updates, numbers=range(4, 8))
    train(other, resumed, numbers=range(4, 8))
    assert_same(model, other)


def test_a_projection_of_another_rank_is_refused():
    model, other = network(), network()
    updates = updates_of(model, "adamw")
    train(model, updates)
    state = optimizer_state(updates, dict(model.named_parameters()))
    index = {key: (tensor.shape, tensor.dtype) for key, tensor in state.shared.items()}
    with pytest.raises(ValueError, match="projection"):
        load_optimizer_state(updates_of(other, "adamw", rank=4), dict(other.named_parameters()), index, state.scalars, print)


def everything(model, updates):
    values = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        values += [torch.as_tensor(value).clone() for _, value in sorted(updates.optimizer.state[parameter].items())]
    return values


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_update_changes_nothing_and_counts_for_no_gap(name):
    """The projection that was due in it is made in the next one."""
    bad, good = network(), network()
    skipping, plain = updates_of(bad, name), updates_of(good, name)
    for model, updates in ((bad, skipping), (good, plain)):
        train(model, updates, numbers=range(3))
    before = everything(bad, skipping)
    skipping.begin(0.01)
    bad(torch.full((8, 70), torch.nan)).square().sum().backward()
    assert int(skipping.finish(torch.tensor(torch.nan)).skipped) == 6
    assert all(map(torch.equal, before, everything(bad, skipping)))
    for model, updates in ((bad, skipping), (good, plain)):
        train(model, updates, numbers=range(3, 6))
    assert_same(bad, good)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("num_before", [0, 2, 3])
def test_per_layer_only_the_matrix_with_a_bad_gradient_is_skipped(name, num_before):
    """In its first update, between two projections, and where one is due: its count of updates stays behind the others'."""
    model = network()
    updates = updates_of(model, name, per_layer=True)
    train(model, updates, numbers=range(num_before))
    before, bad = everything(model, updates), model[0].weight
    state = {key: torch.as_tensor(value).clone() for key, value in updates.optimizer.state[bad].items()}
    handle = bad.register_hook(lambda gradient: gradient * torch.nan)
    updates.begin(0.01)
    updates.before_backward(True)
    model(torch.ones(8, 70)).square().sum().backward()
    assert int(updates.finish(torch.ones(())).skipped) == 1
    handle.remove()
    assert [torch.equal(*pair) for pair in zip(before, model.parameters(), strict=False)] == [n == 0 for n in range(6)]
    found = updates.optimizer.state[bad]
    assert found.keys() == state.keys()
    assert all(torch.equal(torch.as_tensor(found[key]), value) for key, value in state.items())
    assert found["num_updates"] == num_before == updates.optimizer.state[model[2].weight]["num_updates"] - 1
    train(model, updates, numbers=range(3, 5))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_clipping_is_that_of_the_whole_gradient():
    """Before the projection: a momentum-less step shrinks by the same factor everywhere."""
    free, clipped = network(), network()
    before = [parameter.detach().clone() for parameter in free.parameters()]
    norms = {}
    for model, clipping in ((free, None), (clipped, 0.5)):
        updates = updates_of(model, "sgd", clipping=clipping, decay=0.0)
        updates.begin(0.01)
        model(torch.ones(8, 70)).square().sum().backward()
        norms[clipping] = float(updates.finish(torch.zeros(())).gradnorm)
    assert norms[0.5] == norms[None] > 0.5
    for start, left, right in zip(before, free.parameters(), clipped.parameters(), strict=True):
        moved, wanted = (right - start).detach(), (left - start).detach() * 0.5 / norms[None]
        assert float((moved - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("name", ["adamw", "adam8bit"])
def test_stochastic_rounding_is_right_on_average(name):
    """Updates far below half of a bfloat16's spacing move the weights by their sum; rounded to nearest they are lost."""
    moved = {}
    for rounding in (None, StochasticRounding(0)):
        torch.manual_seed(0)
        matrix = nn.Parameter(torch.ones(256, 64, dtype=torch.bfloat16))
        build = partial(build_galore, name, matrices=("m",), subspace=Subspace(4, scale=1.0), world=World())
        build = partial(build, lr=0.0, weight_decay=0.0, rounding=rounding)
        updates = WholeUpdate(build, {"m": matrix}, World())
        wide = nn.Parameter(torch.ones(256, 64))
        exact = WholeUpdate(partial(build, rounding=None), {"m": wide}, World())
        gradient = torch.randn(256, 4) @ torch.randn(4, 64)
        for updating, parameter in ((updates, matrix), (exact, wide)):
            for _ in range(20):
                updating.begin(1e-4)
                parameter.grad = gradient.to(parameter.dtype)
                updating.finish(torch.zeros(()))
        step, wanted = (matrix.detach().float() - 1).flatten(), (wide.detach() - 1).flatten()
        moved[rounding] = float(step @ wanted / (wanted @ wanted))
    assert moved[None] < 0.1
    assert moved[StochasticRounding(0)] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("per_layer", [False, True])
def test_rounding_is_the_same_per_layer_and_after_a_second_run(per_layer):
    runs = []
    for _ in range(2):
        model = network(torch.bfloat16)
        train(model, updates_of(model, "adam8bit", per_layer=per_layer, rounding=StochasticRounding(1)))
        runs.append(model)
    whole = network(torch.bfloat16)
    train(whole, updates_of(whole, "adam8bit", rounding=StochasticRounding(1)))
    assert_same(*runs)
    assert_same(runs[0], whole)


def test_a_rank_above_the_matrix_is_the_whole_matrix():
    """Every type then steps the full space: with SGD without momentum, the ordinary step times the scale."""
    torch.manual_seed(0)
    for proj_type, shape in itertools.product(PROJ_TYPES, ((12, 9), (9, 12))):
        matrix = nn.Parameter(torch.zeros(shape))
        build = partial(build_galore, "sgd", matrices=("m",), subspace=Subspace(64, proj_type=proj_type), world=World())
        updates = WholeUpdate(partial(build, lr=0.0, weight_decay=0.0), {"m": matrix}, World())
        updates.begin(1.0)
        matrix.grad = gradient = torch.randn(shape)
        updates.finish(torch.zeros(()))
        # A matrix projected on its longer side has only that many directions all the same.
        torch.testing.assert_close(matrix.detach(), -0.25 * gradient)
