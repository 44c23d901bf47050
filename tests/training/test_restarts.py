"""ReLoRA's merges and factor restarts leave the network's function unchanged and change moments as requested."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.model_config import ModelConfig, load_model_config
from peft_pretraining.distributed.world import World
from peft_pretraining.methods import METHODS
from peft_pretraining.methods.method import Method, Restart
from peft_pretraining.methods.relora import moments_at_a_merge
from peft_pretraining.model.llama import balanced, best_low_rank, build_model, start_from_svd
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.slices import StochasticRounding
from peft_pretraining.optim.state import Pruning, reset_descriptions_, reset_moments_
from peft_pretraining.optim.updates import GrowthLimit, PerLayerUpdate, WholeUpdate
from peft_pretraining.plan.schedule import after_restart
from peft_pretraining.training.restarts import Restarts
from sparse_lora import ReLoRALinear, SparseLowRankLinear, attach_relora, generator_for, merge

OPTIMIZERS = ["adam", "adamw", "sgd", "adafactor", "adam8bit", "adamw4bit"]
FACTORS = ("lora_A", "lora_B", "scaling")


def config() -> ModelConfig:
    small = {"vocab_size": 120, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
    return replace(load_model_config("configs/llama_9m.json"), **small, num_attention_heads=4, num_key_value_heads=2)


def arguments(**values) -> Arguments:
    return Arguments(**({"rank": 48, "sp_ratio": 0.1, "lora_alpha": 8.0, "seed": 3} | values))


def build(args: Arguments, dtype=torch.float32):
    method = METHODS[args.peft_model].apply
    return build_model(config(), dtype=dtype, device="cpu", seed=args.seed, reparameterize=lambda m: method(m, args))


def updates_of(model, optimizer="adamw", *, per_layer=False, growth=False, rounding=None):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    make = partial(build_optimizer, optimizer, lr=0.0, weight_decay=0.0, beta1=0.9, rounding=rounding)
    limit = GrowthLimit(1.01, len(parameters), torch.device("cpu")) if growth else None
    return (PerLayerUpdate if per_layer else WholeUpdate)(make, parameters, World(), growth=limit)


def train(model, updates, numbers=range(3), lr=0.01):
    for number in numbers:
        ids = torch.randint(0, 120, (2, 12), generator=torch.Generator().manual_seed(number))
        updates.begin(lr)
        updates.before_backward(True)
        model(input_ids=ids, labels=ids).loss.backward()
        updates.finish(torch.zeros(()))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(0, 120, (4, 16), generator=torch.Generator().manual_seed(99))
    return model(input_ids=ids).logits.float()


def assert_same_function(before: torch.Tensor, after: torch.Tensor) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("train_scaling", [False, True])
def test_a_merge_leaves_the_function_and_draws_new_factors(train_scaling):
    args = arguments(peft_model="relora", relora=3, train_scaling=train_scaling)
    model = build(args)
    updates = updates_of(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, updates)
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, start["model.layers.0.mlp.up_proj.weight"])  # frozen
    assert float(layer.lora_B.detach().abs().max()) > 0.01
    before = logits(model)
    assert Restarts(args, model, updates, World()).before_update(3)
    assert_same_function(before, logits(model))
    for name, layer in model.named_modules():
        if isinstance(layer, ReLoRALinear):
            assert not layer.lora_B.any()
            assert not torch.equal(layer.weight, start[f"{name}.weight"])
            assert not torch.equal(layer.lora_A, start[f"{name}.lora_A"])
            # Same distribution as the first factor: uniform up to 1 / sqrt(in).
            bound = 1 / math.sqrt(layer.in_features)
            assert 0.97 * bound < float(layer.lora_A.detach().abs().max()) <= bound
            assert layer.scaling is None or layer.scaling.item() == 1.0


def test_each_merge_draws_its_own_factors_independently_of_earlier_merges():
    """Factors depend only on the seed, the parameter's name and the number of the merge, not on earlier merges."""
    found = []
    for numbers, seed in (((1, 2), 3), ((2,), 3), ((2,), 4)):
        args = arguments(peft_model="relora", relora=5, seed=seed)
        model = build(args)
        restarts = Restarts(args, model, updates_of(model), World())
        drawn = [model.model.layers[1].mlp.down_proj.lora_A.detach().clone()]
        for number in numbers:
            assert restarts.before_update(5 * number)
            drawn.append(model.model.layers[1].mlp.down_proj.lora_A.detach().clone())
        found.append(drawn)
    assert torch.equal(found[0][-1], found[1][-1])
    assert not torch.equal(found[1][-1], found[2][-1])
    for one, other in itertools.combinations(found[0], 2):
        assert not torch.equal(one, other)


