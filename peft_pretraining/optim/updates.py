"""The optimizer's share of an update: of all parameters after the backward pass, or of each one inside it (per-layer).

Both are driven alike by `train.train_step`: `begin`, `before_backward` for each micro-batch, `finish`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from peft_pretraining.distributed import World, all_reduce_sum_


class HasState(Protocol):
    """What checkpoints and the learning rate need of an optimizer."""

    state: Any  # parameter -> its state
    param_groups: list[dict[str, Any]]


@runtime_checkable
class PreparesStates(Protocol):
    """An optimizer that can make its states before its first step."""

    def prepare_states(self) -> None:
        """Make the states of every parameter."""


class Updates(Protocol):
    """How parameters are updated."""

    growth: GrowthLimit | None
    averages_gradients: bool  # over processes, so that the module must not
    steps_in_backward: bool  # in the last one of an update

    @property
    def optimizer(self) -> HasState:
        """What holds the states and learning rates."""

    def begin(self, lr: float) -> None:
        """A new update, with this learning rate."""

    def before_backward(self, last: bool) -> None:
        """The backward pass of a micro-batch follows; `last` of the update or not."""

    def finish(self, loss: torch.Tensor) -> Outcome:
        """All parameters are updated and gradients freed on return. loss: of the update, the same on every process."""

    def abandon(self) -> Outcome:
        """Free the gradients of an update that is not made."""


class Outcome(NamedTuple):
    """What became of an update; on the device, so that nothing waits for it."""

    gradnorm: torch.Tensor  # the true global L2 norm, before limits, float32
    skipped: torch.Tensor  # tensors that were not stepped because a number in them was not finite, float32


class GrowthLimit:
    """Limits each tensor's gradient norm to `factor` times what it was in the update before (Fira, arXiv 2410.01623).

    Clipping by the global norm has to see all gradients before the first one is used; this needs one at a time.
    """

    def __init__(self, factor: float, num_tensors: int, device: torch.device):
        """The first gradient of a tensor that is not zero is taken as it is."""
        self.factor = factor
        self.previous = torch.zeros(num_tensors, dtype=torch.float32, device=device)

    def limit_(self, number: int, gradient: torch.Tensor, norm: torch.Tensor) -> None:
        """Scale the gradient of tensor `number`, whose L2 norm is `norm`, in place."""
        previous = self.previous[number]
        allowed = torch.where(previous > 0, previous * self.factor, norm)
        scale = torch.where(norm > allowed, allowed / norm, torch.ones_like(norm))
        gradient.mul_(scale.to(gradient.dtype))
        self.previous[number] = torch.where(torch.isfinite(norm), norm * scale, previous)


class WholeUpdate:
    """Every gradient is there before the first parameter is stepped: clipping by the global norm is possible."""

    averages_gradients = steps_in_backward = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        *,
        grad_clipping: float | None = None,
        growth: GrowthLimit | None = None,
        free_gradients: bool = True,
    ):
        """grad_clipping: largest global gradient norm, None for no limit. free_gradients: False zeroes them instead: those
        of DistributedDataParallel are views of its buckets, which stay, and new ones would take their size once more."""
        self.optimizer, self.growth, self._free = optimizer, growth, free_gradients
        self._parameters, self._grad_clipping = list(parameters.values()), grad_clipping

    def begin(self, lr: float) -> None:
        """A new update, with this learning rate."""
        self.optimizer.zero_grad(set_to_none=self._free)
        _set_lr(self.optimizer, lr)

    def before_backward(self, last: bool) -> None:
        """Nothing to prepare: gradients add up."""

    @torch.no_grad()
    def finish(self, loss: torch.Tensor) -> Outcome:
        """Limit, clip, step, free; nothing is stepped where the loss or the norm of all gradients is not finite."""
        gradients = [parameter.grad for parameter in self._parameters]
        norms = [_norm(gradient) for gradient in gradients if gradient is not None]
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        bad = ~(torch.isfinite(total) & torch.isfinite(loss))
        if self.growth is not None:
            self._limit_growth(gradients, bad)
        if self._grad_clipping is not None:
            clip_([gradient for gradient in gradients if gradient is not None], self._grad_clipping)
        step_unless(self.optimizer, bad)
        self.optimizer.zero_grad(set_to_none=self._free)
        return Outcome(total, bad * float(len(norms)))

    def _limit_growth(self, gradients: list[torch.Tensor | None], bad: torch.Tensor) -> None:
        assert self.growth is not None
        before = self.growth.previous.clone()
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                self.growth.limit_(number, gradient, _norm(gradient))
        self.growth.previous.copy_(torch.where(bad, before, self.growth.previous))

    def abandon(self) -> Outcome:
        """As if there had been no micro-batch."""
        self.optimizer.zero_grad(set_to_none=self._free)
        return _nothing_stepped(len(self._parameters), self._parameters[0].device)


class PerLayerUpdate:
    """Each parameter is stepped as soon as its gradient is complete, in the backward pass, and the gradient freed at once.

    In the last micro-batch of an update: with accumulation the gradients of the earlier ones stay until then. With several
    processes each gradient is averaged over them here, before the step: a hook under DistributedDataParallel would fire before
    its all-reduce, and the processes would drift apart.
    """

    averages_gradients = steps_in_backward = True

    def __init__(
        self,
        build: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
        parameters: Mapping[str, nn.Parameter],
        world: World,
        *,
        growth: GrowthLimit | None = None,
    ):
        """build: an optimizer for the parameters that it is given, here one at a time."""
        self.optimizer = _OptimizerSet([build({name: parameter}) for name, parameter in parameters.items()])
        self.growth, self._world, self._armed = growth, world, False
        device = next(iter(parameters.values())).device
        self._parameters = list(parameters.values())
        self._norms = torch.zeros(len(parameters), dtype=torch.float32, device=device)
        self._skipped = torch.zeros((), dtype=torch.float32, device=device)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._step, number))
            for number, parameter in enumerate(parameters.values())
        ]

    def begin(self, lr: float) -> None:
        """A new update, with this learning rate."""
        self._norms.zero_()
        self._skipped.zero_()
        _set_lr(self.optimizer, lr)

    def before_backward(self, last: bool) -> None:
        """Step in this backward pass if it is the update's last."""
        self._armed = last

    @torch.no_grad()
    def _step(self, number: int, parameter: torch.Tensor) -> None:
        """The hook: parameter `number` has its whole gradient."""
        if not self._armed or parameter.grad is None:
            return
        if self._world.size > 1:
            all_reduce_sum_(parameter.grad, self._world).div_(self._world.size)
        norm = _norm(parameter.grad)
        self._norms[number] = norm
        # The averaged gradient is the same on every process, and so is this flag.
        bad = ~torch.isfinite(norm)
        self._skipped += bad
        if self.growth is not None:
            self.growth.limit_(number, parameter.grad, norm)
        step_unless(self.optimizer.members[number], bad)
        parameter.grad = None

    def finish(self, loss: torch.Tensor) -> Outcome:
        """Nothing is left to step; tensors whose gradient was not finite were not."""
        self._armed = False
        return Outcome(torch.linalg.vector_norm(self._norms), self._skipped.clone())

    def abandon(self) -> Outcome:
        """Gradients of earlier micro-batches go."""
        self._armed = False
        for parameter in self._parameters:
            parameter.grad = None
        return _nothing_stepped(len(self._parameters), self._skipped.device)


