"""Saves and loads optimizer states by parameter name, independent of parameter order and of the number of processes.

Moments of a parameter's shape are saved as DTensors, which any number of processes can read. Quantised moments of a sharded
parameter cannot be, because their quantisation blocks start anew in every part. They are saved part by part under the name
`<parameter>@<part>of<parts>`. The same number of processes reads them unchanged; another number dequantises, divides and
quantises them again.

`torch.optim.Optimizer.load_state_dict` casts floating-point states to the parameter's dtype, which would round the float32
states of bfloat16 parameters (adafactor). States are therefore set directly.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_pretraining.distributed.parallel import Part, local, part_of, rows_of_part, whole_of
from peft_pretraining.optim.moments import plain_moments, set_moments_
from peft_pretraining.optim.updates import HasState, PreparesStates, Updates

Scalars = dict[str, dict[str, Any]]
# All saved tensors: <parameter>/<key> -> shape and dtype.
Index = Mapping[str, tuple[torch.Size, torch.dtype]]
# The saved tensors of one parameter: part -> key -> shape and dtype.
Saved = dict["Part | None", dict[str, tuple[torch.Size, torch.dtype]]]
# A function that fills tensors, given by their saved names, in place.
Read = Callable[[dict[str, torch.Tensor]], None]

_PARTIAL_NAME = re.compile(r"(.+)@(\d+)of(\d+)")


class SavedState(NamedTuple):
    """The optimizer state to save, by `<parameter>/<key>`.

    shared: tensors that are equal on all processes, or DTensors. own: tensors of this process alone.
    scalars: JSON-serialisable values (step counts) by parameter and key.
    """

    shared: dict[str, torch.Tensor]
    own: dict[str, torch.Tensor]
    scalars: Scalars


def optimizer_state(updates: Updates, parameters: Mapping[str, nn.Parameter]) -> SavedState:
    """Returns the state of every parameter. parameters: the model's, by name, sharded or not."""
    saved = SavedState({}, {}, {})
    quantised = _quantises(updates.optimizer)
    for name, stepped in updates.stepped.items():
        parameter = parameters[name]
        # An empty part is not saved, although an optimizer may have created an empty state for it.
        for key, value in updates.optimizer.state.get(stepped, {}).items() if stepped.numel() else ():
            if not isinstance(value, torch.Tensor):
                saved.scalars.setdefault(name, {})[key] = value
            elif not isinstance(parameter, DTensor) or value.dim() == 0:
                saved.shared[f"{name}/{key}"] = value
            elif quantised:
                saved.own[f"{_partial_name(name, part_of(parameter))}/{key}"] = value
            else:
                saved.shared[f"{name}/{key}"] = whole_of(parameter, value)
    return saved


def load_optimizer_state(
    updates: Updates, parameters: Mapping[str, nn.Parameter], index: Index, scalars: Scalars, read: Read
) -> bool:
    """Sets the optimizer state from a saved one; returns True if quantised moments had to be quantised again.

    Args:
        updates: the optimizer whose state is set.
        parameters: the model's parameters by name, as for `optimizer_state`.
        index: shape and dtype of all saved tensors.
        scalars: the saved scalars.
        read: fills tensors, given by their names in `index`, in place.

    Raises:
        ValueError: the state contains a parameter that the optimizer does not have, or a tensor that does not fit.
    """
    saved: dict[str, Saved] = defaultdict(dict)
    for path, entry in index.items():
        name, key = path.rsplit("/", 1)
        partial = _PARTIAL_NAME.fullmatch(name)
        part = Part(int(partial[2]), int(partial[3])) if partial else None
        saved[partial[1] if partial else name].setdefault(part, {})[key] = entry
    unknown = sorted((set(saved) | set(scalars)) - set(updates.stepped))
    if unknown:
        raise ValueError(f"optimizer state for {unknown[0]!r} ({len(unknown)} in all), which this model does not train")
    states = updates.optimizer.state
    states.clear()
    _prepare(updates.optimizer)
    requantised = [name for name, parts in saved.items() if _has_other_parts(updates, parameters[name], parts)]
    targets: dict[str, torch.Tensor] = {}
    for name in sorted((set(saved) | set(scalars)) - set(requantised)):
        stepped = updates.stepped[name]
        if stepped.numel():
            parameter_targets = _targets(name, parameters[name], saved.get(name, {}), states[stepped])
            targets |= parameter_targets
            states[stepped].update({path.rsplit("/", 1)[1]: local(tensor) for path, tensor in parameter_targets.items()})
            states[stepped].update(scalars.get(name, {}))
    read(targets)
    for name in requantised:
        _requantise(states[updates.stepped[name]], name, parameters[name], saved[name], read)
        states[updates.stepped[name]].update(scalars.get(name, {}))
    return bool(requantised)


