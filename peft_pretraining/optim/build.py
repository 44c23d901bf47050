"""`build_optimizer`: the library optimizer behind each published name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, beta1: float = 0.0
) -> torch.optim.Optimizer:
    """The optimizer for a published name.

    Args:
        name: adam | adamw | sgd | adafactor | adam8bit.
        parameters: trainable parameters, all on one device.
        lr: learning rate of the first update; the trainer sets it anew before every update.
        weight_decay: decoupled for adamw, added to the gradient for the others (as their libraries do).
        beta1: sgd's momentum and adafactor's first moment; 0 is off. The Adam family keeps (0.9, 0.999), as published.

    Raises:
        ValueError: an unknown name.
    """
    trained = list(parameters)
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(trained, lr=lr, weight_decay=weight_decay, fused=True)
    if name == "sgd":
        return torch.optim.SGD(trained, lr=lr, weight_decay=weight_decay, momentum=beta1, fused=True)
    if name == "adafactor":
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
    if name == "adam8bit":
        import bitsandbytes

        return bitsandbytes.optim.Adam8bit(trained, lr=lr, weight_decay=weight_decay)
    raise ValueError(f"unknown optimizer {name!r}: must be adam, adamw, sgd, adafactor or adam8bit")
