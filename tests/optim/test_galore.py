"""GaLore: steps equal to those of galore-torch, and the properties of all other optimizers (exact resume, skipping, ...)."""

import itertools
import json
from functools import partial

import pytest
import torch
from torch import nn

from peft_pretraining.config.arguments import PROJ_TYPES
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.counts import subspace_shapes
from peft_pretraining.optim.build import build_galore
from peft_pretraining.optim.galore import Subspace
from peft_pretraining.optim.slices import StochasticRounding
from peft_pretraining.optim.state import load_optimizer_state, optimizer_state
from peft_pretraining.optim.updates import GrowthLimit, PerLayerUpdate, WholeUpdate

OPTIMIZERS = ["adam", "adamw", "sgd", "adafactor", "adam8bit", "adamw4bit"]
# The projected matrices of `network`: a tall and a wide one. Its last weight is stepped without a projection.
MATRICES = ("0.weight", "2.weight")


def network(dtype=torch.float32) -> nn.Module:
    """Returns a network of tall, wide and small weights, with moments above and below 4,096 elements, the limit of quantising."""
    torch.manual_seed(0)
    layers = (nn.Linear(70, 600), nn.Tanh(), nn.Linear(600, 66), nn.Tanh(), nn.Linear(66, 5))
    return nn.Sequential(*layers).to(dtype)


def updates_of(model, name, *, per_layer=False, growth=None, clipping=None, rounding=None, decay=0.01, **subspace):
    """Returns GaLore updates of `network` by optimizer `name`; default: rank 8 and a new projection every 3 updates."""
    parameters = dict(model.named_parameters())
    chosen = Subspace(**({"rank": 8, "gap": 3} | subspace))
    build = partial(build_galore, name, matrices=MATRICES, subspace=chosen, world=World(), lr=0.0, weight_decay=decay, beta1=0.9)
    build = partial(build, rounding=rounding)
    limit = None if growth is None else GrowthLimit(growth, len(parameters), torch.device("cpu"))
    if per_layer:
        return PerLayerUpdate(build, parameters, World(), growth=limit)
    return WholeUpdate(build, parameters, World(), growth=limit, grad_clipping=clipping)


def updates_of_matrix(matrix, name, subspace, *, decay=0.0, projected=True, plain=None, **options):
    """Returns updates of one matrix, projected or not, and of a parameter `plain` that is never projected."""
    matrices = ("matrix",) if projected else ()
    build = partial(
        build_galore, name, matrices=matrices, subspace=subspace, world=World(), lr=0.0, weight_decay=decay, **options
    )
    return WholeUpdate(build, {"matrix": matrix} | ({} if plain is None else {"plain": plain}), World())


def step(updates, lr, *parameters_and_gradients) -> None:
    """Makes one update with these gradients."""
    updates.begin(lr)
    for parameter, gradient in parameters_and_gradients:
        parameter.grad = gradient.clone()
    updates.finish(torch.zeros(()))


def train(model, updates, accumulation=1, numbers=range(5)):
    """Makes updates; number n has the inputs of seed n, a loss multiplied by (n + 1)^2, and learning rate 0.001 (n + 1)."""
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


def follow(theirs, lr) -> None:
    """Makes one step of galore-torch's optimizer."""
    for group in theirs.param_groups:
        group["lr"] = lr
    theirs.step()


