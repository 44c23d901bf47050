"""Gradients accumulated in moments: their formulas in float64, random rounding, what is freed, skipped and refused."""

import math
import os
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from torch import nn

from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.world import World, process_group
from peft_pretraining.memory.account import account
from peft_pretraining.optim import updates as updates_module
from peft_pretraining.optim.accumulation import AccumulatingUpdate
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.moments import Moment, moment_slices
from peft_pretraining.optim.orthogonal import pairs_of_factors, scale_of_shape
from peft_pretraining.optim.slices import StochasticRounding
from peft_pretraining.optim.state import plain_moments, reset_moments_
from peft_pretraining.optim.updates import PerLayerUpdate
from peft_pretraining.plan.checks import check
from peft_pretraining.plan.plan import make_plan, setting_of

ROOT = Path(__file__).resolve().parents[2]
ADAMS = ["adam", "adamw", "adam8bit", "adamw4bit"]
ORTHOGONAL = ["muon", "muon8bit", "muon4bit", "spectron", "spectron8bit", "spectron4bit"]
LR, DECAY, SCALE = 0.02, 0.1, 2.0
# The largest distance between neighbouring codes, relative to a block's largest value.
COARSEST = {"adam8bit": 0.02, "adamw4bit": 0.3}


def parameters_of(shapes: dict[str, tuple[int, ...]], dtype=torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter((0.3 * torch.randn(shape, generator=generator)).to(dtype)) for name, shape in shapes.items()}


# Below the 4,096 elements from which moments are quantised, so that float64 arithmetic predicts every optimizer's.
SMALL = {"x.lora_A": (6, 20), "x.lora_B": (30, 6), "x.sparse_value": (9,), "norm.weight": (20,)}
LARGE = {"embed_tokens.weight": (67, 131)}


def accumulating(name: str, parameters: dict[str, nn.Parameter], micro_batches: int, **settings) -> AccumulatingUpdate:
    build = partial(build_optimizer, name, lr=0.0, weight_decay=DECAY, sliced=True, factor_scale=SCALE, **settings)
    joint = pairs_of_factors(parameters) if name.startswith("spectron") else []
    return AccumulatingUpdate(build, parameters, World(), num_micro_batches=micro_batches, seed=0, joint=joint)


def gradients(parameters: dict[str, nn.Parameter], update: int, micro_batch: int) -> dict[str, torch.Tensor]:
    """Gradients with a part that all micro-batches share, so that squares of sums and sums of squares differ by a factor."""
    generator = torch.Generator().manual_seed(100 * update + micro_batch)
    return {name: torch.randn(p.shape, generator=generator).add_(1).to(p.dtype) for name, p in parameters.items()}


def run_update(parameters, updates, update: int, micro_batches: int, change=lambda micro_batch, found: None):
    """Makes an update; returns its gradients by micro-batch and its outcome. change: alters a micro-batch's gradients."""
    updates.begin(LR)
    passes = []
    for micro_batch in range(micro_batches):
        passes.append(gradients(parameters, update, micro_batch))
        change(micro_batch, passes[-1])
        updates.before_backward(last=micro_batch == micro_batches - 1)
        sum((parameters[name] * gradient).sum() for name, gradient in passes[-1].items()).backward()
        assert all(parameter.grad is None for parameter in parameters.values())
    return passes, updates.finish(torch.zeros(()))


