"""Builds the optimizer for each name of --optimizer, on whole matrices or in GaLore's subspaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.config.parameter_groups import group_of
from peft_pretraining.distributed.world import World
from peft_pretraining.optim.conditioning import Conditioned
from peft_pretraining.optim.galore import GaLore, Subspace
from peft_pretraining.optim.orthogonal import Muon, Spectron, pairs_of_factors
from peft_pretraining.optim.slices import StochasticRounding
from peft_pretraining.optim.updates import Combined, l2_norm

ADAM_BETA1 = 0.9


class OptimizerUnavailable(ValueError):
    """An optimizer whose package is not installed."""


@dataclass(frozen=True)
class Settings:
    """Settings of an optimizer.

    lr: learning rate of the first update; the trainer sets it before every update. weight_decay: added to the gradient for adam
    and sgd, decoupled for the others (as in their libraries). beta1: sgd's momentum and adafactor's first moment; 0 turns it off.
    The Adam family has the published beta1 of 0.9, and beta2 and eps from here. embedding_bits: 32 for float32 moments of
    embedding and output head with low-bit optimizers; None: as for the rest. rounding: stochastic rounding of bfloat16
    and int8 parameters. sliced: Adam and AdamW step in slices, also without rounding, as int8 parameters and accumulation in
    moments (optim.moments.Accumulating) need. lr_ratios: rates of parameter groups, divided by lr; 1 for the groups that are
    left out. undecayed: groups without weight decay. Groups: see config.parameter_groups. momentum, factor_scale: muon's and
    spectron's momentum, and alpha / r for spectron. condition_gradients: condition the gradients of muon's and spectron's other
    parameters.
    """

    lr: float
    weight_decay: float
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    embedding_bits: int | None = None
    rounding: StochasticRounding | None = None
    sliced: bool = False
    lr_ratios: Mapping[str, float] = field(default_factory=dict)
    undecayed: Collection[str] = ()
    momentum: float = 0.95
    factor_scale: float = 1.0
    condition_gradients: bool = False

    @property
    def adam(self) -> dict[str, Any]:
        """Arguments of the Adam family's constructors."""
        return {"lr": self.lr, "betas": (ADAM_BETA1, self.beta2), "eps": self.eps, "weight_decay": self.weight_decay}


