"""Steps parameters: all after the backward pass (WholeUpdate), or each one during it (PerLayerUpdate).

`training.update.train_step` calls both in the same way: `begin`, `before_backward` for each micro-batch, then `finish`, or
`abandon` if the update cannot be completed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_pretraining.distributed.device import trim_heap
from peft_pretraining.distributed.parallel import average_, local, local_parameters
from peft_pretraining.distributed.world import World, all_reduce_sum_
from peft_pretraining.model.row_gradient import RowGradient
from peft_pretraining.optim.slices import SLICE_ELEMENTS, GradientSlices, StepsSlices, slices

# On a CPU torch adds up a norm's squares in 8 float32 sums, one after the other. For this many equal elements, the worst case,
# the relative error is at most 3e-7; for 1,024, up to which the library's norm is called directly, 1e-6.
_NORM_ELEMENTS = 256
# The square of a larger norm may overflow float32.
_LARGEST_NORM = 1e18
# Number of parameters from which freed host memory is returned to the system; for smaller models it is not worth the time.
_TRIM_ELEMENTS = 2**24


@runtime_checkable
class PreparesStates(Protocol):
    """An optimizer that can create its states before its first step."""

    def prepare_states(self) -> None:
        """Create the states of every parameter."""


Build = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]


class Outcome(NamedTuple):
    """The result of an update; tensors on the device, so that the CPU need not wait for them."""

    gradnorm: torch.Tensor  # global L2 norm before any limit, float32
    skipped: torch.Tensor  # number of tensors not stepped as their gradient was not finite, float32


class GrowthLimit:
    """Limits each tensor's gradient norm to `factor` times its norm in the previous update (Fira, arXiv 2410.01623).

    Unlike clipping by the global norm, this needs one gradient at a time.
    """

    def __init__(self, factor: float, num_tensors: int, device: torch.device):
        """The first non-zero gradient of a tensor is not limited."""
        self.factor = factor
        self.previous = torch.zeros(num_tensors, dtype=torch.float32, device=device)

    def limit_(self, number: int, gradient: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Scales the gradient of tensor `number`, whose L2 norm is `norm`, in place; returns the norm after it."""
        previous = self.previous[number]
        allowed = torch.where(previous > 0, previous * self.factor, norm)
        scale = torch.where(norm > allowed, allowed / norm, torch.ones_like(norm))
        gradient.mul_(scale.to(gradient.dtype))
        return norm * scale

    def remember(self, number: int, norm: torch.Tensor, bad: torch.Tensor) -> None:
        """Keeps the limited norm of tensor `number` for the next update, unless the flag `bad` says that it is not stepped."""
        self.previous[number] = torch.where(bad, self.previous[number], norm)


class WholeUpdate:
    """Steps all parameters after the backward pass, so that gradients can be clipped by their global norm."""

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
        """build: makes an optimizer for given parameters. parameters: all plain, or all sharded by FSDP2.

        grad_clipping: largest global gradient norm, None for no limit. free_gradients: False zeroes gradients instead, as those
        of DistributedDataParallel are views of its permanent buckets, and new ones would take additional memory.
        """
        self.stepped = local_parameters(parameters)
        self.optimizer, self.growth, self._free = build(self.stepped), growth, free_gradients
        self._parameters, self._world, self._grad_clipping = list(parameters.values()), world, grad_clipping
        self._shards = [(p, self.stepped[name]) for name, p in parameters.items() if isinstance(p, DTensor)]

    def begin(self, lr: float, progress: float = 0.0) -> None:
        """Starts a new update with this learning rate; progress: share of the run that is over."""
        self._drop_gradients()
        set_schedule(self.optimizer, lr, progress)

    def before_backward(self, last: bool) -> None:
        """Does nothing: gradients accumulate."""

    @torch.no_grad()
    def finish(self, loss: torch.Tensor) -> Outcome:
        """Limits, clips, steps and frees; steps nothing if the loss or the global gradient norm is not finite."""
        gradients = {n: p.grad for n, p in enumerate(self._parameters) if p.grad is not None}
        norms = gradient_norms(list(gradients.values()), self._world)
        total = l2_norm(norms)
        bad = ~(torch.isfinite(total) & torch.isfinite(loss))
        if self.growth is not None:
            self._limit_growth(self.growth, gradients, norms, bad)
        if self._grad_clipping is not None:
            limited = total if self.growth is None else l2_norm(gradient_norms(list(gradients.values()), self._world))
            clip_(list(gradients.values()), limited, self._grad_clipping)
        for parameter, shard in self._shards:
            shard.grad = None if parameter.grad is None or not shard.numel() else local(parameter.grad)
        step_unless(self.optimizer, bad)
        self._drop_gradients()
        return Outcome(total, bad * float(len(norms)))

    def _limit_growth(
        self, growth: GrowthLimit, gradients: dict[int, torch.Tensor], norms: torch.Tensor, bad: torch.Tensor
    ) -> None:
        for (number, gradient), norm in zip(gradients.items(), norms, strict=True):
            growth.remember(number, growth.limit_(number, local(gradient), norm), bad)

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=self._free)
        for parameter, _ in self._shards:
            parameter.grad = None

    def abandon(self) -> Outcome:
        """Frees the gradients accumulated so far."""
        self._drop_gradients()
        return _nothing_stepped(len(self._parameters), self._parameters[0].device)


