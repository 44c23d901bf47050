"""What would make a run's memory fit: changes of single flags, and those that together reach a limit; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.memory.account import account
from peft_pretraining.memory.setting import Setting


@dataclass(frozen=True)
class Saving:
    """A change of one flag: its name, the text to add to the command, and the peak that it leaves."""

    flag: str
    text: str
    peak: int
    setting: Setting


def savings(setting: Setting) -> list[Saving]:
    """Changes of single flags that lower the peak, the largest saving first; another method comes last."""
    here = account(setting)["peak"]
    found = []
    for flag, value, change in _changes(setting):
        changed = replace(setting, **change)
        peak = account(changed)["peak"]
        if peak < here:
            found.append(Saving(flag, f"--{flag} {value}".strip(), peak, changed))
    return sorted(found, key=lambda saving: (saving.flag == "peft_model", saving.peak))


def fitting_flags(setting: Setting, limit: int) -> list[Saving]:
    """Changes that together bring the peak to `limit` or below, in the order of what they save; [] where nothing does."""
    taken: dict[str, Saving] = {}
    while account(setting)["peak"] > limit:
        options = savings(setting)
        if not options:
            return []
        taken.pop(options[0].flag, None)  # a batch size halved again stands in for the first halving
        taken[options[0].flag] = options[0]
        setting = options[0].setting
    return list(taken.values())


def _changes(setting: Setting) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(flag, value, fields of the setting): what could take less memory."""
    method, optimizer = setting.method, OPTIMIZERS[setting.optimizer]
    if setting.world_size > 1 and not setting.sharded and optimizer.shardable and not method.projected:
        yield "parallel", "fsdp", {"parallel": "fsdp"}
    if setting.sharded and not setting.reshard_after_forward:
        yield "reshard_after_forward", "true", {"reshard_after_forward": True}
    if setting.activation_checkpointing is None:
        yield "activation_checkpointing", "", {"activation_checkpointing": "layer"}
    if setting.batch_size % 2 == 0:
        # The same update in twice as many micro-batches.
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
        # A published name of the optimizer may be all that says which method it is now.
        own_name = f" --optimizer {setting.optimizer}" if method.projected else ""
        value = f"{method.lighter} --rank {setting.rank} --sp_ratio {setting.sp_ratio}{own_name}"
        yield "peft_model", value, {"peft_model": method.lighter}
