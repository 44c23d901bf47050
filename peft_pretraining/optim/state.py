"""Optimizer states by parameter name: what a checkpoint holds, independent of parameter order.

`torch.optim.Optimizer.load_state_dict` casts floating-point states to the parameter's dtype, which would lose bits of
float32 states kept for bfloat16 parameters (adafactor). States are therefore set directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft_pretraining.optim.updates import HasState

Scalars = dict[str, dict[str, Any]]


def optimizer_state(optimizer: HasState, names: Mapping[nn.Parameter, str]) -> tuple[dict[str, torch.Tensor], Scalars]:
    """The state of every parameter: tensors under `<parameter>/<key>`, and the rest (step counts) as JSON-able scalars."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: Scalars = {}
    for parameter, name in names.items():
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def load_optimizer_state(
    optimizer: HasState,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, torch.Tensor],
    scalars: Scalars,
) -> None:
    """Set the state that `optimizer_state` returned.

    Raises:
        ValueError: the state names a parameter that the optimizer does not have.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in scalars.items()}
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        states.setdefault(name, {})[key] = tensor
    unknown = sorted(set(states) - set(by_name))
    if unknown:
        raise ValueError(f"optimizer state for {unknown[0]!r} ({len(unknown)} in all), which this model does not train")
    for name, state in states.items():
        parameter = by_name[name]
        # All of it lives with its parameter, step counts too: `build_optimizer` takes the fused variants.
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if isinstance(value, torch.Tensor) else value
            for key, value in state.items()
        }