def test_restarts_happen_before_the_update_that_follows_a_multiple_of_the_interval():
    args = arguments(peft_model="relora", relora=4)
    model = build(args)
    restarts = Restarts(args, model, updates_of(model), World())
    assert [step for step in range(14) if restarts.before_update(step)] == [4, 8, 12]
    for other in (arguments(peft_model="full", restart_every=4), arguments(peft_model="sltrain")):
        assert not Restarts(other, build(other), updates_of(build(other)), World()).before_update(4)


def test_a_method_can_define_its_own_restart_action(monkeypatch):
    """Its action gets the model and the restart's number and returns names, whose moments are zeroed; other moments stay."""
    name, calls = "model.layers.0.mlp.up_proj.weight", []

    class Acting(Method):
        def restart(self, args):
            return Restart(3, "restart_every", act=self.act)

        def act(self, model, number, world):
            calls.append((model, number, world.size))
            return [name]

    monkeypatch.setitem(METHODS, "full", Acting())
    args = arguments(peft_model="full")
    model = build(args)
    updates = updates_of(model)
    train(model, updates)
    restarts = Restarts(args, model, updates, World())
    assert [step for step in range(7) if restarts.before_update(step)] == [3, 6]
    assert calls == [(model, 1, 1), (model, 2, 1)]
    moments = {own: updates.optimizer.state[stepped]["exp_avg"] for own, stepped in updates.stepped.items()}
    assert [own for own, moment in moments.items() if not moment.any()] == [name]


