"""The memory account of a run: bytes by class and at the peak, per process, and what would make them fit; no torch.

`memory.py` counts tensors exactly; here is what follows from how an update goes: which of them are alive together. Bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from peft_pretraining import memory
from peft_pretraining.model_config import ModelConfig

CLASSES = (
    *("parameters", "support", "gradients", "optimizer"),
    *("activations", "loss", "scratch", "runtime"),
)
# On a CPU: Python, torch, transformers, datasets and wandb, imported and idle, 0.51e9 resident with the pinned versions, and some
# 0.2e9 of freed blocks that malloc keeps (measured at 60M and 130M). On a GPU: the CUDA context and its libraries.
_RUNTIME = {"cpu": 710 * 10**6, "cuda": 500 * 10**6}
# Temporaries of an optimizer's step in bytes per element, of a slice of 2**21 where it steps in slices (optim/slices.py).
_SLICE_ELEMENTS = 2**21
_SLICE_SCRATCH = {"adam8bit": 24, "adamw4bit": 64}
_ROUNDING_SCRATCH = 36
_ADAFACTOR_SCRATCH = 16


@dataclass(frozen=True)
class Setting:
    """Everything that memory depends on; names as on the command line."""

    model: ModelConfig
    peft_model: str
    rank: int
    sp_ratio: float
    optimizer: str
    dtype: str
    batch_size: int
    max_length: int
    train_scaling: bool = False
    beta1: float = 0.0
    embedding_bits: int | None = None
    stochastic_rounding: bool = False
    per_layer: bool = False
    gradient_accumulation: int = 1
    world_size: int = 1
    parallel: str = "ddp"
    compute_dtype: str | None = None
    reshard_after_forward: bool = True
    activation_checkpointing: str | None = None
    compile: bool = False
    async_save: bool = False
    device_type: str = "cpu"

    @property
    def gradients_stay(self) -> bool:
        """Whether all gradients are there at once: always but in per-layer updates of a single micro-batch."""
        return not self.per_layer or self.gradient_accumulation > 1


def account(setting: Setting) -> dict[str, int]:
    """Bytes by class, "total" (their sum) and "peak" (the most that is alive at one time)."""
    counts = memory.parameter_counts(
        setting.model,
        method=setting.peft_model,
        rank=setting.rank,
        sparsity=setting.sp_ratio if setting.peft_model == "sltrain" else 0.0,
        train_scaling=setting.train_scaling,
    )
    static = memory.static_bytes(
        setting.model,
        counts,
        method=setting.peft_model,
        dtype=setting.dtype,
        optimizer=setting.optimizer,
        beta1=setting.beta1,
        embedding_bits=setting.embedding_bits,
        stochastic_rounding=setting.stochastic_rounding,
    )
    working = memory.activation_bytes(
        setting.model,
        batch_size=setting.batch_size,
        seq_len=setting.max_length,
        dtype=setting.dtype,
        checkpointing=setting.activation_checkpointing,
        compiled=setting.compile,
        chunk_rows=memory.loss_chunk_rows(setting.device_type),
    )
    groups = memory.tensor_groups(
        setting.model,
        method=setting.peft_model,
        rank=setting.rank,
        sparsity=counts.sparsity,
        train_scaling=setting.train_scaling,
    )
    width = memory.DTYPE_BYTES[setting.dtype]
    largest = max(group.elements // group.count for group in groups)
    if not setting.gradients_stay:
        static["gradients"] = width * largest
    layer, step = _layer_scratch(setting, groups), _step_scratch(setting, largest)
    copy = _copy_of_state(setting, static)
    found = static | working | {"scratch": max(layer, step) + copy, "runtime": _RUNTIME[setting.device_type]}
    found["total"] = sum(found[name] for name in CLASSES)
    found["peak"] = _peak(setting, found, layer, step) + copy
    return found


def _copy_of_state(setting: Setting, static: dict[str, int]) -> int:
    """What --async_save writes from; it stays from the first save on. That of a GPU's state is in the machine's memory."""
    if not setting.async_save or setting.device_type != "cpu":
        return 0
    return sum(static[name] for name in ("parameters", "support", "optimizer"))


def _peak(setting: Setting, found: dict[str, int], layer_scratch: int, step_scratch: int) -> int:
    """The largest of three moments of an update: the loss, the backward pass through a layer, the optimizer's step."""
    gradients, activations = found["gradients"], found["activations"]
    # DDP's buckets hold all gradients from the first update on; so does accumulation, from its first micro-batch.
    buckets = setting.world_size > 1 and not setting.per_layer
    before = gradients if setting.gradient_accumulation > 1 or buckets else 0
    head = memory.DTYPE_BYTES[setting.dtype] * setting.model.vocab_size * setting.model.hidden_size
    at_loss = before + activations + found["loss"]
    backward_begins = (before or head) + activations + layer_scratch
    one_layer = activations if setting.model.num_hidden_layers == 1 else activations // setting.model.num_hidden_layers
    if setting.gradients_stay:
        backward_ends = gradients + one_layer + layer_scratch
        at_step = gradients + step_scratch
    else:
        backward_ends = at_step = gradients + one_layer + max(layer_scratch, step_scratch)
    constant = sum(found[name] for name in ("parameters", "support", "optimizer", "runtime"))
    return constant + max(at_loss, backward_begins, backward_ends, at_step)


def _layer_scratch(setting: Setting, groups: list[memory.TensorGroup]) -> int:
    """Temporaries of the largest linear's backward: its weight or that weight's gradient, and the decoded support."""
    rows, columns = max(memory.linear_shapes(setting.model), key=lambda shape: shape[0] * shape[1])
    width = memory.DTYPE_BYTES[setting.dtype]
    if setting.peft_model == "full":
        return 0  # weight and gradient are counted as what they are
    nnz = max((g.shape[0] for g in groups if g.kind == "sparse"), default=0)
    positions = nnz * (4 if rows * columns <= 2**31 else 8)
    # Without a sparse part the weight is never built where the rank is small (functional.multiply_apart).
    dense = rows * columns * width if nnz or setting.rank >= rows * columns / (rows + columns) else 0
    return dense + 2 * positions + width * (2 * nnz + 2 * setting.rank * (rows + columns))


def _step_scratch(setting: Setting, largest: int) -> int:
    """Temporaries of the optimizer's step of the largest tensor."""
    if setting.optimizer == "adafactor":
        return _ADAFACTOR_SCRATCH * largest
    rounding = _ROUNDING_SCRATCH if setting.stochastic_rounding and setting.dtype == "bfloat16" else 0
    per_element = _SLICE_SCRATCH.get(setting.optimizer, 0)
    if setting.device_type == "cuda" and setting.optimizer == "adam8bit":
        per_element = 0  # its kernels need none
    return (per_element + rounding) * min(largest, _SLICE_ELEMENTS)


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
    moments = {"embedding_bits": setting.embedding_bits or 32}
    if setting.optimizer in ("adam", "adamw"):
        yield "optimizer", "adam8bit", {"optimizer": "adam8bit", **moments}
    if setting.optimizer == "adam8bit":
        yield "optimizer", "adamw4bit", {"optimizer": "adamw4bit", **moments}
    if setting.embedding_bits == 32:
        yield "embedding_states", "8bit", {"embedding_bits": 8}
    if setting.peft_model == "full":
        yield "peft_model", f"sltrain --rank {setting.rank} --sp_ratio {setting.sp_ratio}", {"peft_model": "sltrain"}
