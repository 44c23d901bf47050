"""Learning rates equal the published schedules, implemented here a second time, at every step of a run."""

import math

import pytest

from peft_pretraining.plan.schedule import lr_at, validate

LR = 0.003


def relative(scheduler: str, step: float, **settings: object) -> float:
    return lr_at(step, scheduler=scheduler, lr=LR, **settings) / LR  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (7, 7), (1, 0), (1, 1), (60, 59)])
def test_linear_equals_transformers(steps: int, warmup: int) -> None:
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    theirs = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        ours = lr_at(step, scheduler="linear", lr=LR, num_training_steps=steps, warmup_steps=warmup, min_lr_ratio=0.1)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("steps", "warmup", "floor"), [(100, 10, 0.1), (11000, 1100, 0.1), (50, 0, 0.0), (5, 5, 1.0)])
def test_cosine_equals_its_formula(steps: int, warmup: int, floor: float) -> None:
    settings = {"num_training_steps": steps, "warmup_steps": warmup, "min_lr_ratio": floor}
    for step in range(0, steps, max(1, steps // 500)):
        if step < warmup:
            expected = step / warmup
        else:
            angle = math.pi * (step - warmup) / (steps - warmup)
            expected = floor + (1 - floor) * (1 + math.cos(angle)) / 2
        assert relative("cosine", step, **settings) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_cosine_has_known_values_at_known_points() -> None:
    """The rate is 0 at the first update, the peak after the warm-up, the mean half-way, and near the floor at the end."""
    settings = {"num_training_steps": 1100, "warmup_steps": 100, "min_lr_ratio": 0.1}
    assert relative("cosine", 0, **settings) == 0
    assert relative("cosine", 50, **settings) == 0.5
    assert relative("cosine", 100, **settings) == 1
    assert relative("cosine", 600, **settings) == pytest.approx(0.55)
    assert 0.1 < relative("cosine", 1099, **settings) < 0.1 + 1e-5


def test_cyclic_cosine_repeats_its_cycle() -> None:
    """Later cycles equal the first one, except their first two updates, which have 1e-7 instead of 0 and 1/warmup."""
    whole = {"num_training_steps": 300, "warmup_steps": 20, "min_lr_ratio": 0.2, "cycle_length": 100}
    single = {"num_training_steps": 100, "warmup_steps": 20, "min_lr_ratio": 0.2}
    for step in range(300):
        if step >= 100 and step % 100 < 2:
            assert relative("cosine", step, **whole) == pytest.approx(1e-7)
        else:
            assert relative("cosine", step, **whole) == relative("cosine", step % 100, **single)


@pytest.mark.parametrize("adjust", [0, 30])
@pytest.mark.parametrize(("warmup", "restart_warmup"), [(50, 10), (10, 25)])
def test_cosine_restarts_equals_its_formula(adjust: int, warmup: int, restart_warmup: int) -> None:
    total, every, floor = 500, 100, 0.1
    settings = {
        "num_training_steps": total,
        "warmup_steps": warmup,
        "min_lr_ratio": floor,
        "cycle_length": every,
        "restart_warmup_steps": restart_warmup,
        "adjust_step": adjust,
    }

    def envelope(position: float) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * position / (total - warmup)))

    for step in range(total):
        shifted = step + adjust
        if step < warmup:
            expected = step / warmup
        elif shifted % every < restart_warmup:
            expected = (shifted % every) / restart_warmup * envelope(shifted // every * every)
        else:
            expected = envelope(shifted - warmup)
        assert relative("cosine_restarts", step, **settings) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_rate_at_a_fraction_of_a_step_lies_between_its_neighbours() -> None:
    settings = {"num_training_steps": 100, "warmup_steps": 10, "min_lr_ratio": 0.1}
    for scheduler in ("linear", "cosine"):
        low, middle, high = (relative(scheduler, s, **settings) for s in (50, 49.5, 49))
        assert low < middle < high


GOOD = {"scheduler": "cosine", "num_training_steps": 100, "warmup_steps": 10, "min_lr_ratio": 0.1}
RESTARTS = GOOD | {"scheduler": "cosine_restarts", "cycle_length": 50, "restart_warmup_steps": 5}


@pytest.mark.parametrize(
    ("settings", "flag", "value"),
    [
        (GOOD | {"scheduler": "polynomial"}, "--scheduler", "polynomial"),
        (GOOD | {"num_training_steps": 0}, "--num_training_steps", "0"),
        (GOOD | {"warmup_steps": 101}, "--warmup_steps", "101"),
        (GOOD | {"warmup_steps": -1}, "--warmup_steps", "-1"),
        (GOOD | {"min_lr_ratio": 1.5}, "--min_lr_ratio", "1.5"),
        (GOOD | {"cycle_length": 30}, "--cycle_length", "30"),
        (GOOD | {"cycle_length": 5}, "--cycle_length", "5"),
        (GOOD | {"adjust_step": 3}, "--adjust_step", "3"),
        (GOOD | {"scheduler": "cosine_restarts", "restart_warmup_steps": 5}, "--cycle_length", "needs"),
        (GOOD | {"scheduler": "cosine_restarts", "cycle_length": 50}, "--restart_warmup_steps", "needs"),
        (RESTARTS | {"min_lr_ratio": 0.0}, "--min_lr_ratio", "0.0"),
        (RESTARTS | {"cycle_length": 30}, "--cycle_length", "30"),
        (RESTARTS | {"restart_warmup_steps": 51}, "--restart_warmup_steps", "51"),
        (RESTARTS | {"adjust_step": 41}, "--adjust_step", "41"),
    ],
)
def test_an_invalid_schedule_is_refused_with_flag_and_value(settings: dict[str, object], flag: str, value: str) -> None:
    problems = validate(**settings)  # type: ignore[arg-type]
    assert any(flag in problem and value in problem for problem in problems), problems


@pytest.mark.parametrize(
    "settings",
    [GOOD, RESTARTS, GOOD | {"scheduler": "linear"}, GOOD | {"cycle_length": 50}, RESTARTS | {"adjust_step": 40}],
)
def test_a_valid_schedule_stays_between_zero_and_the_peak(settings: dict[str, object]) -> None:
    assert validate(**settings) == []  # type: ignore[arg-type]
    assert all(0 <= lr_at(step, lr=LR, **settings) <= LR for step in range(100))  # type: ignore[arg-type]


def test_an_unknown_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match="polynomial"):
        relative("polynomial", 0, num_training_steps=10, warmup_steps=1, min_lr_ratio=0.1)