def test_merging_twice_equals_merging_once():
    """A run resumed from a checkpoint between restart and update performs the restart again."""
    args = arguments(peft_model="relora", relora=3)
    model = build(args)
    updates = updates_of(model)
    train(model, updates)
    restarts = Restarts(args, model, updates, World())
    states = []
    for _ in range(2):
        restarts.before_update(3)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_bfloat16_merge_rounds_once_and_stochastically_if_asked():
    """Most of the change is below half of bfloat16's spacing: rounding to nearest loses it, stochastic rounding is unbiased."""
    torch.manual_seed(0)
    found = {}
    for rounding in (False, True):
        args = arguments(peft_model="relora", relora=1, stochastic_rounding=rounding)
        model = build(args, torch.bfloat16)
        layer = model.model.layers[0].mlp.up_proj
        with torch.no_grad():
            layer.lora_B.normal_(0, 1e-4)
        before = layer.weight.double()
        change = (layer.effective_scaling() * layer.lora_B.double() @ layer.lora_A.double()).detach()
        Restarts(args, model, updates_of(model), World()).before_update(1)
        found[rounding] = (layer.weight.double() - before, change)
    for error, change in found.values():
        assert float((error - change).abs().max()) < 2**-8 * 0.1  # one spacing, for weights below 0.1
    nearest, random = ((moved.flatten() @ change.flatten() / change.norm() ** 2).item() for moved, change in found.values())
    assert nearest < 0.5
    assert random == pytest.approx(1.0, abs=0.4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("per_layer", [False, True])
def test_reset_moments_equal_those_of_a_new_optimizer(optimizer, per_layer):
    """After a reset the next step is bit-identical to that of a new optimizer; other moments stay."""
    args = arguments(peft_model="relora", relora=3, optimizer=optimizer)
    model = build(args)
    updates = updates_of(model, optimizer, per_layer=per_layer, growth=True)
    train(model, updates)
    kept = "model.layers.0.input_layernorm.weight"
    state = updates.optimizer.state[updates.stepped[kept]]
    before = {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    steps = state.get("step")
    Restarts(args, model, updates, World()).before_update(3)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert state.get("step") == steps
    limits = dict(zip(updates.stepped, updates.growth.previous.tolist(), strict=True))
    assert all((limit == 0) == name.endswith(FACTORS) for name, limit in limits.items())

    fresh = build(args)
    fresh.load_state_dict(model.state_dict())
    others = updates_of(fresh, optimizer, per_layer=per_layer)
    updates.growth = None
    train(model, updates, numbers=[7])
    train(fresh, others, numbers=[7])
    ours, theirs = dict(model.named_parameters()), dict(fresh.named_parameters())
    for name in ours:
        if name.endswith(FACTORS):
            assert torch.equal(ours[name], theirs[name]), name
    if optimizer != "adafactor":  # its first steps have a fixed size
        assert not torch.equal(ours[kept], theirs[kept])


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_moments_are_pruned_to_the_requested_share(kind, optimizer):
    args = arguments(peft_model="relora", relora=3, optimizer=optimizer, **{f"optimizer_{kind}_pruning": 0.75})
    found = []
    for _ in range(2):
        model = build(args)
        updates = updates_of(model, optimizer)
        train(model, updates)
        before = {
            (name, key): value.clone()
            for name, stepped in updates.stepped.items()
            for key, value in updates.optimizer.state[stepped].items()
            if value.dim()
        }
        Restarts(args, model, updates, World()).before_update(3)
        found.append({(name, key): updates.optimizer.state[updates.stepped[name]][key].clone() for name, key in before})
    for (name, key), old in before.items():
        new = found[0][name, key]
        assert torch.equal(new, found[1][name, key])  # deterministic
        if not name.endswith(FACTORS):
            assert torch.equal(new, old)
            continue
        kept = new != 0
        assert torch.equal(new[kept], old[kept])
        assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.02)
        if kind == "magnitude":
            assert float(new[kept].abs().min()) >= float(old[~kept].abs().max())
    steps = [state["step"] for state in updates.optimizer.state.values() if "step" in state]
    assert all(float(step) == 3 for step in steps)


def test_the_flags_choose_what_a_merge_does_to_moments():
    assert moments_at_a_merge(arguments()) == ("zero", 1.0)
    assert moments_at_a_merge(arguments(reset_optimizer_on_relora=True)) == ("zero", 1.0)
    assert moments_at_a_merge(arguments(reset_optimizer_on_relora=False)) == ("keep", 0.0)
    assert moments_at_a_merge(arguments(optimizer_random_pruning=0.9)) == ("random", 0.9)
    assert moments_at_a_merge(arguments(reset_optimizer_on_relora=False, optimizer_magnitude_pruning=0.9))[0] == "magnitude"


@pytest.mark.parametrize("choice", [{"reset_optimizer_on_relora": False}, {"optimizer_random_pruning": 0.5}])
@pytest.mark.parametrize("optimizer", ["adamw", "spectron", "stable_spam"])
def test_a_merge_forgets_what_describes_the_old_factors_whatever_happens_to_their_moments(optimizer, choice):
    """The growth limit, Spectron's vectors and Stable-SPAM's averages: the new factors have gradients of another magnitude."""
    if optimizer != "adamw" and "optimizer_random_pruning" in choice:
        pytest.skip("pruning is refused for this optimizer")
    args = arguments(peft_model="relora", relora=3, optimizer=optimizer, **choice)
    model = build(args)
    updates = updates_of(model, optimizer, growth=True)
    train(model, updates)
    assert updates.growth.previous.all()
    Restarts(args, model, updates, World()).before_update(3)
    limits = dict(zip(updates.stepped, updates.growth.previous.tolist(), strict=True))
    assert all((limit == 0) == name.endswith(("lora_A", "lora_B")) for name, limit in limits.items())
    described = 0
    for name, parameter in updates.stepped.items():
        for key, value in updates.optimizer.state[parameter].items():
            if key.startswith(("power_vector", "conditioning", "num_conditioned")):
                described += name.endswith("lora_A")
                assert bool(torch.as_tensor(value).any()) != name.endswith(("lora_A", "lora_B")), (name, key)
    assert bool(described) == (optimizer != "adamw")


def test_moments_are_kept_if_asked():
    args = arguments(peft_model="relora", relora=3, reset_optimizer_on_relora=False)
    model = build(args)
    updates = updates_of(model)
    train(model, updates)
    states = [updates.optimizer.state[p]["exp_avg"] for p in updates.stepped.values()]
    before = [state.clone() for state in states]
    Restarts(args, model, updates, World()).before_update(3)
    assert all(map(torch.equal, before, states))


def test_each_merge_has_its_own_random_pruning_and_rounding():
    """Each merge prunes other elements and rounds differently, but the same in every run with the same seed."""
    name = "model.layers.0.mlp.up_proj"
    found = {}
    for course, number in (("one", 1), ("one", 2), ("other", 2)):
        args = arguments(peft_model="relora", relora=5, stochastic_rounding=True, optimizer_random_pruning=0.5)
        model = build(args, torch.bfloat16)
        updates = updates_of(model, rounding=StochasticRounding(args.seed))
        train(model, updates, numbers=range(1))
        moment = updates.optimizer.state[updates.stepped[f"{name}.lora_A"]]["moment1"].fill_(1.0)
        layer = model.get_submodule(name)
        with torch.no_grad():
            layer.lora_B.fill_(1e-3)
        assert Restarts(args, model, updates, World()).before_update(5 * number)
        found[course, number] = (moment.clone(), layer.weight.detach().clone())
    for first, second, again in zip(found["one", 1], found["one", 2], found["other", 2], strict=True):
        assert not torch.equal(first, second)
        assert torch.equal(second, again)


def test_pruning_of_a_whole_tensor_and_of_less_than_one_element():
    state = {"step": torch.tensor(4.0), "exp_avg": torch.tensor([[1.0, -2.0], [3.0, 0.5]])}
    parameter = nn.Parameter(torch.zeros(2, 2))
    Pruning("magnitude", 0.2).prune_(state, parameter, 0, "p", World())
    assert state["exp_avg"].count_nonzero() == 4
    Pruning("magnitude", 0.5).prune_(state, parameter, 0, "p", World())
    assert torch.equal(state["exp_avg"], torch.tensor([[0.0, -2.0], [3.0, 0.0]]))
    for kind in ("magnitude", "random"):
        Pruning(kind, 1.0).prune_(state, parameter, 0, "p", World())
        assert not state["exp_avg"].any()
    assert float(state["step"]) == 4


def test_a_reset_keeps_code_books():
    state = {"step": 5, "state1": torch.ones(3, dtype=torch.uint8), "qmap1": torch.ones(256), "absmax1": torch.ones(1)}
    reset_moments_(state)
    assert state["step"] == 0
    assert state["qmap1"].all()
    assert not state["state1"].any()
    assert not state["absmax1"].any()


def test_a_reset_of_all_moments_leaves_what_is_no_moment():
    """The values of the parameters stay, so Spectron's vectors and GaLore's projections go on to belong to them."""
    state = {"step": 5, "momentum_buffer": torch.ones(3, 2), "power_vector": torch.ones(3)}
    state |= {"projection_left": torch.ones(3, 1), "num_updates": 5, "conditioning": torch.ones(3), "num_conditioned": 5}
    reset_moments_(state)
    assert state["step"] == 0
    assert not state["momentum_buffer"].any()
    assert state["power_vector"].all()
    assert state["projection_left"].all()
    assert state["conditioning"].all()
    assert state["num_updates"] == state["num_conditioned"] == 5
    reset_descriptions_(state)
    assert not any(torch.as_tensor(value).any() for key, value in state.items() if key != "steps_before_reset")


@pytest.mark.parametrize("rebalance", [False, True])
def test_a_restart_forgets_what_describes_the_factors_only_if_it_replaces_them(rebalance):
    """Spectron's vectors and the growth limit belong to values and gradients of the factors, which stay without balancing."""
    args = arguments(peft_model="sltrain", restart_every=3, rebalance=rebalance, optimizer="spectron")
    model = build(args)
    updates = updates_of(model, "spectron", growth=True)
    train(model, updates)
    states = [state for state in updates.optimizer.state.values() if "power_vector" in state]
    assert Restarts(args, model, updates, World()).before_update(3)
    assert states
    assert not any(state["momentum_buffer"].any() for state in states)
    assert all(bool(state["power_vector"].any()) != rebalance for state in states)
    limits = dict(zip(updates.stepped, updates.growth.previous.tolist(), strict=True))
    factors = ("lora_A", "lora_B")
    assert all((limit == 0) == (rebalance and name.endswith(factors)) for name, limit in limits.items())


@pytest.mark.parametrize(
    ("optimizer", "per_layer"),
    [("adamw", False), ("adam8bit", True), ("adamw4bit", True), ("adamw4bit", False), ("muon", True), ("spectron", False)],
)
def test_each_update_has_its_own_rounding_noise_also_after_a_reset_of_moments(optimizer, per_layer, monkeypatch):
    """With the same noise in every period between two resets the same elements would move each time, and others never."""
    keys, draw = [], StochasticRounding.generator

    def recorded(self, name, step, device):
        keys.append((name, step))
        return draw(self, name, step, device)

    monkeypatch.setattr(StochasticRounding, "generator", recorded)
    args = arguments(peft_model="sltrain", optimizer=optimizer, reset_moments_every=2)
    model = build(args, torch.bfloat16)
    updates = updates_of(model, optimizer, rounding=StochasticRounding(3), per_layer=per_layer)
    restarts = Restarts(args, model, updates, World())
    for update in range(6):
        assert restarts.before_update(update) == (update in (2, 4))
        train(model, updates, numbers=[update])
    names = {name for name, _ in keys}
    assert names == {name for name, parameter in updates.stepped.items() if parameter.dtype == torch.bfloat16}
    assert sorted(keys) == sorted((name, step) for name in names for step in range(1, 7))


def test_a_run_that_resets_all_moments_keeps_spectrons_vectors():
    """Its first step after a reset would otherwise divide by norms that are too small."""
    args = arguments(peft_model="relora", relora=1000, optimizer="spectron", reset_moments_every=3)
    model = build(args)
    updates = updates_of(model, "spectron")
    train(model, updates)
    states = [state for state in updates.optimizer.state.values() if "power_vector" in state]
    before = [state["power_vector"].clone() for state in states]
    assert Restarts(args, model, updates, World()).before_update(3)
    assert states
    for state, vector in zip(states, before, strict=True):
        assert vector.any()
        assert torch.equal(state["power_vector"], vector)
        assert state["step"] == 0
        assert not state["momentum_buffer"].any()


@pytest.mark.parametrize("method", ["lowrank", "sltrain"])
@pytest.mark.parametrize("train_scaling", [False, True])
def test_rebalancing_leaves_the_function_and_balances_the_factors(method, train_scaling):
    args = arguments(peft_model=method, restart_every=3, rebalance=True, train_scaling=train_scaling)
    model = build(args)
    updates = updates_of(model, growth=True)
    train(model, updates)
    before = logits(model)
    factors = [(layer.lora_B.clone(), layer.lora_A.clone()) for layer in layers_of(model)]
    assert Restarts(args, model, updates, World()).before_update(3)
    assert_same_function(before, logits(model))
    for (old_B, old_A), layer in zip(factors, layers_of(model), strict=True):
        assert not torch.equal(old_B, layer.lora_B)
        left, right = (layer.lora_B.t() @ layer.lora_B).detach(), (layer.lora_A @ layer.lora_A.t()).detach()
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * float(right.max()))
        # The balanced factors' Gram matrix has the singular values on its diagonal.
        values = torch.linalg.svdvals((old_B @ old_A).detach())[: layer.rank]
        torch.testing.assert_close(left.diagonal(), values, rtol=1e-3, atol=1e-5 * float(values[0]))
    limits = dict(zip(updates.stepped, updates.growth.previous.tolist(), strict=True))
    for name, parameter in updates.stepped.items():
        zero = not any(value.any() for value in updates.optimizer.state[parameter].values())
        assert zero == in_a_linear(name), name
        # Only the factors have new values, so only their gradients have another size.
        assert (limits[name] == 0) == name.endswith(("lora_A", "lora_B")), name


