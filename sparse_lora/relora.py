"""ReLoRALinear: a frozen dense weight plus a trained low-rank part, which is merged into the weight at intervals."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import without_autocast
from .linear import hyperparameter_problems
from .support import generator_for


class ReLoRALinear(nn.Module):
    """y = x (W0 + (alpha / rank) B A)^T + bias, W0 frozen (arXiv 2307.05695, section 3).

    Parameters: the frozen `weight` (out, in), W0; the trained `lora_A` (rank, in), `lora_B` (out, rank), and optional `scaling`
    (1,) and `bias` (out,). W0 and bias have nn.Linear's names, so that full-rank checkpoints fit.

    Initial values of the factors: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, as published, so attaching them does not change outputs.

    Args:
        in_features, out_features: shape of the weight, (out_features, in_features).
        rank: rank of B A, at least 1.
        alpha: the low-rank part is scaled by alpha / rank.
        bias: add a bias.
        trainable_scaling: scale by tanh(c) with c a trained scalar that starts at 1, instead of alpha / rank.
        device, dtype: of the parameters, which the constructor leaves undefined; see `initial_values`.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float = 32.0,
        bias: bool = False,
        trainable_scaling: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        problems = hyperparameter_problems(rank, 0.0, alpha, "uniform", "auto")
        if problems:
            raise ValueError("; ".join(problems))
        self.in_features, self.out_features, self.rank, self.alpha = in_features, out_features, rank, alpha

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        self.weight = nn.Parameter(empty(out_features, in_features), requires_grad=False)
        self.lora_A = nn.Parameter(empty(rank, in_features))
        self.lora_B = nn.Parameter(empty(out_features, rank))
        self.scaling = nn.Parameter(empty(1)) if trainable_scaling else None
        self.bias = nn.Parameter(empty(out_features)) if bias else None

    def initial_values(self, seed: int, name: str, restart: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Yields (parameter name, float32 CPU tensor) of the factors and the scaling.

        Args:
            seed: the run's seed.
            name: the layer's qualified name in its model.
            restart: number of merges so far; A is drawn differently after each.
        """
        bound = 1 / math.sqrt(self.in_features)
        key = f"{name}.lora_A" if restart == 0 else f"{name}.lora_A/restart/{restart}"
        values = torch.empty(self.rank, self.in_features, dtype=torch.float32, device="cpu")
        yield "lora_A", values.uniform_(-bound, bound, generator=generator_for(seed, key))
        yield "lora_B", torch.zeros(self.out_features, self.rank, device="cpu")
        if self.scaling is not None:
            yield "scaling", torch.ones(1, device="cpu")

    def effective_scaling(self) -> float | Tensor:
        """Returns the factor of B A: alpha / rank, or tanh(scaling), (1,), if the scaling is trained."""
        return self.alpha / self.rank if self.scaling is None else torch.tanh(self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features). Keeps x and x A^T, rank numbers per row, for backward."""
        dense = F.linear(x, self.weight, self.bias)
        h = F.linear(x, self.lora_A).reshape(-1, self.rank)
        scaling, B = self._scaling_and_B()
        return torch.addmm(dense.reshape(-1, self.out_features), h, B.t(), alpha=scaling).view(dense.shape)

    def dense_weight(self) -> Tensor:
        """Returns the weight (out_features, in_features) that the layer applies, in its parameters' dtype; differentiable."""
        scaling, B = self._scaling_and_B()
        with without_autocast(B):
            return torch.addmm(self.weight, B, self.lora_A, alpha=scaling)

    def _scaling_and_B(self) -> tuple[float, Tensor]:
        """Returns a number and a matrix (out, rank) whose product is scaling * B; a trained scaling is inside the matrix."""
        scaling = self.effective_scaling()
        if isinstance(scaling, Tensor):
            return 1.0, (self.lora_B * scaling).to(self.lora_B.dtype)
        return scaling, self.lora_B

    def extra_repr(self) -> str:
        scaling = f"alpha={self.alpha}" if self.scaling is None else "trainable_scaling=True"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, {scaling}, "
            f"bias={self.bias is not None}"
        )