def sums(passes, name: str, decay: torch.Tensor | float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of a tensor's gradients and of their squares, in float64. decay: added to the gradient in equal shares."""
    found = [each[name].double() + decay / len(passes) for each in passes]
    return sum(found), sum(gradient**2 for gradient in found)


@pytest.mark.parametrize("micro_batches", [2, 5])
@pytest.mark.parametrize("name", ADAMS)
def test_adams_moments_and_steps_follow_their_formulas(name, micro_batches):
    parameters = parameters_of(SMALL)
    updates = accumulating(name, parameters, micro_batches)
    exact = {key: p.detach().double() for key, p in parameters.items()}
    moments = {key: [torch.zeros_like(value), torch.zeros_like(value)] for key, value in exact.items()}
    for update in range(1, 5):
        passes, outcome = run_update(parameters, updates, update, micro_batches)
        squares = 0.0
        for key, value in exact.items():
            first, second = moments[key]
            total, square = sums(passes, key, DECAY * value if name == "adam" else 0.0)
            moments[key] = [0.9 * first + 0.1 * total, 0.999 * second + 0.001 * square]
            mean, of_squares = moments[key][0] / (1 - 0.9**update), moments[key][1] / (1 - 0.999**update)
            root = (of_squares + (1 - 1 / micro_batches) * mean**2).sqrt() + 1e-8
            exact[key] = value * (1 if name == "adam" else 1 - LR * DECAY) - LR * mean / root
            squares += float(sums(passes, key)[1].sum())
        for key, parameter in parameters.items():
            found = plain_moments(updates.optimizer.state[parameter])
            for moment, expected in zip(found, moments[key], strict=True):
                torch.testing.assert_close(moment.double(), expected.flatten(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(parameter.detach().double(), exact[key], rtol=1e-5, atol=1e-6)
        assert float(outcome.gradnorm) == pytest.approx(math.sqrt(squares), rel=1e-5)
        assert int(outcome.skipped) == 0


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_momentum_accumulates_exactly_and_is_the_direction_of_the_step(name):
    """For Spectron the momentum is the direction of ordinary updates too; Muon's would look one step ahead."""
    parameters = {key: p for key, p in parameters_of(SMALL).items() if "lora" in key}
    updates = accumulating(name, parameters, 3)
    exact = {key: p.detach().double() for key, p in parameters.items()}
    momenta = {key: torch.zeros_like(value) for key, value in exact.items()}
    vectors = {key: torch.full((len(value),), len(value) ** -0.5, dtype=torch.float64) for key, value in exact.items()}
    for update in range(1, 4):
        passes, _ = run_update(parameters, updates, update, 3)
        norms = 0.0
        for key, value in exact.items():
            momenta[key] = 0.95 * momenta[key] + 0.05 * sums(passes, key)[0]
            columns = value.T @ vectors[key]
            vectors[key] = value @ (columns / columns.norm())
            norms += float(vectors[key].norm())
            vectors[key] /= vectors[key].norm()
        for key, value in exact.items():
            rate = LR * scale_of_shape(value.shape)
            if name.startswith("spectron"):
                rate = LR * scale_of_shape((30, 20)) / (SCALE * (norms + 1))
            exact[key] = (1 - LR * DECAY) * value - rate * newton_schulz(momenta[key])
            torch.testing.assert_close(parameters[key].detach().double(), exact[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "adam8bit", "spectron", "spectron8bit"])
def test_one_micro_batch_is_the_ordinary_step_up_to_the_rounding_of_moments(name):
    shapes = {"x.lora_A": (40, 120), "x.lora_B": (120, 40)} if name.startswith("spectron") else {**SMALL, **LARGE}
    ends = []
    for accumulates in (False, True):
        parameters = parameters_of(shapes)
        build = partial(build_optimizer, name, lr=0.0, weight_decay=DECAY, sliced=True, factor_scale=SCALE)
        joint = {"joint": pairs_of_factors(parameters)} if name.startswith("spectron") else {}
        updates = accumulating(name, parameters, 1) if accumulates else PerLayerUpdate(build, parameters, World(), **joint)
        start = {key: p.detach().clone() for key, p in parameters.items()}
        run_update(parameters, updates, 1, 1)
        ends.append({key: p.detach() - start[key] for key, p in parameters.items()})
    allowed = 0.06 if name.endswith("8bit") else 3e-5
    for key, expected in ends[0].items():
        assert float((ends[1][key] - expected).norm() / expected.norm()) < allowed, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adam8bit", "adamw4bit"])
def test_quantised_moments_are_near_their_formulas_and_steps_follow_them(name, dtype):
    """From the second update on, the moments before are those that were stored."""
    parameters = parameters_of(LARGE, dtype)
    ((key, parameter),) = parameters.items()
    updates = accumulating(name, parameters, 3)
    updates.optimizer.members[0].prepare_states()
    for update in range(1, 4):
        value = parameter.detach().double()
        before = [moment.double().clone() for moment in plain_moments(updates.optimizer.state[parameter])]
        passes, _ = run_update(parameters, updates, update, 3)
        found = [moment.double() for moment in plain_moments(updates.optimizer.state[parameter])]
        for number, (decay, added) in enumerate(zip((0.9, 0.999), sums(passes, key), strict=True)):
            expected = decay * before[number] + (1 - decay) * added.flatten()
            # Three roundings, each by less than a spacing. They are random and cancel in the projection on the expected moments,
            # which is 2/3 where one of three micro-batches is lost.
            assert float((found[number] - expected).abs().max()) < 3 * COARSEST[name] * float(expected.abs().max())
            assert float(found[number] @ expected / (expected @ expected)) == pytest.approx(1, abs=0.05)
        mean, of_squares = (m / (1 - d**update) for m, d in zip(found, (0.9, 0.999), strict=True))
        root = (of_squares + 2 / 3 * mean**2).sqrt() + 1e-8
        expected = value * (1 - LR * DECAY) - LR * (mean / root).view(value.shape)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(parameter.detach().double(), expected, **tolerance)


@pytest.mark.parametrize("layout", ["bitsandbytes", "torchao8", "torchao4", "bfloat16"])
@pytest.mark.parametrize("number", [1, 2])
def test_random_rounding_keeps_the_mean_and_exact_values(layout, number):
    """To nearest, every draw would be the same, apart from the value by up to half a spacing; also for an incomplete block."""
    name, bits = {"bitsandbytes": ("adam8bit", None), "torchao8": ("adamw4bit", 8), "torchao4": ("adamw4bit", None)}.get(
        layout, ("adamw", None)
    )
    parameter = nn.Parameter(torch.zeros(4096 + 70, dtype=torch.bfloat16))
    optimizer = build_optimizer(name, {"lm_head.weight": parameter}, lr=0.0, weight_decay=0.0, embedding_bits=bits, sliced=True)
    optimizer.prepare_states()
    state = optimizer.state[parameter]
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(parameter.numel(), generator=generator)
    values = values if number == 1 else values.square().add_(0.2)
    source, draws, total = StochasticRounding(7), 600, torch.zeros_like(values)
    for draw in range(draws):
        noise = source.generator("x", draw, parameter.device)
        for part, moment in moment_slices(state, number):
            moment.write_(values[part], noise)
        total += plain_moments(state)[number - 1]
    spacing = {"bitsandbytes": 0.015, "torchao8": 0.015, "torchao4": 0.23, "bfloat16": 2**-7}[layout] * float(values.abs().max())
    # A draw is off by less than a spacing, with a deviation of at most half of it: six deviations of the mean of all draws.
    floor = float(values.abs().max()) / 16 if (layout, number) == ("torchao4", 2) else -math.inf
    counted = values > floor if number == 2 else torch.ones_like(values, dtype=torch.bool)
    assert counted.sum() > 500
    assert float((total / draws - values)[counted].abs().max()) < 6 * spacing / 2 / math.sqrt(draws)
    before = plain_moments(state)[number - 1].float().clone()
    for part, moment in moment_slices(state, number):
        moment.write_(before[part], source.generator("y", 0, parameter.device))
    # Stored numbers are stored again unchanged, but for the last bit of a scale.
    changed = (plain_moments(state)[number - 1].float() - before).abs() > 1e-5 * before.abs()
    assert float(changed.float().mean()) < 1e-3


def test_a_second_moment_never_becomes_zero_beside_larger_ones():
    """A step divides by its root."""
    book = torch.cat([torch.zeros(1), torch.logspace(-6, 0, 255)])
    moment = Moment(torch.zeros(256, dtype=torch.uint8), torch.zeros(1), book, 8, signed=False)
    numbers = torch.cat([torch.full((255,), 1e-9), torch.ones(1)])
    moment.write_(numbers, torch.Generator().manual_seed(0))
    assert float(moment.read().min()) > 0


def test_small_additions_to_low_bit_moments_are_not_lost():
    """64 micro-batches of a gradient whose share is far below a code's spacing; rounded to nearest they would add nothing."""
    for name, dtype, bits in (("adam8bit", torch.float32, 8), ("adamw4bit", torch.float32, 4), ("adamw", torch.bfloat16, None)):
        parameter = nn.Parameter(torch.zeros(64, 256, dtype=dtype))
        parameters = {"w": parameter}
        updates = accumulating(name, parameters, 64)

        def even(micro_batch, found):
            found["w"].fill_(0.5 / 64)
            found["w"][:, 0] = 1.0 / 64

        run_update(parameters, updates, 1, 64, change=even)
        first, _ = plain_moments(updates.optimizer.state[parameter])
        assert bits is None or updates.optimizer.state[parameter][f"{'state' if bits == 8 else 'codes'}1"].dtype == torch.uint8
        mean = float(first.view(64, 256)[:, 1:].float().mean())
        assert mean == pytest.approx(0.05, rel=0.06), name


@pytest.mark.parametrize("name", [*ADAMS, "muon4bit", "spectron8bit"])
def test_a_non_finite_gradient_is_not_added_and_its_tensor_not_stepped(name):
    shapes = {**SMALL, **LARGE}
    parameters, clean = parameters_of(shapes), parameters_of(shapes)
    before = {key: p.detach().clone() for key, p in parameters.items()}
    updates, other = accumulating(name, parameters, 3), accumulating(name, clean, 3)

    def poison(micro_batch, found):
        if micro_batch == 1:
            found["x.lora_A"][0, 0] = torch.inf
            found["norm.weight"][1] = torch.nan

    def zero(micro_batch, found):
        if micro_batch == 1:
            found["x.lora_A"].zero_()
            found["norm.weight"].zero_()

    _, outcome = run_update(parameters, updates, 1, 3, change=poison)
    run_update(clean, other, 1, 3, change=zero)
    skipped = {"x.lora_A", "norm.weight"} | ({"x.lora_B"} if name.startswith("spectron") else set())
    assert int(outcome.skipped) == len(skipped)
    assert not math.isfinite(float(outcome.gradnorm))
    for key, parameter in parameters.items():
        assert torch.equal(parameter, before[key]) == (key in skipped), key
        # The finite micro-batches are in the moments, as with zeros for the others; to these Adam would add weight decay.
        if name != "adam" and key in ("x.lora_A", "norm.weight"):
            states = [each.optimizer.state[p] for each, p in ((updates, parameter), (other, clean[key]))]
            for (_, found), (_, expected) in zip(*(moment_slices(state, 1) for state in states), strict=True):
                torch.testing.assert_close(found.read(), expected.read())
            assert states[0]["step"] == 1
    _, outcome = run_update(parameters, updates, 2, 3)
    assert int(outcome.skipped) == 0
    assert not any(torch.equal(parameter, before[key]) for key, parameter in parameters.items())


@pytest.mark.parametrize("name", [*ADAMS, "muon"])
def test_an_update_without_a_finite_gradient_changes_nothing_of_its_tensor(name):
    parameters = parameters_of(LARGE | SMALL)
    updates = accumulating(name, parameters, 2)
    run_update(parameters, updates, 1, 2)
    key = "embed_tokens.weight"
    states = {k: torch.as_tensor(v).clone() for k, v in updates.optimizer.state[parameters[key]].items()}
    value = parameters[key].detach().clone()
    run_update(parameters, updates, 2, 2, change=lambda _, found: found[key].fill_(torch.nan))
    assert torch.equal(parameters[key], value)
    assert all(torch.equal(torch.as_tensor(v), states[k]) for k, v in updates.optimizer.state[parameters[key]].items())


@pytest.mark.parametrize("name", ["adamw", "adamw4bit", "muon8bit"])
def test_the_noise_of_moments_does_not_repeat_after_a_reset(name, monkeypatch):
    keys, draw = [], StochasticRounding.generator

    def recorded(self, key, step, device):
        keys.append((key, step))
        return draw(self, key, step, device)

    monkeypatch.setattr(StochasticRounding, "generator", recorded)
    parameters = parameters_of(LARGE | SMALL)
    updates = accumulating(name, parameters, 2)
    for update in range(4):
        run_update(parameters, updates, update, 2)
        if update == 1:
            for state in updates.optimizer.state.values():
                reset_moments_(state)
    expected = [(f"{key}/{number}", step) for key in parameters for number in (1, 2) for step in range(1, 5)]
    assert sorted(keys) == sorted(expected)


def test_freed_memory_is_given_back_before_each_micro_batch(monkeypatch):
    trimmed = []
    monkeypatch.setattr(updates_module, "_TRIM_ELEMENTS", 0)
    monkeypatch.setattr(updates_module, "trim_heap", lambda: trimmed.append(None))
    parameters = parameters_of(SMALL)
    run_update(parameters, accumulating("adamw", parameters, 3), 1, 3)
    assert len(trimmed) == 4


def test_an_abandoned_update_steps_nothing():
    parameters = parameters_of(SMALL)
    updates = accumulating("adamw", parameters, 2)
    before = {key: p.detach().clone() for key, p in parameters.items()}
    updates.begin(LR)
    updates.before_backward(last=False)
    sum(p.sum() for p in parameters.values()).backward()
    assert int(updates.abandon().skipped) == len(SMALL)
    sum(p.sum() for p in parameters.values()).backward()  # outside an update: ordinary gradients
    assert all(torch.equal(p, before[key]) and p.grad is not None for key, p in parameters.items())


BASE = "--model_config configs/llama_60m.json --batch_size 2 --total_batch_size 8 --rank 8 --accumulate moments"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--optimizer adamw", ["--per_layer", "leave --accumulate out"]),
        ("--per_layer --optimizer sgd", ["--optimizer sgd", "no moment", "adamw4bit"]),
        ("--per_layer --optimizer adafactor", ["--optimizer adafactor"]),
        ("--per_layer --optimizer stable_spam", ["--optimizer stable_spam", "norm of the whole"]),
        ("--per_layer --optimizer muon --condition_gradients", ["--condition_gradients", "norm", "drop one"]),
        ("--per_layer --optimizer adamw --peft_model galore", ["--peft_model galore", "sltrain"]),
        ("--per_layer --optimizer adamw --grad_norm_growth 1.01", ["--grad_norm_growth 1.01", "drop one"]),
        ("--per_layer --optimizer adamw --parallel fsdp", ["--parallel fsdp", "ddp"]),
        ("--per_layer --optimizer adamw --grad_clipping 1.0", ["--grad_clipping 1.0"]),
    ],
)
def test_what_cannot_accumulate_in_moments_is_refused(flags, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as refused:
        check(parse_args([*BASE.split(), *flags.split()]), World())
    (problem,) = [each for each in refused.value.problems if "--accumulate moments" in each or "--grad_clipping" in each]
    assert all(word in problem for word in words), problem


def test_one_micro_batch_per_update_is_told_that_the_flag_has_no_effect(monkeypatch):
    monkeypatch.chdir(ROOT)
    for batch, warned in (("8", True), ("4", False)):
        line = f"{BASE} --per_layer --optimizer adamw --batch_size {batch}".split()
        warnings = make_plan(parse_args(line), World()).warnings
        assert any("--accumulate moments has no effect" in text for text in warnings) == warned


@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit", "spectron4bit"])
def test_the_account_keeps_one_tensors_gradient_instead_of_all(optimizer, monkeypatch):
    """The embedding's is the largest. Everything else is as with one micro-batch."""
    monkeypatch.chdir(ROOT)
    line = f"{BASE} --per_layer --peft_model sltrain --optimizer {optimizer} --dtype bfloat16".split()
    many, one, kept = (
        account(setting_of(make_plan(args, World(), "bfloat16"), args, "cuda"))
        for args in (parse_args([*line, *more]) for more in ([], ["--total_batch_size", "2"], ["--accumulate", "gradients"]))
    )
    assert many["gradients"] == 2 * 32_000 * 512
    assert kept["gradients"] == kept["parameters"]
    assert {name: many[name] for name in many if name not in ("scratch", "peak", "total")} == {
        name: one[name] for name in one if name not in ("scratch", "peak", "total")
    }
    assert many["peak"] - one["peak"] <= 40 * 2**21


def averaging(rank: int, port: int, results: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    world = World(rank, 2, rank, 2)
    parameters = parameters_of(SMALL | LARGE)
    build = partial(build_optimizer, "adam8bit", lr=0.0, weight_decay=DECAY, sliced=True)
    with process_group(world, torch.device("cpu"), 60.0):
        updates = AccumulatingUpdate(build, parameters, world, num_micro_batches=2, seed=0)
        for update in (1, 2):
            updates.begin(LR)
            for micro_batch in range(2):
                updates.before_backward(last=micro_batch == 1)
                found = gradients(parameters, update, 2 * micro_batch + rank)
                sum((parameters[name] * gradient).sum() for name, gradient in found.items()).backward()
            updates.finish(torch.zeros(()))
    torch.save({name: p.detach() for name, p in parameters.items()}, results / f"{rank}.pt")


def test_two_processes_average_each_micro_batchs_gradients(tmp_path):
    port = forked.free_port()
    processes = [forked.SERVER.Process(target=averaging, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    parameters = parameters_of(SMALL | LARGE)
    updates = accumulating("adam8bit", parameters, 2)
    for update in (1, 2):
        means = [
            {name: (one + other) / 2 for (name, one), other in zip(pair[0].items(), pair[1].values(), strict=True)}
            for pair in ([gradients(parameters, update, 2 * number + rank) for rank in (0, 1)] for number in (0, 1))
        ]
        run_update(parameters, updates, update, 2, change=lambda number, found, means=means: found.update(means[number]))
    for process in processes:
        process.join(120)
    ends = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, parameter in parameters.items():
        assert torch.equal(ends[0][name], ends[1][name])
        assert torch.equal(ends[0][name], parameter.detach())
