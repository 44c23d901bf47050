"""Muon, Spectron and Stable-SPAM step as their formulas say, computed here in float64 or by torch's own Muon."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pretraining.distributed.world import World
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.conditioning import Conditioned
from peft_pretraining.optim.orthogonal import orthogonalised, pairs_of_factors, scale_of_shape
from peft_pretraining.optim.state import reset_moments_
from peft_pretraining.optim.updates import GrowthLimit, PerLayerUpdate, WholeUpdate

SHAPES = {"a_proj.weight": (24, 24), "b_proj.weight": (16, 40), "c_proj.weight": (40, 16)}
RANK = 6


def matrices(dtype=torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def factors(dtype=torch.float32) -> dict[str, nn.Parameter]:
    """Two linears' factors, B = 0 in one of them as at the start of a run, a sparse part and a norm."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x.lora_A": (RANK, 20), "x.lora_B": (30, RANK), "y.lora_A": (RANK, 12), "y.lora_B": (10, RANK)}
    values = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    values["x.lora_B"].zero_()
    values |= {"x.sparse_value": torch.randn(7, generator=generator), "norm.weight": torch.ones(20)}
    return {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}


def gradients(parameters: dict[str, nn.Parameter], update: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + update)
    return {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in parameters.items()}


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration in float64, written on singular values: each becomes a s + b s^3 + c s^5, five times."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm().clamp(min=1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5), (1, 7)])
def test_singular_values_become_about_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalised(matrix)
    torch.testing.assert_close(result.double(), newton_schulz(matrix), rtol=1e-4, atol=1e-5)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.3
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_in_bfloat16_equals_torchs_bit_for_bit(weight_decay):
    ours, theirs = matrices(torch.bfloat16), matrices(torch.bfloat16)
    optimizer = build_optimizer("muon", ours, lr=0.01, weight_decay=weight_decay)
    reference = torch.optim.Muon(
        list(theirs.values()), lr=0.01, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for update in range(5):
        for name, gradient in gradients(ours, update).items():
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (update, name)


def test_muon_in_float32_follows_its_formula():
    parameters = matrices()
    exact = {name: p.detach().double() for name, p in parameters.items()}
    momenta = {name: torch.zeros_like(value) for name, value in exact.items()}
    optimizer = build_optimizer("muon", parameters, lr=0.02, weight_decay=0.1)
    for update in range(5):
        for name, gradient in gradients(parameters, update).items():
            parameters[name].grad = gradient.clone()
            momenta[name] = 0.95 * momenta[name] + 0.05 * gradient.double()
            direction = newton_schulz(0.95 * momenta[name] + 0.05 * gradient.double())
            rate = 0.02 * 0.2 * math.sqrt(max(SHAPES[name]))
            exact[name] = (1 - 0.02 * 0.1) * exact[name] - rate * direction
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach().double(), exact[name], rtol=1e-4, atol=1e-5)


def adamw(value, gradient, moments, update, lr, weight_decay=0.0, beta1=0.9):
    """AdamW in float64; moments: [first, second], changed in place. update counts from 1."""
    moments[0] = beta1 * moments[0] + (1 - beta1) * gradient
    moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
    root = (moments[1] / (1 - 0.999**update)).sqrt() + 1e-8
    return (1 - lr * weight_decay) * value - lr * moments[0] / (1 - beta1**update) / root


def exact_norm(matrix, vectors, name):
    """The largest singular value by one power step per call, as kept from call to call."""
    vector = vectors.get(name)
    vector = torch.full((len(matrix),), len(matrix) ** -0.5, dtype=torch.float64) if vector is None else vector
    columns = matrix.T @ vector
    columns = columns / columns.norm().clamp(min=1e-7)
    rows = matrix @ columns
    if rows.norm() > 1e-7:
        vectors[name] = rows / rows.norm()
    return rows.norm()