class _OptimizerSet:
    """Optimizers of one parameter each, with one state for checkpoints."""

    def __init__(self, members: list[torch.optim.Optimizer]):
        self.members = members
        self.state: Any = defaultdict(dict)
        for member in members:
            member.state = self.state
            # Moments made in the midst of a backward pass would lie scattered among its temporaries, and the gaps between them
            # fit no later ones: 0.7 GiB of 1b's peak on a CPU. torch's own make theirs in the first step all the same.
            if isinstance(member, PreparesStates):
                member.prepare_states()
        self.param_groups = [group for member in members for group in member.param_groups]


def _nothing_stepped(num_tensors: int, device: torch.device) -> Outcome:
    return Outcome(torch.full((), torch.nan, device=device), torch.full((), float(num_tensors), device=device))


def step_unless(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> None:
    """Step, unless the flag `bad` (on the device) is set: then states, step counts too, and parameters stay as they are.

    torch's fused optimizers read the flag in their kernels. The others, and SGD's first step, which makes its momentum there,
    need it in Python: on a GPU that waits for the backward pass.
    """
    started = all(optimizer.state.get(parameter) for group in optimizer.param_groups for parameter in group["params"])
    if getattr(optimizer, "_step_supports_amp_scaling", False) and started:
        optimizer.grad_scale, optimizer.found_inf = None, bad.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(bad):
        optimizer.step()


def _set_lr(optimizer: HasState, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """L2 norm, summed in float32: a bfloat16 sum of squares would keep three digits."""
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm


def clip_(gradients: list[torch.Tensor], max_norm: float) -> None:
    """Scale all gradients down, in place, so that their global L2 norm is at most `max_norm`."""
    total = torch.linalg.vector_norm(torch.stack([_norm(gradient) for gradient in gradients]))
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))
