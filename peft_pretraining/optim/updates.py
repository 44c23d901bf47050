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
from torch.distributed.tensor import DTensor

from peft_pretraining.distributed.parallel import average_, gradient_norms, local, local_parameters
from peft_pretraining.distributed.world import World


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
    stepped: dict[str, nn.Parameter]  # what the optimizer steps: of sharded parameters this process's parts
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


Build = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]


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
        build: Build,
        parameters: Mapping[str, nn.Parameter],
        world: World,
        *,
        grad_clipping: float | None = None,
        growth: GrowthLimit | None = None,
        free_gradients: bool = True,
    ):
        """build: an optimizer for the parameters that it is given. parameters: plain, or all of them sharded by FSDP2.

        grad_clipping: largest global gradient norm, None for no limit. free_gradients: False zeroes them instead: those
        of DistributedDataParallel are views of its buckets, which stay, and new ones would take their size once more.
        """
        self.stepped = local_parameters(parameters)
        self.optimizer, self.growth, self._free = build(self.stepped), growth, free_gradients
        self._parameters, self._world, self._grad_clipping = list(parameters.values()), world, grad_clipping
        self._shards = [(p, self.stepped[name]) for name, p in parameters.items() if isinstance(p, DTensor)]

    def begin(self, lr: float) -> None:
        """A new update, with this learning rate."""
        self._drop_gradients()
        set_lr(self.optimizer, lr)

    def before_backward(self, last: bool) -> None:
        """Nothing to prepare: gradients add up."""

    @torch.no_grad()
    def finish(self, loss: torch.Tensor) -> Outcome:
        """Limit, clip, step, free; nothing is stepped where the loss or the norm of all gradients is not finite."""
        gradients = {n: p.grad for n, p in enumerate(self._parameters) if p.grad is not None}
        norms = gradient_norms(list(gradients.values()), self._world)
        total: torch.Tensor = torch.linalg.vector_norm(norms)
        bad = ~(torch.isfinite(total) & torch.isfinite(loss))
        if self.growth is not None:
            self._limit_growth(self.growth, gradients, norms, bad)
        if self._grad_clipping is not None:
            limited = total if self.growth is None else _total_norm(list(gradients.values()), self._world)
            clip_(list(gradients.values()), limited, self._grad_clipping)
        for parameter, shard in self._shards:
            shard.grad = None if parameter.grad is None or not shard.numel() else local(parameter.grad)
        step_unless(self.optimizer, bad)
        self._drop_gradients()
        return Outcome(total, bad * float(len(norms)))

    def _limit_growth(
        self, growth: GrowthLimit, gradients: dict[int, torch.Tensor], norms: torch.Tensor, bad: torch.Tensor
    ) -> None:
        before = growth.previous.clone()
        for (number, gradient), norm in zip(gradients.items(), norms, strict=True):
            growth.limit_(number, local(gradient), norm)
        growth.previous.copy_(torch.where(bad, before, growth.previous))

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=self._free)
        for parameter, _ in self._shards:
            parameter.grad = None

    def abandon(self) -> Outcome:
        """As if there had been no micro-batch."""
        self._drop_gradients()
        return _nothing_stepped(len(self._parameters), self._parameters[0].device)


class PerLayerUpdate:
    """Each parameter is stepped as soon as its gradient is complete, in the backward pass, and the gradient freed at once.

    In the last micro-batch of an update: with accumulation the gradients of the earlier ones stay until then. With several
    processes each gradient is averaged over them here, before the step: a hook under DistributedDataParallel would fire before
    its all-reduce, and the processes would drift apart. FSDP2 calls the hook after its reduce-scatter, with this process's part
    of the averaged gradient; what decides for the whole tensor, its norm, is summed over the parts.
    """

    averages_gradients = steps_in_backward = True

    def __init__(
        self,
        build: Build,
        parameters: Mapping[str, nn.Parameter],
        world: World,
        *,
        growth: GrowthLimit | None = None,
        reduce_dtype: torch.dtype | None = None,
    ):
        """build: an optimizer for the parameters that it is given, here one at a time. parameters: plain, or sharded by FSDP2.

        reduce_dtype: in which gradients are summed over processes, None for their own; FSDP2 has its own setting for that.
        """
        self.stepped = local_parameters(parameters)
        self.optimizer = _OptimizerSet([build({name: stepped}) for name, stepped in self.stepped.items()])
        self.growth, self._world, self._reduce_dtype, self._armed = growth, world, reduce_dtype, False
        device = next(iter(parameters.values())).device
        self._parameters = list(parameters.values())
        self._norms = torch.zeros(len(parameters), dtype=torch.float32, device=device)
        self._skipped = torch.zeros((), dtype=torch.float32, device=device)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._step, number, self.stepped[name]))
            for number, (name, parameter) in enumerate(parameters.items())
        ]

    def begin(self, lr: float) -> None:
        """A new update, with this learning rate."""
        self._norms.zero_()
        self._skipped.zero_()
        set_lr(self.optimizer, lr)

    def before_backward(self, last: bool) -> None:
        """Step in this backward pass if it is the update's last."""
        self._armed = last

    @torch.no_grad()
    def _step(self, number: int, stepped: nn.Parameter, parameter: torch.Tensor) -> None:
        """The hook: parameter `number`, of which `stepped` is this process's part, has its whole gradient."""
        if not self._armed or parameter.grad is None:
            return
        if self._world.size > 1 and not isinstance(parameter, DTensor):
            average_(parameter.grad, self._world, self._reduce_dtype)
        norm = gradient_norms([parameter.grad], self._world)[0]
        self._norms[number] = norm
        # The averaged gradient is the same on every process, or its norm that of all parts, and so is this flag.
        bad = ~torch.isfinite(norm)
        self._skipped += bad
        gradient = local(parameter.grad)
        if self.growth is not None:
            self.growth.limit_(number, gradient, norm)
        if stepped.numel():
            stepped.grad = gradient
            step_unless(self.optimizer.members[number], bad)
        stepped.grad = parameter.grad = None

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
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    started = all(optimizer.state.get(parameter) for parameter in parameters if parameter.numel())
    if getattr(optimizer, "_step_supports_amp_scaling", False) and started:
        optimizer.grad_scale, optimizer.found_inf = None, bad.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(bad):
        optimizer.step()


def set_lr(optimizer: HasState, lr: float) -> None:
    """For the updates to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _total_norm(gradients: list[torch.Tensor], world: World) -> torch.Tensor:
    total: torch.Tensor = torch.linalg.vector_norm(gradient_norms(gradients, world))
    return total


def clip_(gradients: list[torch.Tensor], total_norm: torch.Tensor, max_norm: float) -> None:
    """Scale all gradients down, in place, so that their global L2 norm, `total_norm`, becomes at most `max_norm`."""
    scale = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(scale.to(gradient.dtype))