@pytest.mark.parametrize("per_layer", [False, True])
def test_spectron_follows_its_formula(per_layer):
    """Pairs together, AdamW for sparse values and norms; per layer a pair waits for its second gradient."""
    parameters, scale, lr = factors(), 2.0, 0.03
    exact = {name: p.detach().double() for name, p in parameters.items()}
    momenta = {name: torch.zeros_like(value) for name, value in exact.items()}
    moments = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in exact.items()}
    vectors: dict[str, torch.Tensor] = {}
    build = partial(build_optimizer, "spectron", lr=0.0, weight_decay=0.01, factor_scale=scale)
    joint = {"joint": pairs_of_factors(parameters)} if per_layer else {}
    updates = (PerLayerUpdate if per_layer else WholeUpdate)(build, parameters, World(), **joint)
    for update in range(1, 6):
        found = gradients(parameters, update)
        updates.begin(lr)
        updates.before_backward(last=True)
        sum((parameters[name] * gradient).sum() for name, gradient in found.items()).backward()
        updates.finish(torch.zeros(()))
        for linear in ("x", "y"):
            pair = [f"{linear}.lora_A", f"{linear}.lora_B"]
            for name in pair:
                momenta[name] = 0.95 * momenta[name] + 0.05 * found[name].double()
            norms = sum(exact_norm(exact[name], vectors, name) for name in pair)
            largest = lr * scale_of_shape((len(exact[pair[1]]), exact[pair[0]].shape[1]))
            for name in pair:
                step = largest / (scale * (norms + 1)) * newton_schulz(momenta[name])
                exact[name] = (1 - lr * 0.01) * exact[name] - step
        for name in ("x.sparse_value", "norm.weight"):
            exact[name] = adamw(exact[name], found[name].double(), moments[name], update, lr, 0.01)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach().double(), exact[name], rtol=1e-4, atol=1e-5)
            assert parameter.grad is None


def test_spectrons_step_limits_the_change_of_the_product():
    """Spectral norm of the change of s B A against eta; Newton-Schulz' singular values reach 1.2, and one power step is late."""
    parameters, scale, lr = factors(), 2.0, 0.01
    optimizer = build_optimizer("spectron", parameters, lr=lr, weight_decay=0.0, factor_scale=scale)
    for update in range(20):
        before = {linear: scale * parameters[f"{linear}.lora_B"] @ parameters[f"{linear}.lora_A"] for linear in ("x", "y")}
        for name, gradient in gradients(parameters, update % 3).items():
            parameters[name].grad = gradient
        optimizer.step()
        for linear, product in before.items():
            lora_A, lora_B = parameters[f"{linear}.lora_A"], parameters[f"{linear}.lora_B"]
            change = torch.linalg.matrix_norm(scale * lora_B @ lora_A - product, ord=2)
            limit = lr * scale_of_shape((len(lora_B), lora_A.shape[1]))
            assert change.item() <= (1.3 if update > 2 else 2.0) * limit, (update, linear)
    assert change.item() > 0.1 * limit


def pair_updates(parameters, growth=None):
    build = partial(build_optimizer, "spectron", lr=0.0, weight_decay=0.0)
    return PerLayerUpdate(build, parameters, World(), growth=growth, joint=pairs_of_factors(parameters))


def update_with(updates, parameters, found):
    """One update in which the parameters named in `found` get these gradients."""
    updates.begin(0.1)
    updates.before_backward(last=True)
    sum((parameters[name] * gradient).sum() for name, gradient in found.items()).backward()
    return updates.finish(torch.zeros(()))


def state_of(updates, parameter):
    return {name: copy.deepcopy(value) for name, value in updates.optimizer.state[parameter].items()}