class PerLayerUpdate:
    """Steps each parameter in the backward pass as soon as its gradient is complete, then frees the gradient.

    Steps happen in the last micro-batch of an update; with accumulation, gradients stay until then. With several processes, each
    gradient is averaged here before the step: under DistributedDataParallel the hook would run before the all-reduce, and the
    processes would diverge. FSDP2 calls the hook after its reduce-scatter, with this process's part of the averaged gradient; the
    norm of the whole tensor is then summed over the parts.

    A parameter of `by_rows` is stepped slice by slice where its whole gradient is not needed otherwise: in one process, without a
    growth limit and without gradients of earlier micro-batches, by an optimizer that is a StepsSlices.
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
        joint: Sequence[tuple[str, ...]] = (),
        by_rows: Collection[str] = (),
    ):
        """build: makes an optimizer for given parameters, here for each one alone. parameters: plain, or sharded by FSDP2.

        reduce_dtype: dtype in which gradients are summed over processes (None: unchanged); FSDP2 has a separate setting.
        joint: names of parameters that are stepped together, once the gradients of all are complete.
        by_rows: names of parameters whose gradient may come as a RowGradient: the embedding and the output head if they are not
        tied, because the gradient of such a parameter is the only one of a backward pass.
        """
        self.stepped = local_parameters(parameters)
        together = {name: names for names in joint for name in names}
        # In the order of the parameters; each name of parameters that are stepped together leads to the same step.
        joint_steps = {
            names: JointStep(build({name: self.stepped[name] for name in names}), len(names))
            for names in (together.get(name, (name,)) for name in self.stepped)
        }
        self._joint_steps = [joint_steps[together.get(name, (name,))] for name in self.stepped]
        self.optimizer = Combined([step.optimizer for step in joint_steps.values()])
        # Moments created during a backward pass fragment memory between its temporaries: 0.7 GiB of 1b's peak on a CPU. torch's
        # optimizers still create theirs in the first step.
        self.optimizer.prepare_states()
        self.growth, self._world, self._reduce_dtype, self._armed = growth, world, reduce_dtype, False
        device = next(iter(parameters.values())).device
        self._parameters = list(parameters.values())
        self._norms = torch.zeros(len(parameters), dtype=torch.float32, device=device)
        self._skipped = torch.zeros((), dtype=torch.float32, device=device)
        self._trims = device.type == "cpu" and sum(parameter.numel() for parameter in self._parameters) >= _TRIM_ELEMENTS
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._step, number, self.stepped[name]))
            for number, (name, parameter) in enumerate(parameters.items())
        ]
        for number, (name, parameter) in enumerate(parameters.items()):
            slices_suffice = world.size == 1 and growth is None and isinstance(self._joint_steps[number].optimizer, StepsSlices)
            if name in by_rows and slices_suffice:
                parameter.take_rows = partial(self._step_rows, number, parameter)  # type: ignore[attr-defined]

    def begin(self, lr: float, progress: float = 0.0) -> None:
        """Starts a new update with this learning rate; progress: share of the run that is over."""
        self._norms.zero_()
        self._skipped.zero_()
        set_schedule(self.optimizer, lr, progress)

    def before_backward(self, last: bool) -> None:
        """Steps parameters in this backward pass if it is the last of the update."""
        self._armed = last
        self._trim()

    @torch.no_grad()
    def _step(self, number: int, stepped: nn.Parameter, parameter: torch.Tensor) -> None:
        """The hook of parameter `number`, called when its gradient is complete. stepped: this process's part of the parameter."""
        if not self._armed or parameter.grad is None:
            return
        if self._world.size > 1 and not isinstance(parameter, DTensor):
            average_(parameter.grad, self._world, self._reduce_dtype)
        norm = gradient_norms([parameter.grad], self._world)[0]
        self._norms[number] = norm
        gradient = local(parameter.grad)
        limited = norm if self.growth is None else self.growth.limit_(number, gradient, norm)
        if stepped.numel():
            stepped.grad = gradient
        joint = self._joint_steps[number]
        # The norm is the same on every process, as the averaged gradient is, or (sharded) the norm over all parts.
        joint.add(Arrived(number, limited, stepped, parameter), ~torch.isfinite(norm))
        if joint.complete:
            self._finish_step(joint)

    def _finish_step(self, joint: JointStep) -> None:
        """Makes a complete joint step and frees its gradients; one non-finite gradient leaves all its parameters as they are."""
        if any(one.stepped.numel() for one in joint.arrived):
            step_unless(joint.optimizer, joint.bad)
        if self.growth is not None:
            for one in joint.arrived:
                self.growth.remember(one.number, one.norm, joint.bad)
        self._skipped += joint.bad * float(joint.size)
        joint.free()

    @torch.no_grad()
    def _step_rows(self, number: int, parameter: nn.Parameter, gradient: RowGradient) -> bool:
        """Steps parameter `number` slice by slice; returns False if it needs the whole gradient."""
        if not self._armed or parameter.grad is not None:
            return False
        self._trim()
        optimizer = self._joint_steps[number].optimizer
        assert isinstance(optimizer, StepsSlices)
        norm, finite = use_in_slices(gradient, partial(optimizer.step_slices, parameter))
        self._norms[number] = norm
        self._skipped += not finite
        return True

    def finish(self, loss: torch.Tensor) -> Outcome:
        """Returns the result; all tensors with finite gradients have been stepped in the backward pass."""
        self._armed = False
        for joint in self._joint_steps:
            # A joint step is left incomplete if one of its parameters got no gradient.
            joint.free()
        self._trim()
        return Outcome(l2_norm(self._norms), self._skipped.clone())

    def _trim(self) -> None:
        """Returns freed host memory to the system, at the points of an update with the fewest tensors."""
        if self._trims:
            trim_heap()

    def abandon(self) -> Outcome:
        """Frees the gradients of earlier micro-batches."""
        self._armed = False
        for joint, parameter in zip(self._joint_steps, self._parameters, strict=True):
            joint.free()
            parameter.grad = None
        return _nothing_stepped(len(self._parameters), self._skipped.device)