def _partial_name(name: str, part: Part) -> str:
    return f"{name}@{part.rank}of{part.size}"


def _members(optimizer: HasState) -> list[Any]:
    return getattr(optimizer, "members", [optimizer])


def _quantises(optimizer: HasState) -> bool:
    return any(getattr(member, "quantises", False) for member in _members(optimizer))


def _prepare(optimizer: HasState) -> None:
    for member in _members(optimizer):
        if isinstance(member, PreparesStates):
            member.prepare_states()


def _has_other_parts(updates: Updates, parameter: nn.Parameter, parts: Saved) -> bool:
    """Tells whether quantised moments were saved for another number of parts than the parameter has now."""
    own_part = part_of(parameter) if isinstance(parameter, DTensor) and _quantises(updates.optimizer) else None
    if own_part is None:
        return None not in parts
    # Compares numbers of parts and not this part, because an empty part is not saved and all processes must agree.
    return own_part.size not in {part.size for part in parts if part is not None}


def _targets(name: str, parameter: nn.Parameter, parts: Saved, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns tensors of this process's part to read into, on the parameter's device, by their saved names.

    Tensors that the optimizer has created already are used, because its kernels do not check that their shapes fit together.
    """
    own_part = part_of(parameter) if isinstance(parameter, DTensor) else None
    targets: dict[str, torch.Tensor] = {}
    for part in {None, own_part}:
        saved_name = name if part is None else _partial_name(name, part)
        for key, (size, dtype) in parts.get(part, {}).items():
            target: torch.Tensor = state.get(key, torch.empty(0))
            if key not in state:
                divided = part is None and isinstance(parameter, DTensor) and len(size) > 0
                shape = local(parameter).shape if divided else size
                # Step counts are on the parameter's device too, as the fused optimizers require.
                target = torch.empty(shape, dtype=dtype, device=parameter.device)
            if part is None and isinstance(parameter, DTensor) and len(size):
                target = whole_of(parameter, target)
            if target.shape != size or target.dtype != dtype:
                raise ValueError(
                    f"{saved_name}/{key} is {tuple(size)} {dtype} in the checkpoint and {tuple(target.shape)} {target.dtype} in "
                    "this run"
                )
            targets[f"{saved_name}/{key}"] = target
    missing = {key for key, value in state.items() if isinstance(value, torch.Tensor)} - {
        path.rsplit("/", 1)[1] for path in targets
    }
    if missing:
        raise ValueError(f"{name}/{min(missing)} is missing")
    return targets


def _requantise(
    state: dict[str, Any],
    name: str,
    parameter: nn.Parameter,
    parts: Saved,
    read: Read,
) -> None:
    """Dequantises the moments of all saved parts and quantises this process's part of them into `state`."""
    pieces: list[list[torch.Tensor]] = []
    for part in sorted(parts, key=lambda part: part.rank if part else 0):
        saved_name = _partial_name(name, part) if part else name
        tensors = {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in parts[part].items()}
        read({f"{saved_name}/{key}": tensor for key, tensor in tensors.items()})
        pieces.append(plain_moments(tensors))
    whole = [torch.cat(moment).view(parameter.shape) for moment in zip(*pieces, strict=True)]
    if isinstance(parameter, DTensor):
        whole = [rows_of_part(moment, part_of(parameter)) for moment in whole]
    set_moments_(state, [moment.flatten().to(parameter.device) for moment in whole])
