"""GaLore (arXiv 2403.03507): steps matrices in the subspace spanned by singular vectors of their gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_pretraining.distributed.world import World, broadcast_
from peft_pretraining.memory.counts import subspace_shapes
from peft_pretraining.optim.slices import SLICE_ELEMENTS, StochasticRounding, round_stochastically_
from peft_pretraining.optim.updates import PreparesStates, set_schedule

# Keys of a matrix's state; all other keys belong to the optimizer of the subspace.
_LEFT, _RIGHT, _UPDATES = "projection_left", "projection_right", "num_updates"


@dataclass(frozen=True)
class Subspace:
    """GaLore's settings.

    rank: rank of the projections. gap: updates between two computations of the projections. scale: factor of the projected-back
    update. proj_type: std | reverse_std | right | left | full, see memory.counts.subspace_shapes.
    """

    rank: int
    gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"


class GaLore(torch.optim.Optimizer):
    """Steps matrices by an inner optimizer on projected gradients, and all other parameters by an ordinary optimizer.

    For a weight W (out, in) with gradient G, k = min(rank, out, in), and P, Q the first k left and right singular vectors of
    the gradient at the last multiple of `gap` updates: R = P^T G, or G Q^T, or P^T G Q^T. The inner optimizer steps a zero tensor
    of R's shape with gradient R to N; then W <- W + scale * (P N, N Q, or P N Q). Skipped updates do not count for `gap`.

    Args:
        matrices: the projected matrices by name, all of the same dtype and on the same device.
        build: creates the inner optimizer of a tensor in the subspace, without weight decay.
        ordinary: optimizer of the other parameters, None if there are none.
        subspace: rank, gap, scale and side of the projections.
        world: the processes, which have equal gradients; rank 0 computes the projections and sends them to the others.
        groups: the projected matrices in parameter groups, with `weight_decay`.
        lr: learning rate.
        decoupled: True for AdamW's weight decay; False adds it to the gradient.
        rounding: stochastic rounding of bfloat16 matrices; None rounds to nearest.
    """

    def __init__(
        self,
        matrices: Mapping[str, nn.Parameter],
        build: Callable[[nn.Parameter], torch.optim.Optimizer],
        ordinary: torch.optim.Optimizer | None,
        subspace: Subspace,
        world: World,
        *,
        groups: list[dict[str, Any]],
        lr: float,
        decoupled: bool,
        rounding: StochasticRounding | None,
    ):
        super().__init__(groups, {"lr": lr})
        self._matrix_groups = list(self.param_groups)
        if ordinary is not None:
            # The same groups, so that whoever sets their learning rates sets those of the ordinary optimizer.
            self.param_groups += ordinary.param_groups
        self._names = {parameter: name for name, parameter in matrices.items()}
        self._ordinary, self._subspace, self._world = ordinary, subspace, world
        self._decoupled, self._rounding = decoupled, rounding
        first = next(iter(matrices.values()))
        # The inner optimizer's only parameter; it holds one matrix's projected tensor at a time.
        self._projected = nn.Parameter(torch.empty(0, dtype=first.dtype, device=first.device))
        self._inner = build(self._projected)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps every parameter that has a gradient."""
        if self._ordinary is not None:
            self._ordinary.state = self.state
            self._ordinary.step()
        for group in self._matrix_groups:
            set_schedule(self._inner, group["lr"], progress=0.0)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step_matrix(matrix, group["lr"], group["weight_decay"])

    def prepare_states(self) -> None:
        """Creates projections, and the moments of optimizers that support it, now instead of in the first step."""
        if isinstance(self._ordinary, PreparesStates):
            self._ordinary.state = self.state
            self._ordinary.prepare_states()
        for matrix in self._names:
            state = self.state[matrix] = self._new_state(matrix)
            if isinstance(self._inner, PreparesStates):
                shapes = subspace_shapes(matrix.shape, self._subspace.rank, self._subspace.proj_type)
                self._enter(state, matrix.new_zeros(shapes.moments))
                self._inner.prepare_states()
                self._leave(state)

    def _new_state(self, matrix: nn.Parameter) -> dict[str, Any]:
        shapes = subspace_shapes(matrix.shape, self._subspace.rank, self._subspace.proj_type)
        state: dict[str, Any] = {_UPDATES: 0}
        if shapes.left is not None:
            state[_LEFT] = matrix.new_zeros(shapes.left)
        if shapes.right is not None:
            state[_RIGHT] = matrix.new_zeros(shapes.right)
        return state

    def _step_matrix(self, matrix: nn.Parameter, lr: float, weight_decay: float) -> None:
        assert matrix.grad is not None
        state, gradient = self.state[matrix], matrix.grad
        if not state:
            state.update(self._new_state(matrix))
        if weight_decay and not self._decoupled:
            # In place: the gradient is not read after the step.
            gradient.add_(matrix, alpha=weight_decay)
        if state[_UPDATES] % self._subspace.gap == 0:
            self._compute_projections(state, gradient)
        update = self._step_projected(state, _into(state, gradient))
        state[_UPDATES] += 1
        kept = 1 - lr * weight_decay if self._decoupled else 1.0
        left, right = _factors(state, update)
        if self._rounding is None or matrix.dtype != torch.bfloat16:
            # Decay and step are rounded together: decay alone is below half of bfloat16's spacing and would be lost.
            matrix.addmm_(left, right, beta=kept, alpha=kept * self._subspace.scale)
            return
        noise = self._rounding.generator(self._names[matrix], state[_UPDATES], matrix.device)
        right, rows = right.float(), max(1, SLICE_ELEMENTS // matrix.shape[1])
        for row_block, factor in zip(matrix.split(rows), left.split(rows), strict=True):
            target = row_block.float().addmm_(factor.float(), right, beta=kept, alpha=kept * self._subspace.scale)
            round_stochastically_(row_block, target, noise)

    def _compute_projections(self, state: dict[str, Any], gradient: torch.Tensor) -> None:
        """Sets the projections to this gradient's singular vectors, in its dtype; moments are unchanged, as published."""
        sides = {name: state[name] for name in (_LEFT, _RIGHT) if name in state}
        if self._world.is_main:
            left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
            for name, projection in sides.items():
                k = min(projection.shape)
                projection.copy_(left[:, :k] if name == _LEFT else right[:k])
        for projection in sides.values():
            # The signs of singular vectors are arbitrary and may differ between machines.
            broadcast_(projection, self._world)

    def _step_projected(self, state: dict[str, Any], gradient: torch.Tensor) -> torch.Tensor:
        """Steps zeros by the inner optimizer with the projected gradient; returns the result N."""
        self._enter(state, torch.zeros_like(gradient))
        self._projected.grad = gradient
        self._inner.step()
        return self._leave(state)

    def _enter(self, state: dict[str, Any], values: torch.Tensor) -> None:
        """Gives the inner optimizer a tensor and the moments of one matrix."""
        self._projected.data = values
        moments = {key: value for key, value in state.items() if key not in (_LEFT, _RIGHT, _UPDATES)}
        self._inner.state = defaultdict(dict, {self._projected: moments} if moments else {})

    def _leave(self, state: dict[str, Any]) -> torch.Tensor:
        """Takes the tensor and the moments back from the inner optimizer; returns the tensor."""
        values = self._projected.data
        state.update(self._inner.state[self._projected])
        self._projected.grad, self._projected.data = None, values.new_empty(0)
        self._inner.state = defaultdict(dict)
        return values


def _into(state: Mapping[str, Any], gradient: torch.Tensor) -> torch.Tensor:
    """Projects the gradient into the subspace."""
    if _LEFT in state:
        gradient = state[_LEFT].t() @ gradient
    return gradient @ state[_RIGHT].t() if _RIGHT in state else gradient


def _factors(state: Mapping[str, Any], update: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns factors (out, k) and (k, in) whose product is the update of the whole matrix."""
    if _RIGHT not in state:
        return state[_LEFT], update
    return (state[_LEFT] @ update if _LEFT in state else update), state[_RIGHT]
