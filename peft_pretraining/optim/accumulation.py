"""Updates whose micro-batches' gradients go into the optimizer's moments, so that no gradient of the model stays between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import nn

from peft_pretraining.distributed.parallel import average_
from peft_pretraining.distributed.world import World
from peft_pretraining.model.row_gradient import RowGradient
from peft_pretraining.optim.moments import Accumulating
from peft_pretraining.optim.slices import GradientSlices, StochasticRounding
from peft_pretraining.optim.updates import Arrived, Build, JointStep, PerLayerUpdate, l2_norm, use_in_slices


class AccumulatingUpdate(PerLayerUpdate):
    """Adds each gradient of each micro-batch to its moments in the backward pass and frees it; steps in the last micro-batch.

    With several processes, every micro-batch's gradients are averaged over them first. A gradient that is not finite is not
    added: its tensor is not stepped in this update, and its moments keep what the update's finite gradients added.

    The gradient norm of an update is that of all its micro-batches' gradients together, sqrt(sum |g_i|^2), because the norm of
    their sum is not known. It is at most that norm's size where micro-batches agree, and about its size where they are noise.
    """

    def __init__(
        self,
        build: Build,
        parameters: Mapping[str, nn.Parameter],
        world: World,
        *,
        num_micro_batches: int,
        seed: int,
        reduce_dtype: torch.dtype | None = None,
        joint: Sequence[tuple[str, ...]] = (),
        by_rows: Collection[str] = (),
    ):
        """num_micro_batches: of each update. seed: of the random rounding of moments. Others: as for PerLayerUpdate.

        build: makes an optimizer that is Accumulating.
        """
        super().__init__(build, parameters, world, reduce_dtype=reduce_dtype, joint=joint, by_rows=by_rows)
        self._names, self._num_micro_batches, self._noise = list(parameters), num_micro_batches, StochasticRounding(seed)
        self._micro_batch, self._last = 0, False
        # Numbers of the tensors that have a gradient in their moments in this update, and that had one that is not finite.
        self._started: set[int] = set()
        self._bad: set[int] = set()

    def begin(self, lr: float, progress: float = 0.0) -> None:
        """Starts a new update with this learning rate; progress: share of the run that is over."""
        super().begin(lr, progress)
        self._micro_batch = 0
        self._started.clear()
        self._bad.clear()

    def before_backward(self, last: bool) -> None:
        """Adds this backward pass's gradients to the moments, and steps if it is the last one of the update."""
        super().before_backward(last)
        self._armed, self._last = True, last
        self._micro_batch += 1

    @torch.no_grad()
    def _step(self, number: int, stepped: nn.Parameter, parameter: torch.Tensor) -> None:
        """The hook of parameter `number`, called when its gradient in a micro-batch is complete."""
        if not self._armed or parameter.grad is None:
            return
        gradient, parameter.grad = parameter.grad, None
        if self._world.size > 1:
            average_(gradient, self._world, self._reduce_dtype)
        norm = l2_norm(gradient).float()
        # Waits for the device, as per-layer updates by these optimizers do anyway.
        finite = bool(torch.isfinite(norm))
        if finite:
            self._accumulate(number, stepped, gradient.reshape(-1).__getitem__)
        self._arrive(number, stepped, parameter, norm, finite)

    @torch.no_grad()
    def _step_rows(self, number: int, parameter: nn.Parameter, gradient: RowGradient) -> bool:
        """Adds a gradient to the moments of parameter `number` slice by slice; returns False if the whole gradient is needed."""
        if not self._armed:
            return False
        self._trim()
        norm, finite = use_in_slices(gradient, partial(self._accumulate, number, parameter))
        self._arrive(number, parameter, parameter, norm.float(), finite)
        return True

    def _accumulate(self, number: int, stepped: nn.Parameter, gradient: GradientSlices) -> None:
        cast(Accumulating, self._joint_steps[number].optimizer).accumulate(
            stepped,
            gradient,
            first=number not in self._started,
            share=1 / self._num_micro_batches,
            noise=self._noise,
            key=f"{self._names[number]}/{self._micro_batch}",
        )
        self._started.add(number)

    def _arrive(self, number: int, stepped: nn.Parameter, parameter: torch.Tensor, norm: torch.Tensor, finite: bool) -> None:
        """Notes the norm of a gradient, which is in the moments now if it is finite; in the last micro-batch, steps."""
        self._norms[number] = torch.hypot(self._norms[number], norm)
        if not finite:
            self._bad.add(number)
        if not self._last:
            return
        joint = self._joint_steps[number]
        joint.add(Arrived(number, norm, stepped, parameter), torch.tensor(number in self._bad))
        if joint.complete:
            self._finish_step(joint)

    def _finish_step(self, joint: JointStep) -> None:
        if not bool(joint.bad):
            cast(Accumulating, joint.optimizer).step_from_moments(self._num_micro_batches)
        self._skipped += float(joint.bad) * joint.size
        joint.free()
