"""When a run is over, and its learning-rate schedules, as published: pure functions of the number of finished updates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

SCHEDULERS = ("linear", "cosine", "cosine_restarts")


class Length(Protocol):
    """How long a run is: in updates, or in tokens where max_train_tokens is set."""

    @property
    def num_training_steps(self) -> int: ...
    @property
    def max_train_tokens(self) -> int | None: ...


def is_finished(length: Length, update_step: int, tokens_seen: int) -> bool:
    """Whether a run is over: after exactly num_training_steps updates, or the first update that reaches max_train_tokens."""
    if length.max_train_tokens is not None:
        return tokens_seen >= length.max_train_tokens
    return update_step >= length.num_training_steps


@dataclass(frozen=True)
class LearningRates:
    """The learning rate of every update of a run.

    settings: arguments of `lr_at` except the step. tokens_per_update: set if the run's length is counted in tokens. The schedule
    then advances by tokens, in units of full updates: padding makes the number of updates unknown beforehand, and the schedule
    must end with the run. restart_every: updates between restarts of the method, None without restarts. ratios: rates of
    the parameter groups, divided by the run's; empty if no group has its own.
    """

    settings: dict[str, Any]
    tokens_per_update: int | None = None
    restart_every: int | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)

    def row(self, lr: float) -> dict[str, float]:
        """The rates to log for an update with the rate `lr`: of the run, and of each parameter group if one has its own."""
        return {"lr": lr} | {f"lr/{group}": lr * ratio for group, ratio in self.ratios.items()}

    def at(self, update_step: int, tokens_seen: int) -> float:
        """The rate of the update that follows `update_step` finished updates and `tokens_seen` tokens."""
        rate = lr_at(self._position(update_step, tokens_seen), **self.settings)
        if self.settings["scheduler"] == "cosine_restarts":
            return rate
        return rate * after_restart(update_step, self.restart_every, self.settings["restart_warmup_steps"])

    def progress(self, update_step: int, tokens_seen: int) -> float:
        """The share of the run that is over after `update_step` updates and `tokens_seen` tokens."""
        num_training_steps: int = self.settings["num_training_steps"]
        return self._position(update_step, tokens_seen) / num_training_steps

    def _position(self, update_step: int, tokens_seen: int) -> float:
        if self.tokens_per_update is None:
            return update_step
        last: int = self.settings["num_training_steps"] - 1
        return min(tokens_seen / self.tokens_per_update, last)


def lr_at(
    step: float,
    *,
    scheduler: str,
    lr: float,
    num_training_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    cycle_length: int | None = None,
    restart_warmup_steps: int | None = None,
    adjust_step: int = 0,
) -> float:
    """Learning rate of the update that follows `step` finished updates, 0 <= step < num_training_steps.

    `step` may be a fraction, for runs whose length is counted in tokens. lr is the peak; all lengths are update steps.

    linear: 0 -> lr over the warm-up, then to 0 at num_training_steps; min_lr_ratio has no effect, as published.
    cosine: 0 -> lr, then half a cosine to min_lr_ratio * lr; again every cycle_length updates (default: one cycle).
    cosine_restarts: as in ReLoRA (arXiv 2307.05695): one cosine over the run, which a linear warm-up of
    restart_warmup_steps interrupts every cycle_length updates; adjust_step shifts the restarts.

    With a warm-up the first update (step 0) has learning rate 0, as published. Arguments are taken as checked by
    `validate`; raises ValueError on an unknown scheduler or a missing length.
    """
    if scheduler == "linear":
        return lr * _linear(step, num_training_steps, warmup_steps)
    if scheduler == "cosine":
        return lr * _cosine(step, cycle_length or num_training_steps, warmup_steps, min_lr_ratio)
    if scheduler == "cosine_restarts":
        if cycle_length is None or restart_warmup_steps is None:
            raise ValueError("cosine_restarts needs cycle_length and restart_warmup_steps")
        return lr * _cosine_restarts(
            step, num_training_steps, warmup_steps, min_lr_ratio, cycle_length, restart_warmup_steps, adjust_step
        )
    raise ValueError(f"scheduler {scheduler!r}: not one of {', '.join(SCHEDULERS)}")


def after_restart(update_step: int, interval: int | None, warmup_steps: int | None) -> float:
    """Factor of the rate of the update that follows `update_step` finished ones, where every `interval` updates restart.

    1/(w+1), 2/(w+1), ... over the w = warmup_steps updates after a restart, else 1; also 1 up to the first one. For schedules
    that have no restarts of their own.
    """
    if interval is None or not warmup_steps or update_step < interval:
        return 1.0
    return min(1.0, (update_step % interval + 1) / (warmup_steps + 1))


def _half_cosine(progress: float, floor: float) -> float:
    """1 at progress 0, `floor` at progress 1."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(step: float, total: int, warmup: int) -> float:
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: float, cycle: int, warmup: int, floor: float) -> float:
    in_cycle = step % cycle
    if in_cycle < warmup:
        # Published: a later cycle does not start from exactly 0, so that Adam's direction is not thrown away.
        if in_cycle != step and in_cycle < 2:
            return 1e-7
        return in_cycle / max(1, warmup)
    return _half_cosine((in_cycle - warmup) / max(1, cycle - warmup), floor)


