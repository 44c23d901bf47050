"""An example of a training method: low-rank linears with a nonlinearity between the factors, y = B silu(A x) + bias."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.methods.method import Method, TensorGroup, factor_groups
from sparse_lora import generator_for
from sparse_lora.reparameterize import DEFAULT_TARGETS


class NonlinearLinear(nn.Module):
    """y = B silu(A x) + bias, with the bias of the linear that it replaces."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank, **like))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(F.silu(F.linear(x, self.lora_A)), self.lora_B, self.bias)

    def initial_values(self, seed: int, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yields (parameter name, float32 CPU tensor): A ~ N(0, 1 / in), B ~ N(0, 0.02^2 in / rank), bias 0."""
        rank, in_features = self.lora_A.shape
        spreads = {"lora_A": in_features**-0.5, "lora_B": 0.02 * math.sqrt(in_features / rank), "bias": 0.0}
        for own, parameter in self.named_parameters():
            drawn = torch.empty(parameter.shape).normal_(generator=generator_for(seed, f"{name}.{own}"))
            yield own, spreads[own] * drawn


class Nonlinear(Method):
    """Attention and MLP linears are NonlinearLinear; --rank is the number of units between the factors."""

    name = "nonlinear"
    title = "nonlinear low-rank"
    description = "low-rank with a nonlinearity, y = B silu(A x)"
    flags = ("rank",)
    replaces_linears = True
    mergeable = False

    def warnings(self, args, model):
        """Ranks at which the factors of a square weight have more parameters than the weight."""
        size = model.hidden_size
        if 2 * args.rank <= size:
            return []
        return [
            f"--rank {args.rank} with --peft_model nonlinear: the factors of a {size} x {size} weight have more parameters than "
            f"the weight; use --rank {size // 2} or less"
        ]

    def linear_groups(self, shape, count, *, rank, **_) -> list[TensorGroup]:
        """The factors A (rank, in) and B (out, rank)."""
        return factor_groups(shape, count, rank, train_scaling=False)

    def apply(self, model: nn.Module, args: Arguments) -> list[str]:
        """Replace the linears of attention and MLP."""
        linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(target in name for target in DEFAULT_TARGETS)
        }
        for name, linear in linears.items():
            model.set_submodule(name, NonlinearLinear(linear, args.rank))
        return list(linears)


METHOD = Nonlinear()
