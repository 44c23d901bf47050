"""Training methods: what each does to the freshly built model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peft_pretraining.config.arguments import Arguments
from sparse_lora import SLTrainConfig, attach_relora, reparameterize
from sparse_lora.reparameterize import DEFAULT_TARGETS


def _full(model: nn.Module, args: Arguments) -> list[str]:
    """Every weight dense and trained: nothing to change."""
    return []


def _galore(model: nn.Module, args: Arguments) -> list[str]:
    """Every weight dense and trained (arXiv 2403.03507): what differs is how `projected_matrices` are stepped."""
    return []


def projected_matrices(model: nn.Module) -> list[str]:
    """Names of the weights whose gradients GaLore projects: those of the linears that the other methods replace."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(target in name for target in DEFAULT_TARGETS)
    ]


def _lowrank(model: nn.Module, args: Arguments) -> list[str]:
    """Attention and MLP linears become (alpha/r) B A, both factors trained, no sparse part."""
    return reparameterize(model, _layer_config(args, sparsity=0.0))


def _relora(model: nn.Module, args: Arguments) -> list[str]:
    """Attention and MLP linears are frozen and get factors (arXiv 2307.05695), which `restarts` merges into them."""
    return attach_relora(model, rank=args.rank, alpha=args.lora_alpha, trainable_scaling=args.train_scaling, seed=args.seed)


def _sltrain(model: nn.Module, args: Arguments) -> list[str]:
    """Attention and MLP linears become (alpha/r) B A + S (arXiv 2406.02214)."""
    return reparameterize(model, _layer_config(args, sparsity=args.sp_ratio))


def _layer_config(args: Arguments, sparsity: float) -> SLTrainConfig:
    return SLTrainConfig(
        rank=args.rank,
        sparsity=sparsity,
        alpha=args.lora_alpha,
        support=args.support,
        trainable_scaling=args.train_scaling,
        path=args.linear_path,
        seed=args.seed,
    )


# name -> function that changes the model in place and returns the names of the replaced linears
METHODS: dict[str, Callable[[nn.Module, Arguments], list[str]]] = {
    "full": _full,
    "galore": _galore,
    "lowrank": _lowrank,
    "relora": _relora,
    "sltrain": _sltrain,
}