def test_a_restart_without_rebalancing_leaves_the_factors():
    args = arguments(peft_model="sltrain", restart_every=3)
    model = build(args)
    updates = updates_of(model)
    train(model, updates)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert Restarts(args, model, updates, World()).before_update(3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, parameter in updates.stepped.items():
        zero = not any(value.any() for value in updates.optimizer.state[parameter].values())
        assert zero == in_a_linear(name), name


def in_a_linear(name: str) -> bool:
    """Tells whether a parameter belongs to a factored linear: B, A, the sparse values or the scale."""
    return name.rpartition(".")[2] in (*FACTORS, "sparse_value", "scaling")


def layers_of(model) -> list[SparseLowRankLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLowRankLinear)]


@pytest.mark.parametrize("shape", [(40, 30, 8), (30, 40, 8), (20, 20, 20), (25, 60, 1)])
def test_balanced_factors_keep_the_product_and_share_its_singular_values(shape):
    rows, columns, rank = shape
    torch.manual_seed(0)
    B, A = torch.randn(rows, rank) * 100, torch.randn(rank, columns) / 100
    new_B, new_A = balanced(B, A)
    assert new_B.shape == B.shape
    assert new_A.shape == A.shape
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-4, atol=1e-4)
    values = torch.linalg.svdvals(B @ A)[:rank]
    torch.testing.assert_close(new_B.t() @ new_B, values.diag(), rtol=1e-3, atol=1e-4 * float(values[0]))
    torch.testing.assert_close(new_A @ new_A.t(), values.diag(), rtol=1e-3, atol=1e-4 * float(values[0]))


