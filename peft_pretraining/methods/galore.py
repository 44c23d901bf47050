"""GaLore (arXiv 2403.03507): dense linears whose gradients are projected into low-rank subspaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_pretraining.config.arguments import (
    Arguments,
)
from peft_pretraining.config.model_config import ModelConfig, linear_shapes

if TYPE_CHECKING:
    from torch import nn


def _wide_subspace(args: Arguments, model: ModelConfig) -> list[str]:
    """A warning where GaLore's projections leave the gradients as large as they are."""
    largest = max(min(shape) for shape in linear_shapes(model))
    if args.peft_model != "galore" or args.rank < largest:
        return []
    return [
        f"--rank {args.rank} with --peft_model galore: no weight's shorter side is above {largest}, so that projected "
        f"gradients are as large as whole ones, and projections come on top; use --rank {largest // 4}, or --peft_model full"
    ]


def _subspace(args: Arguments) -> str:
    if args.peft_model != "galore":
        return ""
    kind = f"{args.proj_type}, anew every {args.update_proj_gap} updates, scale {args.galore_scale:g}"
    return f" in subspaces of rank {args.rank} ({kind})"


def _galore(model: nn.Module, args: Arguments) -> list[str]:
    """Every weight dense and trained (arXiv 2403.03507): what differs is how `projected_matrices` are stepped."""
    return []


def projected_matrices(model: nn.Module) -> list[str]:
    """Names of the weights whose gradients GaLore projects: those of the linears that the other methods replace."""
    from torch import nn

    from sparse_lora.reparameterize import DEFAULT_TARGETS

    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(target in name for target in DEFAULT_TARGETS)
    ]