def _cosine_restarts(
    step: float, total: int, first_warmup: int, floor: float, restart_every: int, restart_warmup: int, adjust_step: int
) -> float:
    if step < first_warmup:
        return step / max(1, first_warmup)
    shifted = step + adjust_step
    restart_number, in_restart = divmod(shifted, restart_every)
    decay_steps = max(1, total - first_warmup)
    if in_restart < restart_warmup:
        # The warm-up climbs to the cosine's value at the restart itself. As published, restart number 0 is warmed up too:
        # right after the first warm-up, where restart_warmup is longer.
        return in_restart / max(1, restart_warmup) * _half_cosine(restart_number * restart_every / decay_steps, floor)
    return _half_cosine((shifted - first_warmup) / decay_steps, floor)


def validate(
    *,
    scheduler: str,
    num_training_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    cycle_length: int | None = None,
    restart_warmup_steps: int | None = None,
    adjust_step: int = 0,
) -> list[str]:
    """Problems of arguments that `lr_at` cannot compute with: one line each, with values, reason and the flag to change."""
    if scheduler not in SCHEDULERS:
        return [f"--scheduler {scheduler}: not one of {', '.join(SCHEDULERS)}"]
    problems: list[str] = []
    if num_training_steps < 1:
        problems.append(f"--num_training_steps {num_training_steps}: must be at least 1")
    if not 0 <= warmup_steps <= num_training_steps:
        problems.append(f"--warmup_steps {warmup_steps}: must be between 0 and --num_training_steps {num_training_steps}")
    if not 0 <= min_lr_ratio <= 1:
        problems.append(f"--min_lr_ratio {min_lr_ratio}: must be between 0 and 1 (it is a share of --lr)")
    if adjust_step != 0 and scheduler != "cosine_restarts":
        problems.append(f"--adjust_step {adjust_step}: only --scheduler cosine_restarts shifts its restarts; leave it 0")
    if scheduler == "linear":
        return problems
    if cycle_length is not None and (cycle_length < 1 or num_training_steps % cycle_length):
        problems.append(
            f"--cycle_length {cycle_length}: must divide --num_training_steps {num_training_steps}, as cycles are complete; "
            "change one of the two"
        )
    if scheduler == "cosine" and cycle_length is not None and cycle_length < warmup_steps:
        problems.append(f"--cycle_length {cycle_length}: must be at least --warmup_steps {warmup_steps} (each cycle warms up)")
    if scheduler == "cosine_restarts":
        problems += _restart_problems(
            num_training_steps, warmup_steps, min_lr_ratio, cycle_length, restart_warmup_steps, adjust_step
        )
    return problems


def _restart_problems(
    total: int, warmup: int, floor: float, cycle_length: int | None, restart_warmup: int | None, adjust_step: int
) -> list[str]:
    problems: list[str] = []
    if cycle_length is None:
        problems.append("--scheduler cosine_restarts needs --cycle_length (updates between restarts)")
    if restart_warmup is None:
        problems.append("--scheduler cosine_restarts needs --restart_warmup_steps (updates of warm-up after a restart)")
    elif restart_warmup < 0 or (cycle_length is not None and restart_warmup > cycle_length):
        problems.append(f"--restart_warmup_steps {restart_warmup}: must be between 0 and --cycle_length {cycle_length}")
    if floor <= 0:
        problems.append(f"--min_lr_ratio {floor}: --scheduler cosine_restarts needs a value above 0")
    shifted = adjust_step + warmup
    if adjust_step < 0 or shifted > total or (cycle_length is not None and shifted > cycle_length):
        problems.append(
            f"--adjust_step {adjust_step}: must be 0 or more, and with --warmup_steps {warmup} added at most "
            f"--cycle_length {cycle_length} and --num_training_steps {total}"
        )
    return problems