def test_an_unused_direction_stays_trainable_after_balancing():
    """If the product has less than full rank, or is zero as at the start, rows of A stay non-zero, so that B has a gradient."""
    torch.manual_seed(0)
    for B in (torch.zeros(30, 6), torch.randn(30, 2) @ torch.randn(2, 6)):
        A = torch.randn(6, 40)
        new_B, new_A = balanced(B, A)
        torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-4, atol=1e-4)
        idle = new_B.abs().amax(dim=0) < 1e-6
        assert idle.sum() == (6 if not B.any() else 4)
        torch.testing.assert_close(new_A[idle].norm(dim=1), torch.full((int(idle.sum()),), 3**-0.5))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (20, 20)])
def test_the_best_low_rank_approximation_is_the_truncated_svd(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    left, right = best_low_rank(weight, 7)
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(left @ right, (U[:, :7] * S[:7]) @ Vt[:7], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left.t() @ left, S[:7].diag(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right @ right.t(), S[:7].diag(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "changes"),
    [("lowrank", {}), ("sltrain", {}), ("sltrain", {"support": "block"}), ("sltrain", {"train_scaling": True})],
)
def test_a_start_from_svd_approximates_the_dense_initial_weight_best(method, changes):
    """The start is the best rank-r approximation of the full-rank run's weight, and exact at the support's positions."""
    args = arguments(peft_model=method, rank=16, **changes)
    model = build(args)
    full = build(arguments(peft_model="full"))
    start_from_svd(model, config().initializer_range, args.seed, World())
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLowRankLinear):
            dense = full.get_submodule(name).weight.detach()
            U, S, Vt = torch.linalg.svd(dense.double(), full_matrices=False)
            expected = ((U[:, :16] * S[:16]) @ Vt[:16]).float()
            # Rounding errors rotate singular vectors in proportion to 1 / the gap to the next singular value (Davis and Kahan).
            rounding = 8 * torch.finfo(torch.float32).eps * float(S[0] * S[15] / (S[15] - S[16]))
            if layer.support is not None:
                positions = layer.support.flat_indices()
                expected.view(-1)[positions] = dense.flatten()[positions]
            torch.testing.assert_close(layer.dense_weight().detach(), expected, rtol=0, atol=rounding)
            assert rounding < 1e-2 * float(dense.std())
            gram = (layer.lora_B.t() @ layer.lora_B).detach()
            torch.testing.assert_close(gram, (layer.lora_A @ layer.lora_A.t()).detach(), rtol=0, atol=1e-5)


def test_attaching_relora_factors_keeps_the_function_and_merging_restores_linears():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.Linear(12, 20)
            self.mlp = nn.Linear(20, 9, bias=False)
            self.lm_head = nn.Linear(9, 5)

        def forward(self, x):
            return self.lm_head(self.mlp(torch.tanh(self.attn(x))))

    model, x = Block(), torch.randn(3, 4, 12)
    before = model(x)
    assert attach_relora(model, rank=4, seed=1) == ["attn", "mlp"]
    torch.testing.assert_close(model(x), before)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"attn.weight", "mlp.weight"}
    assert "attn.bias" in {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        model.attn.lora_B.normal_()
    changed = model(x)
    assert not torch.allclose(changed, before)
    assert merge(model) == ["attn", "mlp"]
    assert type(model.attn) is nn.Linear
    torch.testing.assert_close(model(x), changed)


@pytest.mark.parametrize("train_scaling", [False, True])
def test_the_merged_dense_weight_is_rounded_once(train_scaling):
    """The exported dense weight is as near to the exact one as bfloat16 allows, also under autocast."""
    torch.manual_seed(0)
    layer = ReLoRALinear(64, 48, 8, alpha=2.4, trainable_scaling=train_scaling, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    # A trained scale is multiplied into B, as in the forward pass.
    scaled_B = (layer.lora_B * torch.tanh(layer.scaling)).double() if train_scaling else 0.3 * layer.lora_B.double()
    exact = (layer.weight.double() + scaled_B @ layer.lora_A.double()).detach()
    with torch.autocast("cpu"):
        found = layer.dense_weight()
    assert found.dtype == torch.bfloat16
    nearest = float((exact.bfloat16().double() - exact).norm())
    assert float((found.double() - exact).detach().norm()) < 1.01 * nearest
    with torch.autocast("cpu"):
        assert layer.float().dense_weight().dtype == torch.float32


@pytest.mark.parametrize("train_scaling", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_relora_gradients_equal_those_of_the_formula(train_scaling, autocast):
    torch.manual_seed(0)
    layer = ReLoRALinear(12, 20, 4, alpha=8.0, bias=True, trainable_scaling=train_scaling)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    reference = {name: p.detach().clone().requires_grad_(name != "weight") for name, p in layer.named_parameters()}
    x, g = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 20)
    other = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    (y * g).sum().backward()
    scale = torch.tanh(reference["scaling"]) if train_scaling else 2.0
    W = reference["weight"] + scale * (reference["lora_B"] @ reference["lora_A"])
    expected = other @ W.t() + reference["bias"]
    (expected * g).sum().backward()
    tolerance = {"rtol": 0.05, "atol": 0.5} if autocast else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.float(), expected, **tolerance)
    torch.testing.assert_close(x.grad, other.grad, **tolerance)
    for name, parameter in layer.named_parameters():
        if name == "weight":
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, reference[name].grad, **tolerance)
    torch.testing.assert_close(layer.dense_weight(), W)


