"""Converts the state of a published optimizer to our optimizer's state.

optimizer.pt numbers parameters instead of naming them, in the order of the published model's trained parameters. Our order
differs in two ways: the published LLaMA builds gate, down, up and transformers builds gate, up, down; and the parameters of one
layer follow the order in which its class creates them. The one possible order whose shapes fit is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.commands.published.read import OPTIMIZER, PublishedCheckpoint, PublishedError
from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.methods import METHODS
from peft_pretraining.optim.state import load_optimizer_state, set_moments_
from peft_pretraining.optim.updates import Updates

# Key of a state's tensors in newer versions of bitsandbytes.
_WRAPPED = "__bnb_optimizer_quant_state__"
# Elements per scale; 2048 in older versions of bitsandbytes.
_BNB_BLOCKS = (256, 2048)
# Parameters of one module, in the order in which the published classes create them.
_IN_LAYER = ("weight", "bias", "lora_A", "lora_B", "scaling", "sparse_value")
_IN_RELORA_LAYER = ("weight", "bias", "scaling", "lora_A", "lora_B")

State = Mapping[str, Any]


def carry_moments(published: PublishedCheckpoint, model: nn.Module, updates: Updates, args: Arguments) -> str | None:
    """Sets the state of `updates` to that of the published optimizer; returns None if done, else the reason why not.

    Raises:
        PublishedError: optimizer.pt does not hold the state of an optimizer.
    """
    if published.optimizer is None:
        return published.moments_problem
    numbers, states = _numbered_states(published)
    if not states:
        return f"{OPTIMIZER} holds no moments"
    if METHODS[args.peft_model].projected:
        return f"--peft_model {args.peft_model} keeps moments in subspaces; those of {OPTIMIZER} cannot be converted"
    kind = _kind(next(iter(states.values())))
    if kind is None:
        return f"{OPTIMIZER} has {', '.join(map(str, next(iter(states.values()))))}: the state of an unknown optimizer"
    if kind != args.optimizer and not (OPTIMIZERS[kind].adam and OPTIMIZERS[args.optimizer].adam):
        return f"{OPTIMIZER} is of {kind}, whose state --optimizer {args.optimizer} cannot use"
    parameters = dict(model.named_parameters())
    matching_orders = [
        names
        for names in _orders(list(updates.stepped), published.by_relora)
        if len(names) == len(numbers)
        and all(
            number not in states or _fits(states[number], parameters[name]) for number, name in zip(numbers, names, strict=True)
        )
    ]
    if not matching_orders:
        return f"the shapes of the {len(numbers)} tensors in {OPTIMIZER} fit no known order of the parameters"
    if len(matching_orders) > 1:
        return f"{OPTIMIZER} does not name its tensors, and the shapes of down_proj and up_proj are equal"
    # Creates empty states, if the optimizer supports it.
    load_optimizer_state(updates, parameters, {}, {}, lambda _: None)
    for number, name in zip(numbers, matching_orders[0], strict=True):
        if number in states:
            parameter = updates.stepped[name]
            _set(updates.optimizer.state[parameter], states[number], parameter, kind)
    return None


def other_betas(published: PublishedCheckpoint, args: Arguments) -> str | None:
    """A note if the published Adam had other betas than ours; else None."""
    groups = (published.optimizer or {}).get("optimizer", {}).get("param_groups") or [{}]
    betas = groups[0].get("betas") if isinstance(groups[0], dict) else None
    if not OPTIMIZERS[args.optimizer].adam or betas is None or tuple(betas) == (0.9, args.beta2):
        return None
    return f"betas {tuple(betas)}: (0.9, {args.beta2:g}) from now on (--beta2 chooses the second)"


def _numbered_states(published: PublishedCheckpoint) -> tuple[list[int], dict[int, State]]:
    """The numbers of all parameters in order, and the non-empty states by number. Raises PublishedError."""
    assert published.optimizer is not None
    document = published.optimizer["optimizer"]
    try:
        numbers = [number for group in document["param_groups"] for number in group["params"]]
        states = {number: _unwrapped(state) for number, state in document["state"].items()}
        consistent = len(set(numbers)) == len(numbers) and set(states) <= set(numbers)
    except (KeyError, TypeError, AttributeError) as error:
        raise PublishedError(
            f"{published.folder / OPTIMIZER}: not the state of an optimizer ({error!r}); move the file away to import the "
            "weights alone"
        ) from None
    if not consistent:
        raise PublishedError(
            f"{published.folder / OPTIMIZER}: parameter numbers of states and groups do not match; move the file away to import "
            "the weights alone"
        )
    return numbers, {number: state for number, state in states.items() if state}


def _unwrapped(state: State) -> State:
    """A state with bitsandbytes' nested tensors at the top level, without entries that are None (as SGD's unused momentum)."""
    flat = {**state, **state.get(_WRAPPED, {})}
    return {key: value for key, value in flat.items() if key != _WRAPPED and value is not None}


def _kind(state: State) -> str | None:
    """The name of the optimizer that a state belongs to, by its keys; None if unknown."""
    kinds = {
        # First, as Adafactor's state may also have the keys of Adam's.
        "adafactor": ("RMS", "step"),
        "adam": ("exp_avg", "exp_avg_sq", "step"),
        "adam8bit": ("state1", "state2", "step"),
        "sgd": ("momentum_buffer",),
    }
    return next((kind for kind, names in kinds.items() if all(name in state for name in names)), None)


def _orders(names: Sequence[str], relora: bool) -> Iterator[list[str]]:
    """Yields the orders in which a published program may have numbered our parameters. relora: the program is ReLoRA's."""
    order_in_layer = _IN_RELORA_LAYER if relora else _IN_LAYER
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    yielded: list[list[str]] = []
    # ReLoRA's program leaves its trainable scaling out of the optimizer.
    for chosen in (list(names), [name for name in names if not (relora and name.endswith(".scaling"))]):
        for up_after_down in (True, False):
            places = {
                owner: number + (1.5 if up_after_down and owner.endswith(".up_proj") else 0)
                for number, owner in enumerate(owners)
            }

            def place(name: str, places: Mapping[str, float] = places) -> tuple[float, int]:
                owner, _, key = name.rpartition(".")
                return places[owner], order_in_layer.index(key)

            order = sorted(chosen, key=place)
            if order not in yielded:
                yielded.append(order)
                yield order


