"""Converts the state of a published optimizer to that of ours.

optimizer.pt numbers parameters instead of naming them: in the order of the published model's trained parameters, which is ours
but for two things. The published LLaMA builds gate, down, up where transformers' builds gate, up, down, and parameters of one
layer come in the order in which its class made them. Of the orders that there are the one is taken whose shapes fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.commands.published.read import OPTIMIZER, Published, PublishedError
from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.methods import METHODS
from peft_pretraining.optim.state import load_optimizer_state, set_moments_
from peft_pretraining.optim.updates import Updates

_WRAPPED = "__bnb_optimizer_quant_state__"  # where newer versions of bitsandbytes put the tensors of a state
_BNB_BLOCKS = (256, 2048)  # elements per scale; older versions of bitsandbytes had the larger ones
# Parameters of one module, in the order in which the published classes make them.
_IN_LAYER = ("weight", "bias", "lora_A", "lora_B", "scaling", "sparse_value")
_IN_RELORA_LAYER = ("weight", "bias", "scaling", "lora_A", "lora_B")

State = Mapping[str, Any]


def carry_moments(published: Published, model: nn.Module, updates: Updates, args: Arguments) -> str | None:
    """Set the state of `updates` to that of the published optimizer; None if that was done, else why it was not.

    Raises:
        PublishedError: optimizer.pt is not the state of an optimizer.
    """
    if published.optimizer is None:
        return published.moments_problem
    numbers, states = _numbered_states(published)
    if not states:
        return f"{OPTIMIZER} holds none"
    if METHODS[args.peft_model].projected:
        return (
            f"--peft_model {args.peft_model} keeps them in subspaces of the gradients, which those of {OPTIMIZER} are not read in"
        )
    kind = _kind(next(iter(states.values())))
    if kind is None:
        return f"{OPTIMIZER} has {', '.join(map(str, next(iter(states.values()))))}, of an optimizer that is not known here"
    if kind != args.optimizer and not (OPTIMIZERS[kind].adam and OPTIMIZERS[args.optimizer].adam):
        return f"{OPTIMIZER} is of {kind}, whose state --optimizer {args.optimizer} cannot use"
    parameters = dict(model.named_parameters())
    found = [
        names
        for names in _orders(list(updates.stepped), published.by_relora)
        if len(names) == len(numbers)
        and all(
            number not in states or _fits(states[number], parameters[name]) for number, name in zip(numbers, names, strict=True)
        )
    ]
    if not found:
        return f"{OPTIMIZER} numbers {len(numbers)} tensors, whose shapes are those of no known order of the parameters"
    if len(found) > 1:
        return f"{OPTIMIZER} numbers its tensors, and those of down_proj and up_proj cannot be told apart by their shapes"
    load_optimizer_state(updates, parameters, {}, {}, lambda _: None)  # empty ones, made where the optimizer can
    for number, name in zip(numbers, found[0], strict=True):
        if number in states:
            parameter = updates.stepped[name]
            _set(updates.optimizer.state[parameter], states[number], parameter, kind)
    return None


def other_betas(published: Published, args: Arguments) -> str | None:
    """A note if the published Adam had other betas; else None."""
    groups = (published.optimizer or {}).get("optimizer", {}).get("param_groups") or [{}]
    betas = groups[0].get("betas") if isinstance(groups[0], dict) else None
    if not OPTIMIZERS[args.optimizer].adam or betas is None or tuple(betas) == (0.9, 0.999):
        return None
    return f"betas {tuple(betas)}: (0.9, 0.999) from now on"


def _numbered_states(published: Published) -> tuple[list[int], dict[int, State]]:
    """The numbers of all parameters, in order, and what there is of state by number."""
    assert published.optimizer is not None
    document = published.optimizer["optimizer"]
    try:
        numbers = [number for group in document["param_groups"] for number in group["params"]]
        states = {number: _unwrapped(state) for number, state in document["state"].items()}
        sound = len(set(numbers)) == len(numbers) and set(states) <= set(numbers)
    except (KeyError, TypeError, AttributeError) as error:
        raise PublishedError(
            f"{published.folder / OPTIMIZER}: not the state of an optimizer ({error!r}); move it away to import the weights "
            "without it"
        ) from None
    if not sound:
        raise PublishedError(
            f"{published.folder / OPTIMIZER}: its state is of parameters that its groups do not have, or have twice; move it "
            "away to import the weights without it"
        )
    return numbers, {number: state for number, state in states.items() if state}


def _unwrapped(state: State) -> State:
    """Without what is None (SGD's momentum, where there is none)."""
    flat = {**state, **state.get(_WRAPPED, {})}
    return {key: value for key, value in flat.items() if key != _WRAPPED and value is not None}


def _kind(state: State) -> str | None:
    """The optimizer that a state belongs to, by the names in it."""
    kinds = {
        # Adafactor's state may have the names of Adam's too.
        "adafactor": ("RMS", "step"),
        "adam": ("exp_avg", "exp_avg_sq", "step"),
        "adam8bit": ("state1", "state2", "step"),
        "sgd": ("momentum_buffer",),
    }
    return next((kind for kind, names in kinds.items() if all(name in state for name in names)), None)


def _orders(names: Sequence[str], relora: bool) -> Iterator[list[str]]:
    """The orders that the published programs may have numbered our trained parameters in; relora: it is ReLoRA's."""
    within = _IN_RELORA_LAYER if relora else _IN_LAYER
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    yielded: list[list[str]] = []
    # ReLoRA's own program leaves its trainable scaling out of the optimizer.
    for chosen in (list(names), [name for name in names if not (relora and name.endswith(".scaling"))]):
        for up_after_down in (True, False):
            places = {
                owner: number + (1.5 if up_after_down and owner.endswith(".up_proj") else 0)
                for number, owner in enumerate(owners)
            }

            def place(name: str, places: Mapping[str, float] = places) -> tuple[float, int]:
                owner, _, key = name.rpartition(".")
                return places[owner], within.index(key)

            order = sorted(chosen, key=place)
            if order not in yielded:
                yielded.append(order)
                yield order


def _fits(state: State, parameter: nn.Parameter) -> bool:
    """Whether a state may be of a parameter of this shape."""
    shape = tuple(parameter.shape)
    whole = [state[key] for key in ("exp_avg", "exp_avg_sq", "state1", "state2", "momentum_buffer") if key in state]
    expected = [(tensor, shape) for tensor in whole]
    if "exp_avg_sq_row" in state:
        expected += [(state["exp_avg_sq_row"], shape[:-1]), (state.get("exp_avg_sq_col"), shape[:-2] + shape[-1:])]
    return all(isinstance(tensor, Tensor) and tuple(tensor.shape) == size for tensor, size in expected)


def _set(own: dict[str, Any], saved: State, parameter: nn.Parameter, kind: str) -> None:
    """Fill one parameter's state; `own` holds what the optimizer has made of it, if it makes any before its first step."""
    device = parameter.device
    if not OPTIMIZERS[kind].adam:
        own.update({key: value.to(device) if isinstance(value, Tensor) else value for key, value in saved.items()})
        return
    step = int(saved["step"])
    tensors = {key: value for key, value in own.items() if isinstance(value, Tensor)}
    if not tensors:
        first, second = (_plain(saved, number).to(device, parameter.dtype).view_as(parameter) for number in (1, 2))
        own.update(step=torch.tensor(float(step), device=device), exp_avg=first.clone(), exp_avg_sq=second.clone())
        return
    if all(_same_layout(saved.get(key), value, exactly=key.startswith("qmap")) for key, value in tensors.items()):
        for key, value in tensors.items():
            value.copy_(saved[key])
    else:
        set_moments_(own, [_plain(saved, number).to(device).flatten() for number in (1, 2)])
    own["step"] = step


def _same_layout(saved: Any, own: Tensor, *, exactly: bool) -> bool:
    """Whether a saved tensor can be taken as it is; of a code book that many share it must be the same one."""
    alike = isinstance(saved, Tensor) and saved.shape == own.shape and saved.dtype == own.dtype
    return alike and (not exactly or torch.equal(saved.to(own.device), own))


def _plain(state: State, number: int) -> Tensor:
    """The first or second moment as plain numbers; 8-bit codes stand for shares of their block's scale. Raises PublishedError."""
    if "exp_avg" in state:
        moment: Tensor = state[("exp_avg", "exp_avg_sq")[number - 1]]
        return moment.float()
    codes: Tensor = state[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes.float()
    book, scales = state.get(f"qmap{number}"), state.get(f"absmax{number}")
    if not isinstance(book, Tensor) or not isinstance(scales, Tensor) or book.numel() != 256:
        raise PublishedError(f"{OPTIMIZER}: 8-bit moments without their code book or scales; move it away to import the weights")
    for block in _BNB_BLOCKS:
        if scales.numel() == -(-codes.numel() // block):
            shares = book.float()[codes.flatten().long()]
            return shares * scales.float().repeat_interleave(block)[: codes.numel()]
    raise PublishedError(
        f"{OPTIMIZER}: {scales.numel()} scales of {codes.numel()} 8-bit moments; known are blocks of {_BNB_BLOCKS} elements; "
        "move it away to import the weights without it"
    )
