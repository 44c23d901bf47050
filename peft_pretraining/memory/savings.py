"""Proposes flags that lower a run's memory, singly or together until a limit is reached; this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.memory.account import account
from peft_pretraining.memory.setting import Setting


@dataclass(frozen=True)
class Saving:
    """A change of one flag: its name, the text to add to the command, the resulting peak (bytes) and setting."""

    flag: str
    text: str
    peak: int
    setting: Setting


def savings(setting: Setting) -> list[Saving]:
    """Returns changes of single flags that lower the peak, the largest saving first; a change of the method comes last."""
    current_peak = account(setting)["peak"]
    options = []
    for flag, value, change in _changes(setting):
        changed = replace(setting, **change)
        peak = account(changed)["peak"]
        if peak < current_peak:
            options.append(Saving(flag, f"--{flag} {value}".strip(), peak, changed))
    return sorted(options, key=lambda saving: (saving.flag == "peft_model", saving.peak))


def fitting_flags(setting: Setting, limit: int) -> list[Saving]:
    """Returns changes that together lower the peak to `limit` bytes or below, the most effective first; [] if impossible."""
    taken: dict[str, Saving] = {}
    while account(setting)["peak"] > limit:
        options = savings(setting)
        if not options:
            return []
        # A flag changed again (a batch size halved twice) replaces its earlier change.
        taken.pop(options[0].flag, None)
        taken[options[0].flag] = options[0]
        setting = options[0].setting
    return list(taken.values())


def _changes(setting: Setting) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (flag, value, changed fields of the setting) for each flag that could lower memory."""
    method, optimizer = setting.method, OPTIMIZERS[setting.optimizer]
    if setting.world_size > 1 and not setting.sharded and optimizer.shardable and not method.projected:
        yield "parallel", "fsdp", {"parallel": "fsdp"}
    if setting.sharded and not setting.reshard_after_forward:
        yield "reshard_after_forward", "true", {"reshard_after_forward": True}
    if setting.activation_checkpointing is None:
        yield "activation_checkpointing", "", {"activation_checkpointing": "layer"}
    if setting.batch_size % 2 == 0:
        # The update stays the same: twice as many micro-batches of half the size.
        half, twice = setting.batch_size // 2, 2 * setting.gradient_accumulation
        yield "batch_size", str(half), {"batch_size": half, "gradient_accumulation": twice}
    if setting.dtype != "bfloat16":
        yield "dtype", "bfloat16", {"dtype": "bfloat16"}
    if setting.async_save:
        yield "async_save", "false", {"async_save": False}
    if not setting.per_layer:
        yield "per_layer", "", {"per_layer": True}
    if optimizer.smaller is not None:
        change = {"optimizer": optimizer.smaller, "embedding_bits": setting.embedding_bits or 32}
        yield "optimizer", method.optimizer_flags(optimizer.smaller), change
    if setting.embedding_bits == 32:
        yield "embedding_states", "8bit", {"embedding_bits": 8}
    if method.lighter is not None:
        # The published optimizer name, because --optimizer galore_... may be the only flag that selects galore.
        own_name = f" --optimizer {setting.optimizer}" if method.projected else ""
        value = f"{method.lighter} --rank {setting.rank} --sp_ratio {setting.sp_ratio}{own_name}"
        yield "peft_model", value, {"peft_model": method.lighter}
