"""The settings that a run's memory and communication depend on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from peft_pretraining.config.arguments import ROWS, Arguments, embedding_bits
from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.distributed.world import World
from peft_pretraining.methods import METHODS
from peft_pretraining.methods.method import Method


@dataclass(frozen=True)
class MemorySetting:
    """All values that a run's memory depends on, named as on the command line."""

    model: ModelConfig
    peft_model: str
    rank: int
    sp_ratio: float
    optimizer: str
    dtype: str
    batch_size: int
    max_length: int
    weight_dtype: str | None = None
    train_scaling: bool = False
    support: str = "uniform"
    linear_path: str = "auto"
    linear_cache: str = "none"
    kernels: str = "auto"
    beta1: float = 0.0
    condition_gradients: bool = False
    embedding_bits: int | None = None
    stochastic_rounding: bool = False
    proj_type: str = "std"
    init: str = "default"
    rebalance: bool = False
    per_layer: bool = False
    head_gradient: str = "whole"
    grad_norm_growth: float | None = None
    gradient_accumulation: int = 1
    accumulate: str = "gradients"
    world_size: int = 1
    parallel: str = "ddp"
    compute_dtype: str | None = None
    reduce_dtype: str | None = None
    reshard_after_forward: bool = True
    activation_checkpointing: str | None = None
    compile: bool = False
    document_mask: bool = False
    async_save: bool = False
    device_type: str = "cpu"

    @property
    def gradients_stay(self) -> bool:
        """True if all gradients are allocated at once: always, except in per-layer updates that keep none for later."""
        return not self.per_layer or (self.gradient_accumulation > 1 and self.accumulate == "gradients")

    @property
    def steps_rows(self) -> bool:
        """True if embedding and head are stepped slice by slice, without a gradient of their size (optim.updates)."""
        if self.head_gradient != "slices" or self.gradients_stay:
            return False
        # A gradient is conditioned, or its growth limited, as a whole.
        whole = self.grad_norm_growth is not None or self.condition_gradients
        alone = self.world_size == 1 and not whole and not self.model.tie_word_embeddings
        sliced = self.stochastic_rounding or self.weight_dtype is not None or self.accumulate == "moments"
        return alone and OPTIMIZERS[self.optimizer].steps_slices(sliced)

    @property
    def sharded(self) -> bool:
        """True if each process holds only a part of every parameter."""
        return self.parallel == "fsdp" and self.world_size > 1

    @property
    def parts(self) -> int:
        """The number of parts into which a parameter is divided over the processes."""
        return self.world_size if self.sharded else 1

    @property
    def computes_in(self) -> str:
        """Dtype of activations, of gathered parameters and of their gradients before they are reduced."""
        return (self.sharded and self.compute_dtype) or self.dtype

    @property
    def reduces_in(self) -> str:
        """Dtype in which gradients are summed over processes, and by FSDP2 over micro-batches."""
        return self.reduce_dtype or self.computes_in

    @property
    def method_arguments(self) -> dict[str, Any]:
        """What tensor_groups and parameter_counts need besides the model."""
        return {
            "method": self.peft_model,
            "rank": self.rank,
            "sparsity": self.sp_ratio,
            "train_scaling": self.train_scaling,
            "support": self.support,
        }

    @property
    def method(self) -> Method:
        """The object behind peft_model."""
        return METHODS[self.peft_model]


def memory_setting(
    args: Arguments, model: ModelConfig, world: World, dtype: str, accumulation: int, device_type: str
) -> MemorySetting:
    """Returns the memory setting of a run."""
    same = {field.name: getattr(args, field.name) for field in fields(MemorySetting) if field.name in ROWS}
    return MemorySetting(
        **same
        | {
            "model": model,
            "dtype": dtype,
            # What auto keeps is decided by the plan, which adds it where it fits.
            "linear_cache": "none" if args.linear_cache == "auto" else args.linear_cache,
            "embedding_bits": embedding_bits(args),
            "document_mask": args.packing and args.document_mask,
            "gradient_accumulation": accumulation,
            "world_size": world.size,
            "device_type": device_type,
        }
    )
