"""Initial values drawn on the device, for measurements of time and memory, which do not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_pretraining.model import llama
from sparse_lora import SparseLowRankLinear
from sparse_lora.support import Support, generator_for


@contextmanager
def quick_initial_values() -> Iterator[None]:
    """Makes models get random values of the right size from the device, and linears of one shape the same support.

    The program draws every number on the host, so that it is the same on any device; that takes minutes for 7B.
    """
    original = llama.initialize
    llama.initialize = _initialize
    try:
        yield
    finally:
        llama.initialize = original


@torch.no_grad()
def _initialize(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, model.config.initializer_range)
        else:
            parameter.fill_(1.0 if parameter.numel() == model.config.hidden_size else model.config.initializer_range)
    drawn: dict[tuple[int, ...], Support] = {}
    for module in model.modules():
        if isinstance(module, SparseLowRankLinear) and module.support is not None:
            _draw(module.support, drawn)


def _draw(support: nn.Module, drawn: dict[tuple[int, ...], Support]) -> None:
    assert isinstance(support, Support)
    key = (support.out_features, support.in_features, support.nnz)
    if key not in drawn:
        support.draw_(generator_for(0, "support"))
        drawn[key] = support
    else:
        support.load_state_dict(drawn[key].state_dict())