def _fits(state: State, parameter: nn.Parameter) -> bool:
    """Whether the tensors of a state have the shapes for this parameter."""
    shape = tuple(parameter.shape)
    tensors = [state[key] for key in ("exp_avg", "exp_avg_sq", "state1", "state2", "momentum_buffer") if key in state]
    expected = [(tensor, shape) for tensor in tensors]
    if "exp_avg_sq_row" in state:
        expected += [(state["exp_avg_sq_row"], shape[:-1]), (state.get("exp_avg_sq_col"), shape[:-2] + shape[-1:])]
    return all(isinstance(tensor, Tensor) and tuple(tensor.shape) == size for tensor, size in expected)


def _set(state: dict[str, Any], saved: State, parameter: nn.Parameter, kind: str) -> None:
    """Fills one parameter's state in place. state: empty, unless the optimizer creates states before its first step."""
    device = parameter.device
    if not OPTIMIZERS[kind].adam:
        state.update({key: value.to(device) if isinstance(value, Tensor) else value for key, value in saved.items()})
        return
    step = int(saved["step"])
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        first, second = (_plain(saved, number).to(device, parameter.dtype).view_as(parameter) for number in (1, 2))
        state.update(step=torch.tensor(float(step), device=device), exp_avg=first.clone(), exp_avg_sq=second.clone())
        return
    if all(_same_layout(saved.get(key), value, exactly=key.startswith("qmap")) for key, value in tensors.items()):
        for key, value in tensors.items():
            value.copy_(saved[key])
    else:
        set_moments_(state, [_plain(saved, number).to(device).flatten() for number in (1, 2)])
    state["step"] = step


def _same_layout(saved: Any, tensor: Tensor, *, exactly: bool) -> bool:
    """Whether a saved tensor can be copied unchanged: same shape and dtype, and for shared code books equal values."""
    matching = isinstance(saved, Tensor) and saved.shape == tensor.shape and saved.dtype == tensor.dtype
    return matching and (not exactly or torch.equal(saved.to(tensor.device), tensor))


def _plain(state: State, number: int) -> Tensor:
    """The first or second moment as float32; 8-bit codes are fractions of their block's scale. Raises PublishedError."""
    if "exp_avg" in state:
        moment: Tensor = state[("exp_avg", "exp_avg_sq")[number - 1]]
        return moment.float()
    codes: Tensor = state[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes.float()
    book, scales = state.get(f"qmap{number}"), state.get(f"absmax{number}")
    if not isinstance(book, Tensor) or not isinstance(scales, Tensor) or book.numel() != 256:
        raise PublishedError(
            f"{OPTIMIZER}: 8-bit moments without code book or scales; move the file away to import the weights alone"
        )
    for block in _BNB_BLOCKS:
        if scales.numel() == -(-codes.numel() // block):
            shares = book.float()[codes.flatten().long()]
            return shares * scales.float().repeat_interleave(block)[: codes.numel()]
    raise PublishedError(
        f"{OPTIMIZER}: {scales.numel()} scales for {codes.numel()} 8-bit moments; blocks must have {_BNB_BLOCKS} elements; "
        "move the file away to import the weights alone"
    )