@pytest.mark.parametrize("factor", ["x.lora_A", "x.lora_B"])
def test_a_pair_with_one_non_finite_gradient_keeps_its_weights_states_and_limits(factor):
    """Whichever of the two gradients is complete first. All other parameters are stepped."""
    parameters = factors()
    updates = pair_updates(parameters, GrowthLimit(1.5, len(parameters), torch.device("cpu")))
    update_with(updates, parameters, gradients(parameters, 0))
    before = {name: (p.detach().clone(), state_of(updates, p)) for name, p in parameters.items()}
    limits = dict(zip(parameters, updates.growth.previous.tolist(), strict=True))
    found = {name: 1.2 * gradient for name, gradient in gradients(parameters, 0).items()}
    found[factor][0, 0] = torch.nan
    assert float(update_with(updates, parameters, found).skipped) == 2
    for number, (name, parameter) in enumerate(parameters.items()):
        weights, states = before[name]
        now = state_of(updates, parameter)
        same_states = all(torch.equal(torch.as_tensor(now[key]), torch.as_tensor(states[key])) for key in now)
        same_limit = float(updates.growth.previous[number]) == limits[name]
        unchanged = [torch.equal(parameter, weights), same_states, same_limit]
        assert unchanged == [name in ("x.lora_A", "x.lora_B")] * 3, name


def test_a_pair_of_which_one_has_no_gradient_is_not_stepped_and_keeps_no_gradient():
    parameters = factors()
    before = parameters["x.lora_A"].detach().clone()
    updates = pair_updates(parameters, GrowthLimit(1.5, len(parameters), torch.device("cpu")))
    update_with(updates, parameters, {"x.lora_A": torch.ones_like(before)})
    assert torch.equal(parameters["x.lora_A"], before)
    assert parameters["x.lora_A"].grad is None
    assert not updates.growth.previous.any()


def conditioned(gradient, averages, number):
    """A gradient behind Stable-SPAM's conditioning, in float64. averages: three numbers, changed in place; number: from 1."""
    averages[0] = 0.999 * averages[0] + 0.001 * float(gradient.abs().max())
    limit = averages[0] / (1 - 0.999**number)
    clipped = torch.where(gradient.abs() > limit, gradient * limit / gradient.abs().max(), gradient)
    norm = float(clipped.norm())
    averages[1:] = 0.7 * averages[1] + 0.3 * norm, 0.9 * averages[2] + 0.1 * norm**2
    size = averages[1] / (1 - 0.7**number) / (math.sqrt(averages[2] / (1 - 0.9**number)) + 1e-8)
    return clipped * size / norm


def test_stable_spam_follows_its_formula_through_a_reset():
    parameters = {"a_proj.weight": nn.Parameter(torch.ones(6, 5)), "norm.weight": nn.Parameter(torch.ones(5))}
    exact = {name: p.detach().double() for name, p in parameters.items()}
    moments = {name: [torch.zeros_like(v), torch.zeros_like(v)] for name, v in exact.items()}
    averages = {name: [0.0, 0.0, 0.0] for name in exact}
    build = partial(build_optimizer, "stable_spam", lr=0.0, weight_decay=0.1)
    updates = WholeUpdate(build, parameters, World())
    lr, num_updates, reset_after = 0.02, 12, 7
    for update in range(1, num_updates + 1):
        progress = (update - 1) / num_updates
        updates.begin(lr, progress)
        found = gradients(parameters, update)
        if update == 5:
            # A spike: above the running maximum.
            found["a_proj.weight"][0, 0] = 50.0
        if update == reset_after + 1:
            for state in updates.optimizer.state.values():
                reset_moments_(state)
            moments = {name: [torch.zeros_like(v), torch.zeros_like(v)] for name, v in exact.items()}
        for name, parameter in parameters.items():
            parameter.grad = found[name].clone()
            gradient = conditioned(found[name].double(), averages[name], update)
            beta1 = 0.9 * (0.5 + 0.25 * (1 + math.cos(math.pi * progress)))
            number = update if update <= reset_after else update - reset_after
            exact[name] = adamw(exact[name], gradient, moments[name], number, lr, 0.1, beta1)
        updates.finish(torch.zeros(()))
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach().double(), exact[name], rtol=2e-5, atol=1e-6)


