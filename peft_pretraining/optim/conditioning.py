"""Gradient conditioning, as Stable-SPAM does it, in front of an Adam."""

from __future__ import annotations

from typing import Any

import torch

from peft_pretraining.optim.slices import SLICE_ELEMENTS
from peft_pretraining.optim.updates import Combined, l2_norm


class Conditioned(Combined):
    """An Adam behind gradient conditioning: conditions each tensor's gradient as Stable-SPAM does (arXiv 2502.17055), then steps.

    Entries above a running maximum are clipped to it; then the gradient is scaled to the size of its norm's running mean, divided
    by the root of the norm's running mean square. Both work on one tensor at a time. Resets of the moments, and the decay of
    beta1, are the trainer's (`training.restarts`, `optim.updates.set_schedule`).

    State of each tensor: `conditioning` (3,) float32: the running maximum, mean norm and mean square norm; `num_conditioned`: the
    number of its steps, which resets of the moments leave alone, because the averages above go on.
    """

    MAXIMUM_DECAY, NORM_DECAYS = 0.999, (0.7, 0.9)

    def __init__(self, adam: torch.optim.Optimizer):
        super().__init__([adam])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Conditions all gradients, in place, and steps."""
        conditions: dict[torch.Tensor, dict[str, Any]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    conditions[parameter] = self._condition_(parameter.grad, self.state[parameter])
        super().step()
        # Written after the step, because Adam initialises a state that is empty.
        for parameter, condition in conditions.items():
            self.state[parameter].update(condition)

    def prepare_states(self) -> None:
        """Creates the states now instead of in the first step, where the Adam supports it."""
        super().prepare_states()
        for group in self.param_groups:
            for parameter in group["params"]:
                # A state that is empty is for the Adam to create.
                if state := self.state[parameter]:
                    state.update({"conditioning": torch.zeros(3, device=parameter.device), "num_conditioned": 0})

    def _condition_(self, gradient: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Conditions a gradient in place; returns the new entries of its state."""
        number = state.get("num_conditioned", 0) + 1
        averages = state.get("conditioning")
        if averages is None:
            averages = torch.zeros(3, dtype=torch.float32, device=gradient.device)
        mean_decay, square_decay = self.NORM_DECAYS
        largest = torch.linalg.vector_norm(gradient, ord=torch.inf).float()
        maximum = averages[0] * self.MAXIMUM_DECAY + largest * (1 - self.MAXIMUM_DECAY)
        limit = maximum / (1 - self.MAXIMUM_DECAY**number)
        # Published: entries above the limit are scaled by limit / largest, all others stay.
        scale = torch.where(largest > limit, limit / largest, torch.ones_like(limit))
        # By slices of rows, so that no temporary has the gradient's size.
        for part in gradient.split(max(1, SLICE_ELEMENTS * len(gradient) // gradient.numel())):
            part.mul_(torch.where(part.abs() > limit, scale, torch.ones_like(scale)).to(part.dtype))
        norm = l2_norm(gradient)
        mean = averages[1] * mean_decay + norm * (1 - mean_decay)
        square = averages[2] * square_decay + norm.square() * (1 - square_decay)
        size = mean / (1 - mean_decay**number) / ((square / (1 - square_decay**number)).sqrt() + 1e-8)
        # A zero gradient stays zero.
        gradient.mul_((size / norm.clamp(min=torch.finfo(torch.float32).tiny)).to(gradient.dtype))
        return {"conditioning": torch.stack([maximum, mean, square]), "num_conditioned": number}
