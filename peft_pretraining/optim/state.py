"""Optimizer states: saved and loaded by parameter name, dequantised, and reset after restarts.

Saved states are independent of the order of parameters and of the number of processes.

Moments of a parameter's shape are saved as DTensors, which any number of processes can read. Quantised moments of a sharded
parameter cannot be, because quantisation blocks start at the beginning of every part. They are saved part by part under the name
`<parameter>@<part>of<parts>`. The same number of processes reads them unchanged; another number dequantises, divides and
quantises them again.

`torch.optim.Optimizer.load_state_dict` casts floating-point states to the parameter's dtype, which would round the float32
states of bfloat16 parameters (adafactor). States are therefore set directly.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_pretraining.config.optimizers import BNB_BLOCK_ELEMENTS, BNB_CODEBOOK_ENTRIES
from peft_pretraining.distributed.parallel import Part, local, part_of, rows_of_part, whole_of
from peft_pretraining.distributed.world import World, gather_objects
from peft_pretraining.optim.moments import moment_slices
from peft_pretraining.optim.slices import num_steps
from peft_pretraining.optim.updates import PreparesStates, Updates
from sparse_lora import generator_for

Scalars = dict[str, dict[str, Any]]
# All saved tensors: <parameter>/<key> -> shape and dtype.
Index = Mapping[str, tuple[torch.Size, torch.dtype]]
# The saved tensors of one parameter: part -> key -> shape and dtype.
Saved = dict["Part | None", dict[str, tuple[torch.Size, torch.dtype]]]
# A function that fills tensors, given by their saved names, in place.
Read = Callable[[dict[str, torch.Tensor]], None]

_PARTIAL_NAME = re.compile(r"(.+)@(\d+)of(\d+)")
# Names of moments in the state of torch's AdamW, and those in the states of optimizers that step in slices.
_ADAMW_NAMES = {"exp_avg": "moment1", "exp_avg_sq": "moment2"}


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
    if isinstance(updates.optimizer, PreparesStates):
        updates.optimizer.prepare_states()
    requantised = [
        name
        for name, parts in saved.items()
        if _has_other_parts(updates, parameters[name], parts) or _has_other_form(parts, states.get(updates.stepped[name], {}))
    ]
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


def _quantises(optimizer: torch.optim.Optimizer) -> bool:
    return getattr(optimizer, "quantises", False)


def _has_other_parts(updates: Updates, parameter: nn.Parameter, parts: Saved) -> bool:
    """Tells whether quantised moments were saved for another number of parts than the parameter has now."""
    own_part = part_of(parameter) if isinstance(parameter, DTensor) and _quantises(updates.optimizer) else None
    if own_part is None:
        return None not in parts
    # Compares numbers of parts and not this part, because an empty part is not saved and all processes must agree.
    return own_part.size not in {part.size for part in parts if part is not None}


def _has_other_form(parts: Saved, state: Mapping[str, Any]) -> bool:
    """Tells whether plain moments were saved that this optimizer quantises; muon8bit and spectron8bit left AdamW's plain once."""
    saved = parts.get(None, {}).keys()
    plain = "codes1" not in saved and any(set(names) <= saved for names in (_ADAMW_NAMES, _ADAMW_NAMES.values()))
    return plain and not {key for key, value in state.items() if isinstance(value, torch.Tensor)} <= saved


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
        if "step" in tensors:
            state["step"] = int(tensors.pop("step"))
        pieces.append(plain_moments({_ADAMW_NAMES.get(key, key): tensor for key, tensor in tensors.items()}))
    whole = [torch.cat(moment).view(parameter.shape) for moment in zip(*pieces, strict=True)]
    if isinstance(parameter, DTensor):
        whole = [rows_of_part(moment, part_of(parameter)) for moment in whole]
    set_moments_(state, [moment.flatten().to(parameter.device, torch.float32) for moment in whole])


# --- Quantised moments as plain numbers and back ---