Updates = WholeUpdate | PerLayerUpdate


class Arrived(NamedTuple):
    """A parameter whose gradient is complete. norm: of the gradient after the growth limit; stepped: this process's part."""

    number: int
    norm: torch.Tensor
    stepped: nn.Parameter
    parameter: torch.Tensor


class JointStep:
    """Parameters, mostly a single one, that an optimizer steps together once all their gradients are complete.

    arrived: those with a complete gradient. bad: whether a gradient is not finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, size: int):
        self.optimizer, self.size = optimizer, size
        self.arrived: list[Arrived] = []
        self.bad = torch.zeros((), dtype=torch.bool)

    @property
    def complete(self) -> bool:
        """Whether all parameters have a complete gradient."""
        return len(self.arrived) == self.size

    def add(self, arrived: Arrived, bad: torch.Tensor) -> None:
        """Adds a parameter whose gradient is complete."""
        self.bad = self.bad | bad if self.arrived else bad
        self.arrived.append(arrived)

    def free(self) -> None:
        """Frees the gradients of the parameters that have arrived."""
        for one in self.arrived:
            one.stepped.grad = one.parameter.grad = None
        self.arrived.clear()


class Combined(torch.optim.Optimizer):
    """Several optimizers of different parameters as one, with one state."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]):
        super().__init__([parameter for member in members for group in member.param_groups for parameter in group["params"]], {})
        self.members = list(members)
        self.quantises = any(getattr(member, "quantises", False) for member in members)
        # The members' own groups, so that whoever sets their learning rates sets the members'.
        self.param_groups = [group for member in members for group in member.param_groups]
        self._share_state()

    def _share_state(self) -> None:
        # Done again before every use, because whoever restores a checkpoint, or combines this with others, may replace the state.
        for member in self.members:
            member.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps every parameter that has a gradient."""
        self._share_state()
        for member in self.members:
            member.step()

    def prepare_states(self) -> None:
        """Creates the states of those members that support it now instead of in the first step."""
        self._share_state()
        for member in self.members:
            if isinstance(member, PreparesStates):
                member.prepare_states()


def use_in_slices(gradient: RowGradient, use: Callable[[GradientSlices], None]) -> tuple[torch.Tensor, bool]:
    """Calls `use` with a function that returns slices of the gradient, unless an element is not finite.

    No slice may be used if any is not finite. `use` asks for each slice once, in order. Waits for the device once, twice for a
    gradient that may not be finite.

    Returns:
        The gradient's L2 norm, and whether it is finite.
    """
    norms: list[torch.Tensor] = []

    def measured(part: slice) -> torch.Tensor:
        elements = gradient.elements(part)
        norms.append(l2_norm(elements))
        return elements

    # The bound almost always rules that out; else all slices are computed in advance.
    if not bool(gradient.norm_bound < _LARGEST_NORM):
        for part in slices(gradient.shape.numel(), SLICE_ELEMENTS):
            measured(part)
        norm = l2_norm(torch.stack(norms))
        if not bool(torch.isfinite(norm)):
            return norm, False
        norms.clear()
    use(measured)
    return l2_norm(torch.stack(norms)), True


def _nothing_stepped(num_tensors: int, device: torch.device) -> Outcome:
    return Outcome(torch.full((), torch.nan, device=device), torch.full((), float(num_tensors), device=device))


def step_unless(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> None:
    """Steps unless the flag `bad` (on the device) is set; parameters, states and step counts then stay unchanged.

    torch's fused optimizers read the flag in their kernels. Other optimizers, and the first step, which creates the state, need
    its value in Python, which on a GPU waits for the backward pass.
    """
    # SGD without momentum never has a state.
    parameters = [p for group in optimizer.param_groups if group.get("momentum", 1) for p in group["params"]]
    started = all(optimizer.state.get(parameter) for parameter in parameters if parameter.numel())
    if getattr(optimizer, "_step_supports_amp_scaling", False) and started:
        optimizer.grad_scale, optimizer.found_inf = None, bad.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(bad):
        optimizer.step()


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, progress: float) -> None:
    """Sets the learning rate of the following steps, and beta1 where it falls over the run; progress: share of the run, 0 to 1.

    A group's rate is `lr` times its `lr_ratio`. A group with `first_beta1` has a beta1 that falls from it to its half along half
    a cosine (Stable-SPAM).
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
        if "first_beta1" in group:
            share = 0.75 + 0.25 * math.cos(math.pi * min(progress, 1.0))
            group["betas"] = (group["first_beta1"] * share, group["betas"][1])


