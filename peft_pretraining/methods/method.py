"""Training methods: what each does to the freshly built model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.methods.galore import _galore
from peft_pretraining.methods.relora import _relora
from peft_pretraining.methods.sltrain import _lowrank, _sltrain

if TYPE_CHECKING:
    from torch import nn


def _full(model: nn.Module, args: Arguments) -> list[str]:
    """Every weight dense and trained: nothing to change."""
    return []


# name -> function that changes the model in place and returns the names of the replaced linears
METHODS: dict[str, Callable[[nn.Module, Arguments], list[str]]] = {
    "full": _full,
    "galore": _galore,
    "lowrank": _lowrank,
    "relora": _relora,
    "sltrain": _sltrain,
}