def test_relora_starts_with_the_full_rank_runs_weights():
    """The dense weights of the same seed are equal, and the factors' product is zero."""
    relora, full = build(arguments(peft_model="relora")), build(arguments(peft_model="full"))
    ours = dict(relora.named_parameters())
    assert all(torch.equal(ours[name], tensor) for name, tensor in full.named_parameters())
    torch.testing.assert_close(logits(relora), logits(full))
    A = ours["model.layers.0.mlp.up_proj.lora_A"]
    drawn = torch.empty_like(A).uniform_(
        -1 / math.sqrt(96), 1 / math.sqrt(96), generator=generator_for(3, "model.layers.0.mlp.up_proj.lora_A")
    )
    assert torch.equal(A.detach(), drawn)


def test_stochastic_rounding_works_after_a_reset():
    args = arguments(peft_model="sltrain", restart_every=3, rebalance=True, stochastic_rounding=True)
    model = build(args, torch.bfloat16)
    updates = updates_of(model, "adamw", rounding=StochasticRounding(3))
    train(model, updates)
    Restarts(args, model, updates, World()).before_update(3)
    train(model, updates, numbers=[4])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_the_rate_warms_up_after_each_restart_but_not_before_the_first():
    rates = [after_restart(step, 5, 3) for step in range(12)]
    assert rates == [1, 1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 1, 0.25, 0.5]
    assert {after_restart(step, None, 3) for step in range(12)} == {1.0}
    assert {after_restart(step, 5, None) for step in range(12)} == {1.0}