def plain_moments(state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns [first, second] moment of one parameter's optimizer state, each flat; quantised moments become float32.

    Raises KeyError, ValueError or RuntimeError if the state's tensors do not fit together.
    """
    return [_dequantised(state, number) for number in (1, 2)]


def set_moments_(state: Mapping[str, torch.Tensor], moments: list[torch.Tensor]) -> None:
    """Writes flat moments into a state that the optimizer has created, quantising them if its layout does."""
    for number, values in zip((1, 2), moments, strict=True):
        _quantise_(state, number, values)


def _dequantised(state: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
    if state.get(f"state{number}", torch.empty(0)).dtype == torch.uint8:
        count, scales, codes = (state[f"{part}{number}"].numel() for part in ("state", "absmax", "qmap"))
        if scales != -(-count // BNB_BLOCK_ELEMENTS) or codes != BNB_CODEBOOK_ENTRIES:
            raise ValueError(f"{count} codes do not fit {scales} scales and a code book of {codes} entries")
    moments = [moment.read() for _, moment in moment_slices(state, number)]
    return torch.cat(moments) if moments else torch.empty(0)


def _quantise_(state: Mapping[str, torch.Tensor], number: int, values: torch.Tensor) -> None:
    for part, moment in moment_slices(state, number):
        moment.write_(values[part])


# --- Moments of parameters whose values a restart replaced ---

# Prefixes of the keys that a reset leaves alone: code books, which are constants, and the number of steps before it.
_KEPT = ("qmap", "steps_before_reset")
# What describes the parameter's values or their gradients: Spectron's vector, GaLore's projections with their count, and
# Stable-SPAM's averages of gradients with theirs.
_NO_MOMENTS = ("power_vector", "projection", "num_updates", "conditioning", "num_conditioned")


def reset_moments_(state: dict[str, Any]) -> None:
    """Resets a parameter's moments and step count, in place, to those before the first step.

    Every optimizer here starts from zeros, in codes and scales too. Step counts are reset, so bias correction starts again; the
    noise of stochastic rounding does not, since the same noise in every period would move the same elements each time.
    """
    if isinstance(state.get("step"), int):
        state["steps_before_reset"] = num_steps(state)
    _zero_(state, [key for key in state if not key.startswith((*_KEPT, *_NO_MOMENTS))])


def reset_descriptions_(state: dict[str, Any]) -> None:
    """Resets, in place, what is no moment but describes the values, or their gradients, of a parameter that has new ones."""
    _zero_(state, [key for key in state if key.startswith(_NO_MOMENTS)])


def _zero_(state: dict[str, Any], keys: list[str]) -> None:
    for key in keys:
        if isinstance(state[key], torch.Tensor):
            state[key].zero_()
        elif isinstance(state[key], (int, float)):
            state[key] = type(state[key])(0)


@dataclass(frozen=True)
class Pruning:
    """Sets a share of the moments to zero when ReLoRA merges its factors (arXiv 2307.05695, section 3; its repository's names).

    kind: "magnitude" zeroes the smallest elements of each moment, "random" random elements.
    share: share of a tensor's elements that become zero, in (0, 1].
    """

    kind: str
    share: float

    def prune_(self, state: dict[str, Any], parameter: nn.Parameter, seed: int, key: str, world: World) -> None:
        """Sets elements of each of a parameter's moments to zero, in place; the step count stays.

        state: optimizer state of this process's part of the parameter. parameter: the model's; if it is sharded, every process
        calls this. seed, key: identify the random draw.
        """
        names = [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.dim()]
        if not isinstance(parameter, DTensor):
            for name in names:
                state[name].mul_(self._kept(state[name], seed, f"{key}/{name}"))
            return
        # An empty part has no state, but its process must take part in the collective gathering.
        for name in max(gather_objects(names, world), key=len):
            moment = state[name] if name in names else torch.zeros_like(parameter.to_local())
            kept = self._kept(whole_of(parameter, moment).full_tensor(), seed, f"{key}/{name}")
            moment.mul_(rows_of_part(kept, part_of(parameter)).view(moment.shape))

    def _kept(self, moment: torch.Tensor, seed: int, key: str) -> torch.Tensor:
        """Returns a boolean mask, of the moment's shape, of the elements that are kept."""
        if self.kind == "random":
            drawn = torch.rand(moment.shape, generator=generator_for(seed, key), device="cpu")
            return (drawn >= self.share).to(moment.device)
        sizes = moment.abs().float().flatten()
        count = int(self.share * sizes.numel())
        if count == 0:
            return torch.ones_like(moment, dtype=torch.bool)
        return (sizes > sizes.kthvalue(count).values).view(moment.shape)
