"""Optimizer states by parameter name: what a checkpoint holds, independent of parameter order and of who held which part.

Moments of the parameter's shape are saved as parts of a whole, which any number of processes can read again. Quantised moments
of a sharded parameter are not: their blocks begin anew in every part. They are saved part by part under
`<parameter>@<part>of<parts>`, read back as they are by as many processes, and otherwise through plain numbers.

`torch.optim.Optimizer.load_state_dict` casts floating-point states to the parameter's dtype, which would lose bits of
float32 states kept for bfloat16 parameters (adafactor). States are therefore set directly.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_pretraining.optim.moments import plain_moments, set_moments_
from peft_pretraining.optim.shards import Part, part_of, rows_of_part, whole_of
from peft_pretraining.optim.updates import HasState, PreparesStates, Updates

Scalars = dict[str, dict[str, Any]]
Index = Mapping[str, tuple[torch.Size, torch.dtype]]  # <parameter>/<key> -> shape and dtype, of what was saved
Read = Callable[[dict[str, torch.Tensor]], None]  # fills tensors in place

_PARTIAL_NAME = re.compile(r"(.+)@(\d+)of(\d+)")


class SavedState(NamedTuple):
    """`shared`: tensors that are the same on every process, or parts of one (DTensors). `own`: this process's alone.

    Both by `<parameter>/<key>`. `scalars`: the rest (step counts), JSON-able.
    """

    shared: dict[str, torch.Tensor]
    own: dict[str, torch.Tensor]
    scalars: Scalars


def optimizer_state(updates: Updates, parameters: Mapping[str, nn.Parameter]) -> SavedState:
    """The state of every parameter. parameters: the model's, by name, which `updates` steps or of which it steps the parts."""
    saved = SavedState({}, {}, {})
    quantised = _quantises(updates.optimizer)
    for name, stepped in updates.stepped.items():
        parameter = parameters[name]
        # Of an empty part there is nothing to save, though an optimizer may have made a state of no elements.
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
    """Set the state that `optimizer_state` returned, here or on other processes; True if quantised moments were made anew.

    Args:
        parameters: as for `optimizer_state`.
        index: all tensors that were saved.
        scalars: as saved.
        read: fills tensors, given by their names in `index`, in place.

    Raises:
        ValueError: the state names a parameter that the optimizer does not have.
    """
    saved: dict[str, dict[Part | None, dict[str, tuple[torch.Size, torch.dtype]]]] = defaultdict(dict)
    for path, entry in index.items():
        name, key = path.rsplit("/", 1)
        partial = _PARTIAL_NAME.fullmatch(name)
        part = Part(int(partial[2]), int(partial[3])) if partial else None
        saved[partial[1] if partial else name].setdefault(part, {})[key] = entry
    unknown = sorted((set(saved) | set(scalars)) - set(updates.stepped))
    if unknown:
        raise ValueError(f"optimizer state for {unknown[0]!r} ({len(unknown)} in all), which this model does not train")
    # Moments made already would be there twice.
    updates.optimizer.state.clear()
    requantised = {name for name, parts in saved.items() if _is_divided_anew(updates, parameters[name], parts)}
    if requantised:
        _prepare(updates.optimizer)
    for name in sorted(set(saved) | set(scalars)):
        stepped, parameter = updates.stepped[name], parameters[name]
        if name in requantised:
            _set_from_plain_numbers(updates.optimizer.state[stepped], name, parameter, saved[name], read)
            updates.optimizer.state[stepped].update(scalars.get(name, {}))
        elif stepped.numel():
            tensors = _read_as_saved(name, parameter, saved.get(name, {}), read)
            updates.optimizer.state[stepped] = {**scalars.get(name, {}), **tensors}
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


def _is_divided_anew(updates: Updates, parameter: nn.Parameter, parts: Mapping[Part | None, object]) -> bool:
    """Whether quantised moments were saved for other parts of the parameter than this process has."""
    here = part_of(parameter) if isinstance(parameter, DTensor) and _quantises(updates.optimizer) else None
    if here is None:
        return None not in parts
    # Not by looking for this very part: an empty one has nothing saved, and all processes must decide alike.
    return here.size not in {part.size for part in parts if part is not None}


def _read_as_saved(
    name: str, parameter: nn.Parameter, parts: Mapping[Part | None, Mapping[str, Any]], read: Read
) -> dict[str, torch.Tensor]:
    """State tensors of this process's part, on the parameter's device."""
    targets: dict[str, torch.Tensor] = {}
    here = part_of(parameter) if isinstance(parameter, DTensor) else None
    for key, (size, dtype) in parts.get(None, {}).items():
        target = torch.empty(size, dtype=dtype)
        if isinstance(parameter, DTensor) and len(size):
            target = whole_of(parameter, torch.empty_like(parameter.to_local(), dtype=dtype))
        targets[f"{name}/{key}"] = target
    if here is not None:
        for key, (size, dtype) in parts.get(here, {}).items():
            targets[f"{_partial_name(name, here)}/{key}"] = torch.empty(size, dtype=dtype)
    read(targets)
    # All of it lives with its parameter, step counts too: `build_optimizer` takes the fused variants.
    return {
        path.rsplit("/", 1)[1]: tensor.to_local() if isinstance(tensor, DTensor) else tensor.to(parameter.device)
        for path, tensor in targets.items()
    }


def _set_from_plain_numbers(
    state: dict[str, Any],
    name: str,
    parameter: nn.Parameter,
    parts: Mapping[Part | None, Mapping[str, tuple[torch.Size, torch.dtype]]],
    read: Read,
) -> None:
    """Dequantise all parts, and quantise what falls to this process."""
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
