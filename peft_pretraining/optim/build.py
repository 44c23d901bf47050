"""`build_optimizer`: the library optimizer behind each published name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from peft_pretraining.distributed.world import World
from peft_pretraining.optim.galore import GaLore, Subspace
from peft_pretraining.optim.slices import StochasticRounding

# Their libraries advise 32-bit moments for embedding and output head: rows that are rarely met make 8-bit blocks unstable.
EMBEDDINGS = ("embed_tokens", "lm_head")


class OptimizerUnavailable(ValueError):
    """An optimizer whose package is not installed."""


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
    """The optimizer for a published name.

    Args:
        name: adam | adamw | sgd | adafactor | adam8bit | adamw4bit.
        parameters: trainable ones by qualified name, all on one device.
        lr: learning rate of the first update; the trainer sets it anew before every update.
        weight_decay: added to the gradient for adam and sgd, decoupled for the others (as their libraries do).
        beta1: sgd's momentum and adafactor's first moment; 0 is off. The Adam family keeps (0.9, 0.999), as published.
        embedding_bits: 32 for float32 moments of embedding and output head with adam8bit and adamw4bit; None: as the others.
        rounding: stochastic rounding of bfloat16 parameters, for the Adam family.

    Raises:
        ValueError: an unknown name.
        OptimizerUnavailable: the package behind the name cannot be imported.
    """
    trained = list(parameters.values())
    if name in ("adam", "adamw") and rounding is None:
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(trained, lr=lr, weight_decay=weight_decay, fused=True)
    if name == "sgd":
        # torch's fused kernel for CPUs leaves 16-bit parameters as they are (2.13; its issue 191763).
        fused = all(p.device.type != "cpu" or p.dtype in (torch.float32, torch.float64) for p in trained)
        return torch.optim.SGD(trained, lr=lr, weight_decay=weight_decay, momentum=beta1, fused=fused)
    if name == "adafactor":
        return _adafactor(trained, lr, weight_decay, beta1)
    if name not in ("adam", "adamw", "adam8bit", "adamw4bit"):
        raise ValueError(f"unknown optimizer {name!r}: must be adam, adamw, sgd, adafactor, adam8bit or adamw4bit")
    names = {parameter: qualified for qualified, parameter in parameters.items()}
    groups = _groups(parameters, embedding_bits)
    if name == "adam8bit":
        from peft_pretraining.optim.adam8bit import SlicedAdam8bit

        return SlicedAdam8bit(groups, names=names, rounding=rounding, lr=lr, weight_decay=weight_decay)
    return _torchao_adam(name, groups, names=names, lr=lr, weight_decay=weight_decay, rounding=rounding)


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
    """The optimizer for a published name, which steps matrices in a subspace of their gradients.

    Args:
        matrices: names of the matrices that are projected; of `parameters` there may be some of them, all, or none.
        subspace, world: see GaLore. The others: see build_optimizer.

    Raises:
        As build_optimizer.
    """
    chosen = {key: parameter for key, parameter in parameters.items() if key in matrices}
    others = {key: parameter for key, parameter in parameters.items() if key not in matrices}
    ordinary = None
    if others:
        settings: dict[str, Any] = {"beta1": beta1, "embedding_bits": embedding_bits, "rounding": rounding}
        ordinary = build_optimizer(name, others, lr=lr, weight_decay=weight_decay, **settings)
        if not chosen:
            return ordinary
    return GaLore(
        chosen,
        lambda projected: build_optimizer(name, {"projected": projected}, lr=lr, weight_decay=0.0, beta1=beta1),
        ordinary,
        subspace,
        world,
        lr=lr,
        weight_decay=weight_decay,
        decoupled=name not in ("adam", "sgd"),
        rounding=rounding,
    )


def _groups(parameters: Mapping[str, nn.Parameter], embedding_bits: int | None) -> list[dict[str, Any]]:
    """One parameter group, or two where embedding and head have moments of their own size."""
    apart = [p for name, p in parameters.items() if embedding_bits and any(part in name for part in EMBEDDINGS)]
    chosen = set(apart)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if p not in chosen]},
        {"params": apart, "state_bits": embedding_bits},
    ]
    return [group for group in groups if group["params"]]


def _torchao_adam(name: str, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    try:
        from peft_pretraining.optim.adam_ao import SlicedAdam
    except ImportError as error:
        raise OptimizerUnavailable(
            f"4-bit moments and --stochastic_rounding need torchao, which cannot be imported ({error}); pip install torchao, "
            "or --optimizer adam8bit without --stochastic_rounding"
        ) from None
    return SlicedAdam(groups, decoupled=name != "adam", state_bits=4 if name == "adamw4bit" else None, **settings)


def _adafactor(trained: list[nn.Parameter], lr: float, weight_decay: float, beta1: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(
        trained,
        lr=lr,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        beta1=beta1 or None,
        weight_decay=weight_decay,
        relative_step=False,
        scale_parameter=False,
        warmup_init=False,
    )
