"""Builds the optimizer for each name of --optimizer, on whole matrices or in GaLore's subspaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.distributed.world import World
from peft_pretraining.optim.galore import GaLore, Subspace
from peft_pretraining.optim.slices import StochasticRounding
from peft_pretraining.optim.updates import l2_norm

# The libraries of low-bit optimizers advise 32-bit moments for embedding and output head: rarely used rows make 8-bit blocks
# unstable.
EMBEDDINGS = ("embed_tokens", "lm_head")


class OptimizerUnavailable(ValueError):
    """An optimizer whose package is not installed."""


@dataclass(frozen=True)
class Settings:
    """Settings of an optimizer; see `build_optimizer`."""

    lr: float
    weight_decay: float
    beta1: float = 0.0
    embedding_bits: int | None = None
    rounding: StochasticRounding | None = None


def build_optimizer(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    beta1: float = 0.0,
    embedding_bits: int | None = None,
    rounding: StochasticRounding | None = None,
) -> torch.optim.Optimizer:
    """Builds the optimizer for a name of --optimizer.

    Args:
        name: one of BUILDERS.
        parameters: trainable parameters by qualified name, all on one device.
        lr: learning rate of the first update; the trainer sets it before every update.
        weight_decay: added to the gradient for adam and sgd, decoupled for the others (as in their libraries).
        beta1: sgd's momentum and adafactor's first moment; 0 turns it off. The Adam family keeps the published (0.9, 0.999).
        embedding_bits: 32 for float32 moments of embedding and output head with low-bit optimizers; None: as for the rest.
        rounding: stochastic rounding of bfloat16 parameters, for the Adam family.

    Raises:
        ValueError: an unknown name.
        OptimizerUnavailable: the package behind the name cannot be imported.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown optimizer {name!r}: must be one of {', '.join(BUILDERS)}")
    return BUILDERS[name](parameters, Settings(lr, weight_decay, beta1, embedding_bits, rounding))


def build_galore(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    matrices: Collection[str],
    subspace: Subspace,
    world: World,
    lr: float,
    weight_decay: float,
    beta1: float = 0.0,
    embedding_bits: int | None = None,
    rounding: StochasticRounding | None = None,
) -> torch.optim.Optimizer:
    """Builds the optimizer for a name of --optimizer; it steps some matrices in a subspace of their gradients.

    Args:
        matrices: names of the projected matrices; `parameters` may contain some, all or none of them.
        subspace, world: see GaLore. Other arguments: see build_optimizer.

    Raises:
        As build_optimizer.
    """
    projected = {key: parameter for key, parameter in parameters.items() if key in matrices}
    others = {key: parameter for key, parameter in parameters.items() if key not in matrices}
    ordinary = None
    if others:
        settings: dict[str, Any] = {"beta1": beta1, "embedding_bits": embedding_bits, "rounding": rounding}
        ordinary = build_optimizer(name, others, lr=lr, weight_decay=weight_decay, **settings)
        if not projected:
            return ordinary
    return GaLore(
        projected,
        lambda matrix: build_optimizer(name, {"projected": matrix}, lr=lr, weight_decay=0.0, beta1=beta1),
        ordinary,
        subspace,
        world,
        lr=lr,
        weight_decay=weight_decay,
        decoupled=OPTIMIZERS[name].decoupled_decay,
        rounding=rounding,
    )


def _groups(parameters: Mapping[str, nn.Parameter], embedding_bits: int | None) -> list[dict[str, Any]]:
    """Parameters as one group, or two if the moments of embedding and output head have a different number of bits."""
    embeddings = [p for name, p in parameters.items() if embedding_bits and any(part in name for part in EMBEDDINGS)]
    embedding_set = set(embeddings)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if p not in embedding_set]},
        {"params": embeddings, "state_bits": embedding_bits},
    ]
    return [group for group in groups if group["params"]]


def _names(parameters: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in parameters.items()}


def _adam(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.rounding is not None:
        return _sliced_adam(parameters, settings, decoupled=False)
    return torch.optim.Adam(list(parameters.values()), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def _adamw(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.rounding is not None:
        return _sliced_adam(parameters, settings, decoupled=True)
    return torch.optim.AdamW(list(parameters.values()), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def _sgd(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    trained = list(parameters.values())
    # torch's fused SGD on a CPU does not change 16-bit parameters (torch 2.13, issue 191763).
    fused = all(p.device.type != "cpu" or p.dtype in (torch.float32, torch.float64) for p in trained)
    return torch.optim.SGD(trained, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.beta1, fused=fused)


def _adafactor(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    from transformers import optimization

    class Adafactor(optimization.Adafactor):
        @staticmethod
        def _rms(tensor: torch.Tensor) -> torch.Tensor:
            # The library's norm is too small for large tensors on a CPU, so that their updates would be clipped too late.
            return l2_norm(tensor) / math.sqrt(tensor.numel())

    return Adafactor(
        list(parameters.values()),
        lr=settings.lr,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        beta1=settings.beta1 or None,
        weight_decay=settings.weight_decay,
        relative_step=False,
        scale_parameter=False,
        warmup_init=False,
    )


def _adam8bit(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    from peft_pretraining.optim.adam8bit import SlicedAdam8bit

    return SlicedAdam8bit(
        _groups(parameters, settings.embedding_bits),
        names=_names(parameters),
        rounding=settings.rounding,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )


def _adamw4bit(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    return _sliced_adam(parameters, settings, decoupled=True, state_bits=4)


def _sliced_adam(
    parameters: Mapping[str, nn.Parameter], settings: Settings, decoupled: bool, state_bits: int | None = None
) -> torch.optim.Optimizer:
    try:
        from peft_pretraining.optim.adam_ao import SlicedAdam
    except ImportError as error:
        raise OptimizerUnavailable(
            f"4-bit moments and --stochastic_rounding need torchao, which cannot be imported ({error}); run pip install "
            "torchao, or use --optimizer adam8bit without --stochastic_rounding"
        ) from None
    return SlicedAdam(
        _groups(parameters, settings.embedding_bits),
        names=_names(parameters),
        rounding=settings.rounding,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        decoupled=decoupled,
        state_bits=state_bits,
    )


# One builder for each row of config.optimizers.OPTIMIZERS. Builders import optional packages themselves.
BUILDERS: dict[str, Callable[[Mapping[str, nn.Parameter], Settings], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "adam8bit": _adam8bit,
    "adamw4bit": _adamw4bit,
}
