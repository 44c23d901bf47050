"""GaLore (arXiv 2403.03507): dense linears whose gradients are projected into low-rank subspaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.model_config import ModelConfig, linear_shapes
from peft_pretraining.methods.method import Method, TensorGroup

if TYPE_CHECKING:
    from torch import nn


class GaLore(Method):
    """GaLore: all weights are dense and trained; the optimizer steps `projected_matrices` in subspaces of their gradients."""

    name = "galore"
    title = "GaLore"
    description = "GaLore (arXiv 2403.03507)"
    colour = "#009E73"
    projected = True
    lighter = "sltrain"

    def problems(self, args: Arguments) -> list[str]:
        """Refuses FSDP, under which no process has a whole gradient to project."""
        if args.parallel != "fsdp":
            return []
        return [
            "--parallel fsdp with --peft_model galore: the projection needs the SVD of a weight's whole gradient, but each "
            "process has only a part; use --parallel ddp (with --per_layer and adam8bit to save memory), or --peft_model sltrain"
        ]

    def warnings(self, args: Arguments, model: ModelConfig) -> list[str]:
        """Warns of a rank at which projected gradients are as large as the gradients."""
        largest = max(min(shape) for shape in linear_shapes(model))
        if args.rank < largest:
            return []
        return [
            f"--rank {args.rank} with --peft_model galore: no weight's shorter side exceeds {largest}, so projected "
            f"gradients are as large as whole ones, and projections need more memory; use --rank {largest // 4}, or "
            "--peft_model full"
        ]

    def optimizer_text(self, args: Arguments) -> str:
        """Describes the subspaces."""
        kind = f"{args.proj_type}, recomputed every {args.update_proj_gap} updates, scale {args.galore_scale:g}"
        return f" in subspaces of rank {args.rank} ({kind})"

    def linear_groups(self, shape: tuple[int, int], count: int, **_: Any) -> list[TensorGroup]:
        """Groups of dense weights that are stepped in a subspace."""
        return [TensorGroup("dense", shape, count, projected=True)]

    def projected_matrices(self, model: nn.Module) -> list[str]:
        """Names of the attention and MLP weights."""
        return projected_matrices(model)


def projected_matrices(model: nn.Module) -> list[str]:
    """Names of the weights whose gradients GaLore projects: the weights of the linears that other methods replace."""
    from torch import nn

    from sparse_lora.reparameterize import DEFAULT_TARGETS

    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(target in name for target in DEFAULT_TARGETS)
    ]


METHOD = GaLore()