def with_separate_singular_values(shape, diagonal_projection: bool):
    """Returns a gradient with well separated singular values; for `full` projections its singular vectors are unit vectors.

    With a new `full` projection the projected gradient is diagonal. Adam would turn the rounding errors outside the diagonal into
    full-size steps; with unit vectors these errors are exactly 0.
    """
    if not diagonal_projection:
        return 1000 * torch.randn(shape) * torch.linspace(0.5, 2, shape[1])
    gradient = torch.zeros(shape)
    gradient[torch.randperm(24), torch.randperm(24)] = 1000 * torch.linspace(0.5, 2, 24)
    return gradient


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_ten_adamw_steps_equal_those_of_galore_torch(proj_type, shape, decay):
    """With new projections before updates 1, 5 and 9. Gradients have size 1,000, so that epsilon has no effect: galore-torch adds
    it before the bias correction, torch after it."""
    galore_torch = pytest.importorskip("galore_torch", reason="galore-torch is not installed (pip install --no-deps)")
    torch.manual_seed(0)
    ours, reference = (nn.Parameter(torch.randn(shape)) for _ in range(2))
    plain, plain_reference = (nn.Parameter(torch.randn(7)) for _ in range(2))
    reference.data.copy_(ours.data)
    plain_reference.data.copy_(plain.data)
    subspace = Subspace(rank=6, gap=4, scale=0.25, proj_type=proj_type)
    updates = updates_of_matrix(ours, "adamw", subspace, decay=decay, plain=plain)
    projected = {"params": [reference], "rank": 6, "update_proj_gap": 4, "scale": 0.25, "proj_type": proj_type}
    groups = [projected, {"params": [plain_reference]}]
    theirs = galore_torch.GaLoreAdamW(groups, lr=0.0, eps=1e-8, weight_decay=decay, no_deprecation_warning=True)
    start = ours.detach().clone()
    for number in range(10):
        lr = 0.01 * (1 + number)
        gradient = with_separate_singular_values(shape, proj_type == "full" and number % 4 == 0)
        plain_gradient = torch.randn(7)
        step(updates, lr, (ours, gradient), (plain, plain_gradient))
        reference.grad, plain_reference.grad = gradient, plain_gradient
        follow(theirs, lr)
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
        if not decay:  # torch's AdamW, which steps `plain`, decays before the step, galore-torch's after it
            torch.testing.assert_close(plain, plain_reference, rtol=1e-5, atol=1e-5)
    assert float((ours.detach() - start).abs().max()) > 0.02  # far above the tolerance


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("name", ["adafactor", "adam8bit"])
def test_ten_adafactor_and_adam8bit_steps_equal_those_of_galore_torch(name, shape, monkeypatch):
    """With new projections before updates 1, 5 and 9. The projected gradient is large enough for 8-bit moments."""
    galore_torch = pytest.importorskip("galore_torch", reason="galore-torch is not installed (pip install --no-deps)")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # galore-torch waits for a GPU
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    reference = nn.Parameter(ours.detach().clone())
    updates = updates_of_matrix(ours, name, Subspace(48, gap=4))
    groups = [{"params": [reference], "rank": 48, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}]
    if name == "adafactor":
        theirs = galore_torch.GaLoreAdafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)
    else:
        theirs = galore_torch.GaLoreAdamW8bit(groups, lr=1e-3, weight_decay=0.0)
    start = ours.detach().clone()
    for number in range(10):
        gradient = torch.randn(shape) * torch.linspace(0.5, 2, shape[1])
        step(updates, 0.01 * (1 + number), (ours, gradient))
        reference.grad = gradient
        follow(theirs, 0.01 * (1 + number))
    moved, expected = ours.detach() - start, reference.detach() - start
    assert float((moved - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adam"])
def test_weight_decay_equals_that_of_the_optimizer_without_a_projection(name, dtype):
    """With a zero gradient the step is only the decay; the subspace is the whole space."""
    ends = []
    for projected in (True, False):
        matrix = nn.Parameter(torch.full((8, 8), 1.5, dtype=dtype))
        updates = updates_of_matrix(matrix, name, Subspace(8, scale=1.0), decay=0.5, projected=projected)
        step(updates, 0.1, (matrix, torch.zeros_like(matrix)))
        ends.append(matrix.detach().float())
    torch.testing.assert_close(*ends, rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=0)
    assert float(ends[0].mean()) == pytest.approx(1.5 * 0.95, rel=2**-8)


def test_a_small_decay_of_bfloat16_weights_is_rounded_together_with_the_step():
    """Rounded separately, a decay below half of bfloat16's spacing would be lost."""
    torch.manual_seed(0)
    start, gradient = torch.randn(256, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    ends = {}
    for decay in (0.0, 0.01):
        matrix = nn.Parameter(start.clone())
        step(updates_of_matrix(matrix, "adamw", Subspace(8), decay=decay), 0.1, (matrix, gradient))
        ends[decay] = matrix.detach().double()
    shrunk = ((ends[0.01] - ends[0.0]) * ends[0.0]).sum() / ends[0.0].square().sum()
    assert float(shrunk) == pytest.approx(-0.1 * 0.01, rel=0.1)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_the_projection_is_the_best_one_of_its_rank(proj_type, shape):
    """The part of the gradient outside the subspace has the norm of the smaller singular values (Eckart-Young)."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(shape))
    updates = updates_of_matrix(matrix, "sgd", Subspace(rank=5, proj_type=proj_type, scale=0.25))
    gradient = torch.randn(shape)
    step(updates, 1.0, (matrix, gradient))
    outside = torch.linalg.matrix_norm(gradient + matrix.detach() / 0.25)
    torch.testing.assert_close(outside, torch.linalg.svdvals(gradient)[5:].square().sum().sqrt())
    shapes = subspace_shapes(shape, 5, proj_type)
    stored = {key: tuple(v.shape) for key, v in updates.optimizer.state[matrix].items() if torch.is_tensor(v)}
    expected = {"projection_left": shapes.left, "projection_right": shapes.right}
    assert stored == {key: shape for key, shape in expected.items() if shape}


@pytest.mark.parametrize("growth", [None, 1.01])
@pytest.mark.parametrize(("name", "accumulation"), list(itertools.product(OPTIMIZERS, [1, 4])))
def test_updates_per_layer_are_bit_identical_to_whole_ones(name, accumulation, growth):
    """Including a new projection, which is computed from the gradient of all micro-batches."""
    whole, layered = network(), network()
    train(whole, updates_of(whole, name, growth=growth), accumulation)
    train(layered, updates_of(layered, name, growth=growth, per_layer=True), accumulation)
    assert_same(whole, layered)


def test_the_projection_is_made_from_the_gradient_of_all_micro_batches():
    """The first or last micro-batch alone would give another projection."""
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
def test_resuming_between_two_projections_is_bit_identical(name, dtype, per_layer, proj_type):
    """Saved after 4 updates with a projection every 3, and compared after 4 more, which include the next projection."""
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
    """Returns copies of all parameters and of the optimizer's whole state."""
    values = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        values += [torch.as_tensor(value).clone() for _, value in sorted(updates.optimizer.state[parameter].items())]
    return values


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_update_changes_nothing_and_counts_for_no_gap(name):
    """A projection that was due in the skipped update is made in the next one."""
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
def test_updates_per_layer_skip_only_the_matrix_with_a_non_finite_gradient(name, num_before):
    """In the first update, between two projections, and when one is due. The matrix then counts one update less."""
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


def test_clipping_scales_the_whole_gradient_before_the_projection():
    """With SGD without momentum all steps shrink by the same factor."""
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
def test_galores_stochastic_rounding_is_unbiased(name):
    """Steps far below half of bfloat16's spacing add up; rounded to nearest they are lost."""
    moved = {}
    for rounding in (None, StochasticRounding(0)):
        torch.manual_seed(0)
        narrow, wide = (nn.Parameter(torch.ones(256, 64, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
        subspace = Subspace(4, scale=1.0)
        updates = updates_of_matrix(narrow, name, subspace, rounding=rounding), updates_of_matrix(wide, name, subspace)
        gradient = torch.randn(256, 4) @ torch.randn(4, 64)
        for updating, matrix in zip(updates, (narrow, wide), strict=True):
            for _ in range(20):
                step(updating, 1e-4, (matrix, gradient.to(matrix.dtype)))
        found, expected = (narrow.detach().float() - 1).flatten(), (wide.detach() - 1).flatten()
        moved[rounding] = float(found @ expected / (expected @ expected))
    assert moved[None] < 0.1
    assert moved[StochasticRounding(0)] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("per_layer", [False, True])
def test_galores_stochastic_rounding_is_the_same_in_a_second_run_and_per_layer(per_layer):
    runs = []
    for _ in range(2):
        model = network(torch.bfloat16)
        train(model, updates_of(model, "adam8bit", per_layer=per_layer, rounding=StochasticRounding(1)))
        runs.append(model)
    whole = network(torch.bfloat16)
    train(whole, updates_of(whole, "adam8bit", rounding=StochasticRounding(1)))
    assert_same(*runs)
    assert_same(runs[0], whole)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_a_rank_above_the_matrix_size_steps_the_whole_space(proj_type, shape):
    """With SGD without momentum the step is the ordinary one times the scale, also for a projection of the longer side, whose
    subspace has only as many directions as the shorter side."""
    torch.manual_seed(0)
    matrix, gradient = nn.Parameter(torch.zeros(shape)), torch.randn(shape)
    step(updates_of_matrix(matrix, "sgd", Subspace(64, proj_type=proj_type, scale=0.25)), 1.0, (matrix, gradient))
    torch.testing.assert_close(matrix.detach(), -0.25 * gradient)