def l2_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the L2 norm of a tensor, a float32 scalar (float64 for float64), relative error a few 1e-7 for any size.

    On a CPU it is the norm of the norms of pieces, because the library's own is 1.4 % too small for 131 million elements. The
    bits do not depend on the number of threads. No temporary has the tensor's size: bfloat16 is converted slice by slice. Only a
    tensor that is not contiguous is copied.
    """
    dtype, count = torch.promote_types(tensor.dtype, torch.float32), tensor.numel()
    if tensor.device.type != "cpu" or count <= 4 * _NORM_ELEMENTS:
        norm: torch.Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
        return norm
    flat = tensor.reshape(-1)
    if tensor.dtype != dtype and count > SLICE_ELEMENTS:
        return l2_norm(torch.stack([l2_norm(part) for part in flat.split(SLICE_ELEMENTS)]))
    rest = count % _NORM_ELEMENTS
    norms = torch.linalg.vector_norm(flat[: count - rest].view(-1, _NORM_ELEMENTS), dim=1, dtype=dtype)
    if rest:
        norms = torch.cat([norms, torch.linalg.vector_norm(flat[-rest:], dtype=dtype)[None]])
    return l2_norm(norms)


def gradient_norms(gradients: list[torch.Tensor], world: World) -> torch.Tensor:
    """Returns the L2 norm of each gradient, shape (len(gradients),) float32, the same on every process.

    gradients: all sharded or all not. Squares are summed in float32, because a bfloat16 sum keeps only about three digits.
    """
    norms = torch.stack(_norms([local(gradient) for gradient in gradients])).float()
    if world.size > 1 and isinstance(gradients[0], DTensor):
        return all_reduce_sum_(norms.square_(), world).sqrt_()
    return norms


def _norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the L2 norm of each tensor, as l2_norm; on a GPU all of them by a few launches instead of one or two for each."""
    if tensors[0].device.type == "cpu":
        return [l2_norm(tensor) for tensor in tensors]
    return list(torch._foreach_norm(tensors, 2, dtype=torch.promote_types(tensors[0].dtype, torch.float32)))


def clip_(gradients: list[torch.Tensor], total_norm: torch.Tensor, max_norm: float) -> None:
    """Scales all gradients in place so that their global L2 norm, now `total_norm`, is at most `max_norm`."""
    scale = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    by_dtype = defaultdict(list)
    for gradient in gradients:
        by_dtype[gradient.dtype].append(local(gradient))
    for dtype, group in by_dtype.items():
        torch._foreach_mul_(group, scale.to(dtype))
