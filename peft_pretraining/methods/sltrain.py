"""SLTrain (arXiv 2406.02214): attention and MLP linears are (alpha / r) B A + S, with S sparse on a fixed support."""

from __future__ import annotations

import math

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.model_config import ModelConfig, linear_shapes
from peft_pretraining.config.supports import SUPPORTS
from peft_pretraining.methods.lowrank import LowRank
from peft_pretraining.methods.method import TensorGroup


class SLTrain(LowRank):
    """SLTrain: low-rank training with sparse values in addition to the factors."""

    name = "sltrain"
    title = "SLTrain"
    description = "SLTrain (arXiv 2406.02214), W = (alpha/r) B A + S"
    colour = "#0072B2"
    sparse = True

    def value_problems(self, args: Arguments) -> dict[str, str]:
        """Refuses a share of sparse entries outside (0, 1)."""
        if 0 < args.sp_ratio < 1:
            return {}
        problem = (
            f"--sp_ratio {args.sp_ratio}: must lie strictly between 0 and 1 (e.g. 0.03); for no sparse part use "
            "--peft_model lowrank"
        )
        return {"sp_ratio": problem}

    def problems(self, args: Arguments) -> list[str]:
        """Also refuses shares that this kind of support cannot have."""
        problem = SUPPORTS[args.support].problem(args.sp_ratio)
        return [*([problem] if problem else []), *super().problems(args)]

    def model_problems(self, args: Arguments, model: ModelConfig) -> list[str]:
        """Also refuses supports that do not fit the smallest weight, which also has the fewest rows or columns."""
        smallest = min(linear_shapes(model), key=math.prod)
        problem = SUPPORTS[args.support].fit_problem(args.sp_ratio, *smallest)
        return [*([problem] if problem else []), *super().model_problems(args, model)]

    def linear_groups(
        self, shape: tuple[int, int], count: int, *, rank: int, sparsity: float, train_scaling: bool, support: str
    ) -> list[TensorGroup]:
        """Groups of the factors and the sparse values."""
        kind = SUPPORTS[support]
        entries = math.prod(shape) if kind.stored else 0
        values = TensorGroup("sparse", (kind.nonzeros(*shape, sparsity),), count, support_entries=entries)
        return [
            *super().linear_groups(shape, count, rank=rank, sparsity=sparsity, train_scaling=train_scaling, support=support),
            values,
        ]


METHOD = SLTrain()