def build_optimizer(name: str, parameters: Mapping[str, nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Builds the optimizer for a name of --optimizer.

    Args:
        name: one of BUILDERS.
        parameters: trainable parameters by qualified name, all on one device.
        settings: fields of Settings.

    Raises:
        ValueError: an unknown name.
        OptimizerUnavailable: the package behind the name cannot be imported.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown optimizer {name!r}: must be one of {', '.join(BUILDERS)}")
    return BUILDERS[name](parameters, Settings(**settings))


def build_galore(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    matrices: Collection[str],
    subspace: Subspace,
    world: World,
    **settings: Any,
) -> torch.optim.Optimizer:
    """Builds the optimizer for a name of --optimizer; it steps some matrices in a subspace of their gradients.

    Args:
        matrices: names of the projected matrices; `parameters` may contain some, all or none of them.
        subspace, world: see GaLore.
        settings: fields of Settings.

    Raises:
        As build_optimizer.
    """
    projected = {key: parameter for key, parameter in parameters.items() if key in matrices}
    others = {key: parameter for key, parameter in parameters.items() if key not in matrices}
    ordinary = build_optimizer(name, others, **settings) if others else None
    if ordinary is not None and not projected:
        return ordinary
    inner = {**settings, "weight_decay": 0.0, "rounding": None, "embedding_bits": None, "lr_ratios": {}}
    return GaLore(
        projected,
        lambda matrix: build_optimizer(name, {"projected": matrix}, **inner),
        ordinary,
        subspace,
        world,
        groups=_groups(projected, Settings(**settings)),
        lr=settings["lr"],
        decoupled=OPTIMIZERS[name].decoupled_decay,
        rounding=settings.get("rounding"),
    )


def _groups(parameters: Mapping[str, nn.Parameter], settings: Settings) -> list[dict[str, Any]]:
    """Parameters in groups of equal learning rate, weight decay and (state_bits) bits of the moments."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        kind = group_of(name, parameter.dim())
        options: dict[str, Any] = {
            "lr_ratio": settings.lr_ratios.get(kind, 1.0),
            "weight_decay": 0.0 if kind in settings.undecayed else settings.weight_decay,
        }
        # Without an entry, moments have the optimizer's own number of bits.
        if settings.embedding_bits and kind in ("embedding", "head"):
            options["state_bits"] = settings.embedding_bits
        groups.setdefault(tuple(options.items()), {"params": [], **options})["params"].append(parameter)
    return list(groups.values())


def _names(parameters: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in parameters.items()}


def _adam(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.sliced or settings.rounding is not None:
        return _sliced_adam(parameters, settings, decoupled=False)
    return torch.optim.Adam(_groups(parameters, settings), fused=True, **settings.adam)


def _adamw(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.sliced or settings.rounding is not None:
        return _sliced_adam(parameters, settings, decoupled=True)
    return torch.optim.AdamW(_groups(parameters, settings), fused=True, **settings.adam)


def _sgd(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    # torch's fused SGD on a CPU does not change 16-bit parameters (torch 2.13, issue 191763).
    fused = all(p.device.type != "cpu" or p.dtype in (torch.float32, torch.float64) for p in parameters.values())
    groups = _groups(parameters, settings)
    return torch.optim.SGD(groups, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.beta1, fused=fused)


def _adafactor(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    from transformers import optimization

    class Adafactor(optimization.Adafactor):
        @staticmethod
        def _rms(tensor: torch.Tensor) -> torch.Tensor:
            # The library's norm is too small for large tensors on a CPU, so that their updates would be clipped too late.
            return l2_norm(tensor) / math.sqrt(tensor.numel())

    return Adafactor(
        _groups(parameters, settings),
        lr=settings.lr,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        beta1=settings.beta1 or None,
        weight_decay=settings.weight_decay,
        relative_step=False,
        scale_parameter=False,
        warmup_init=False,
    )


# What a package is for, and what to use without it.
_FOR_8BIT = ("8-bit moments", "bitsandbytes", "adamw, or muon and spectron without 8bit")
_FOR_4BIT = (
    "4-bit moments, --stochastic_rounding, --weight_dtype int8 and --accumulate moments",
    "torchao",
    "--optimizer adam8bit without --stochastic_rounding",
)


@contextmanager
def _needing(need: str, package: str, instead: str) -> Iterator[None]:
    """Raises OptimizerUnavailable, which says what to use instead, if an import in its block fails."""
    try:
        yield
    except ImportError as error:
        raise OptimizerUnavailable(
            f"{need} need {package}, which cannot be imported ({error}); run pip install --upgrade {package}, or use {instead}"
        ) from None


def _adam8bit(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    with _needing(*_FOR_8BIT):
        from peft_pretraining.optim.adam8bit import SlicedAdam8bit
    return SlicedAdam8bit(_groups(parameters, settings), names=_names(parameters), rounding=settings.rounding, **settings.adam)


def _adamw4bit(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    return _sliced_adam(parameters, settings, decoupled=True, state_bits=4)


def _sliced_adam(
    parameters: Mapping[str, nn.Parameter], settings: Settings, decoupled: bool, state_bits: int | None = None
) -> torch.optim.Optimizer:
    with _needing(*_FOR_4BIT):
        from peft_pretraining.optim.adam_ao import SlicedAdam
    return SlicedAdam(
        _groups(parameters, settings),
        names=_names(parameters),
        rounding=settings.rounding,
        **settings.adam,
        decoupled=decoupled,
        state_bits=state_bits,
    )


def _stable_spam(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    optimizer = Conditioned(_adamw(parameters, settings))
    for group in optimizer.param_groups:
        group["first_beta1"] = ADAM_BETA1
    return optimizer


def _muon(parameters: Mapping[str, nn.Parameter], settings: Settings, state_bits: int | None = None) -> torch.optim.Optimizer:
    return _orthogonal(parameters, settings, Muon, state_bits)


def _spectron(parameters: Mapping[str, nn.Parameter], settings: Settings, state_bits: int | None = None) -> torch.optim.Optimizer:
    pairs = [(parameters[lora_A], parameters[lora_B]) for lora_A, lora_B in pairs_of_factors(parameters)]
    return _orthogonal(parameters, settings, Spectron, state_bits, pairs=pairs, scale=settings.factor_scale)


def _orthogonal(
    parameters: Mapping[str, nn.Parameter], settings: Settings, kind: type[Muon], state_bits: int | None, **more: Any
) -> torch.optim.Optimizer:
    """Muon or Spectron for the matrices, AdamW with moments of as many bits for all other parameters. more: of `kind`."""
    if state_bits:
        needed = {8: _FOR_8BIT, 4: _FOR_4BIT}[state_bits]
        with _needing(*needed):
            import_module(needed[1])
    matrices = {name: parameter for name, parameter in parameters.items() if group_of(name, parameter.dim()) == "matrix"}
    others = {name: parameter for name, parameter in parameters.items() if name not in matrices}
    adam = {None: _adamw, 8: _adam8bit, 4: _adamw4bit}[state_bits]
    members = [adam(others, settings)] if others else []
    if settings.condition_gradients:
        members = [Conditioned(member) for member in members]
    if matrices:
        more |= {"lr": settings.lr, "weight_decay": settings.weight_decay, "momentum": settings.momentum}
        more |= {"names": _names(matrices), "rounding": settings.rounding, "state_bits": state_bits}
        members.append(kind(_groups(matrices, settings), **more))
    return members[0] if len(members) == 1 else Combined(members)


# One builder for each row of config.optimizers.OPTIMIZERS. Builders import optional packages themselves.
BUILDERS: dict[str, Callable[[Mapping[str, nn.Parameter], Settings], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "adam8bit": _adam8bit,
    "adamw4bit": _adamw4bit,
    "stable_spam": _stable_spam,
    "muon": _muon,
    "muon8bit": partial(_muon, state_bits=8),
    "muon4bit": partial(_muon, state_bits=4),
    "spectron": _spectron,
    "spectron8bit": partial(_spectron, state_bits=8),
    "spectron4bit": partial(_spectron, state_bits=4),
}
