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

from peft_pretraining.distributed.parallel import Part, local, part_of, rows_of_part, whole_of
from peft_pretraining.optim.moments import plain_moments, set_moments_
from peft_pretraining.optim.updates import HasState, PreparesStates, Updates

Scalars = dict[str, dict[str, Any]]
Index = Mapping[str, tuple[torch.Size, torch.dtype]]  # <parameter>/<key> -> shape and dtype, of what was saved
Saved = dict["Part | None", dict[str, tuple[torch.Size, torch.dtype]]]  # of one parameter: part -> key -> shape and dtype
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
    anew = [name for name, parts in saved.items() if _is_divided_anew(updates, parameters[name], parts)]
    targets: dict[str, torch.Tensor] = {}
    for name in sorted((set(saved) | set(scalars)) - set(anew)):
        stepped = updates.stepped[name]
        if stepped.numel():
            found = _targets(name, parameters[name], saved.get(name, {}), states[stepped])
            targets |= found
            states[stepped].update({path.rsplit("/", 1)[1]: local(tensor) for path, tensor in found.items()})
            states[stepped].update(scalars.get(name, {}))
    read(targets)
    for name in anew:
        _set_from_plain_numbers(states[updates.stepped[name]], name, parameters[name], saved[name], read)
        states[updates.stepped[name]].update(scalars.get(name, {}))
    return bool(anew)


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


def _is_divided_anew(updates: Updates, parameter: nn.Parameter, parts: Saved) -> bool:
    """Whether quantised moments were saved for other parts of the parameter than this process has."""
    here = part_of(parameter) if isinstance(parameter, DTensor) and _quantises(updates.optimizer) else None
    if here is None:
        return None not in parts
    # Not by looking for this very part: an empty one has nothing saved, and all processes must decide alike.
    return here.size not in {part.size for part in parts if part is not None}


def _targets(name: str, parameter: nn.Parameter, parts: Saved, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of this process's part to read into, on the parameter's device, by the names they were saved under.

    Those that the optimizer has made already, where it has: kernels trust that they fit together.
    """
    here = part_of(parameter) if isinstance(parameter, DTensor) else None
    targets: dict[str, torch.Tensor] = {}
    for part in {None, here}:
        saved_name = name if part is None else _partial_name(name, part)
        for key, (size, dtype) in parts.get(part, {}).items():
            target: torch.Tensor = state.get(key, torch.empty(0))
            if key not in state:
                divided = part is None and isinstance(parameter, DTensor) and len(size) > 0
                shape = local(parameter).shape if divided else size
                # Step counts live there too: `build_optimizer` takes the fused variants.
                target = torch.empty(shape, dtype=dtype, device=parameter.device)
            if part is None and isinstance(parameter, DTensor) and len(size):
                target = whole_of(parameter, target)
            if target.shape != size or target.dtype != dtype:
                raise ValueError(
                    f"{saved_name}/{key} is {tuple(size)} {dtype} there and {tuple(target.shape)} {target.dtype} here"
                )
            targets[f"{saved_name}/{key}"] = target
    missing = {key for key, value in state.items() if isinstance(value, torch.Tensor)} - {
        path.rsplit("/", 1)[1] for path in targets
    }
    if missing:
        raise ValueError(f"{name}/{min(missing)} is missing")
    return targets


def _set_from_plain_numbers(
    state: dict[str, Any],
    name: str,
    parameter: nn.Parameter,
    parts: Saved,
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