def test_the_reference_of_conditioning_clips_a_spike():
    averages, spike = [0.0, 0.0, 0.0], torch.ones(4, dtype=torch.float64)
    assert conditioned(spike.clone(), averages, 1).tolist() == pytest.approx([0.5] * 4)
    spike[0] = 50.0
    # The largest entry's running mean is (.999 * .001 + .001 * 50) / (1 - .999^2) = 25.51.
    result = conditioned(spike, averages, 2)
    assert float(result[0] / result[1]) == pytest.approx(25.51, abs=0.01)


ADAMS_PART = {"model.embed_tokens.weight": (40, 6), "lm_head.weight": (40, 6), "norm.weight": (6,)}


def conditioned_run(kind, *, per_layer=False, growth=None, flag=True, large=False):
    """Parameters and updates of `kind`, with the flag or without; large: embedding and head have quantised moments."""
    parameters = matrices() if kind.startswith("muon") else factors()
    shapes = {name: (800, *shape[1:]) if large and len(shape) > 1 else shape for name, shape in ADAMS_PART.items()}
    parameters |= {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    build = partial(build_optimizer, kind, lr=0.0, weight_decay=0.1, condition_gradients=flag)
    joint = pairs_of_factors(parameters) if kind.startswith("spectron") else ()
    limit = None if growth is None else GrowthLimit(growth, len(parameters), torch.device("cpu"))
    if per_layer:
        return parameters, PerLayerUpdate(build, parameters, World(), growth=limit, joint=joint)
    return parameters, WholeUpdate(build, parameters, World(), growth=limit)


def make_update(parameters, updates, found, lr, progress=0.0):
    """One update of two micro-batches, whose gradients' sum is `found`."""
    updates.begin(lr, progress)
    for share, last in ((0.25, False), (0.75, True)):
        updates.before_backward(last=last)
        sum((p * share * found[name]).sum() for name, p in parameters.items()).backward()
    return updates.finish(torch.zeros(()))


@pytest.mark.parametrize("growth", [None, 1.01])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("kind", ["muon", "spectron"])
def test_conditioning_is_in_front_of_adamw_and_of_nothing_else(kind, per_layer, growth):
    """Its formula in float64, through accumulation, a spike, an update without a finite gradient, and a reset of all moments."""
    parameters, updates = conditioned_run(kind, per_layer=per_layer, growth=growth)
    plain, plain_updates = conditioned_run(kind, per_layer=per_layer, growth=growth, flag=False)
    others = [name for name in parameters if name in ADAMS_PART or "sparse" in name]
    exact = {name: parameters[name].detach().double() for name in others}
    moments, averages = {name: [0.0, 0.0] for name in others}, {name: [0.0, 0.0, 0.0] for name in others}
    steps, previous = 0, dict.fromkeys(others, math.inf)
    for update in range(1, 11):
        found = gradients(parameters, update)
        found["lm_head.weight"][0, 0] *= 50 if update == 5 else 1
        if update == 4:
            for gradient in found.values():
                gradient.view(-1)[0] = torch.nan
        if update == 8:
            steps, moments = 0, {name: [0.0, 0.0] for name in others}
            for state in (*updates.optimizer.state.values(), *plain_updates.optimizer.state.values()):
                reset_moments_(state)
        skipped = make_update(parameters, updates, found, 0.02, update / 10).skipped
        make_update(plain, plain_updates, found, 0.02, update / 10)
        assert int(skipped) == (len(parameters) if update == 4 else 0)
        steps += update != 4
        for name in others if update != 4 else ():
            gradient = found[name].double()
            if growth is not None:
                gradient *= min(1.0, growth * previous[name] / float(gradient.norm()))
                previous[name] = float(gradient.norm())
            gradient = conditioned(gradient, averages[name], update - (update > 4))
            exact[name] = adamw(exact[name], gradient, moments[name], steps, 0.02, 0.1)
        for name, parameter in parameters.items():
            if name in others:
                torch.testing.assert_close(parameter.detach().double(), exact[name], rtol=2e-5, atol=1e-6)
                assert update < 3 or not torch.equal(parameter, plain[name]), name
            else:
                assert torch.equal(parameter, plain[name]), name


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("kind", ["muon8bit", "muon4bit", "spectron8bit", "spectron4bit"])
def test_low_bit_kinds_step_the_conditioned_gradients(kind, per_layer):
    """As without the flag by gradients that were conditioned in float64, with quantised moments of embedding and head."""
    parameters, updates = conditioned_run(kind, per_layer=per_layer, large=True)
    plain, plain_updates = conditioned_run(kind, per_layer=per_layer, large=True, flag=False)
    averages = {name: [0.0, 0.0, 0.0] for name in parameters}
    for update in range(1, 5):
        found = gradients(parameters, update)
        others = [name for name in parameters if name in ADAMS_PART or "sparse" in name]
        ready = {name: conditioned(found[name].double(), averages[name], update).float() for name in others}
        make_update(parameters, updates, found, 0.02)
        make_update(plain, plain_updates, found | ready, 0.02)
    moments = updates.optimizer.state[parameters["lm_head.weight"]].values()
    assert any(value.dtype == torch.uint8 for value in moments if isinstance(value, torch.Tensor))
    for name, parameter in parameters.items():
        if name in others:
            # A code may be the next one where a gradient differs in its last digit.
            assert float((parameter - plain[name]).detach().norm() / (plain[name] - 1).detach().norm()) < 1e-3, name
        else:
            assert torch.equal(parameter, plain[name]), name


def test_a_conditioned_gradient_is_not_taken_in_slices():
    """Per-layer updates ask an optimizer that steps slices for them; conditioning needs the norm of the whole."""
    for flag in (False, True):
        parameters = {"lm_head.weight": nn.Parameter(torch.ones(800, 6))}
        build = partial(build_optimizer, "muon8bit", lr=0.0, weight_decay=0.0, condition_gradients=flag)
        PerLayerUpdate(build, parameters, World(), by_rows=list(parameters))
        assert hasattr(parameters["lm_head.weight"], "take_rows") != flag


@pytest.mark.parametrize("name", ["muon8bit", "spectron8bit"])
def test_eight_bit_momentum_is_near_the_plain_one(name):
    """Large enough to be quantised; the direction of the step differs by the quantisation's rounding."""
    ends = []
    for kind in (name.removesuffix("8bit"), name):
        shapes = {"x.lora_A": (64, 96), "x.lora_B": (80, 64)}
        parameters = {key: nn.Parameter(torch.zeros(shape)) for key, shape in shapes.items()}
        optimizer = build_optimizer(kind, parameters, lr=0.01, weight_decay=0.0)
        for update in range(4):
            for key, gradient in gradients(parameters, update).items():
                parameters[key].grad = gradient
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in parameters.values()]))
    assert not torch.equal(*ends)
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 0.05


def test_stable_spam_makes_no_temporary_of_a_gradients_size(monkeypatch):
    parameter = nn.Parameter(torch.ones(16, 4))
    optimizer = Conditioned(torch.optim.SGD([parameter], lr=0.0))
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.untyped_storage().data_ptr() != gradient.untyped_storage().data_ptr()
                ):
                    made.append(tensor.numel())
            return result

    ends = []
    for slice_elements in (1000, 8):
        monkeypatch.setattr("peft_pretraining.optim.conditioning.SLICE_ELEMENTS", slice_elements)
        gradient = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
        made.clear()
        with torch.no_grad(), Watch():
            optimizer._condition_(gradient, {"conditioning": torch.full((3,), 0.001), "num_conditioned": 5})
        ends.append((gradient, max(made)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert [size for _, size in ends] == [64, 8]
