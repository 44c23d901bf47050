"""Properties of the optimizers that --optimizer names, as the rest of the program needs them. Imports no torch.

A new optimizer is one row of OPTIMIZERS and one function of optim.build.BUILDERS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# bitsandbytes: tensors below this many elements keep float32 moments; the others have one scale per block.
BNB_MIN_ELEMENTS = 4096
BNB_BLOCK_ELEMENTS = 256
BNB_CODEBOOK_ENTRIES = 256
# torchao: bits -> (elements per float32 scale, elements per byte of codes, entries of a moment's code book).
AO_KINDS = {4: (128, 2, 16), 8: (256, 1, 256)}
AO_MIN_ELEMENTS = 4096

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Optimizer:
    """The properties of one optimizer.

    state_bytes(shape, width, beta1, bits): bytes of the state of a parameter of this shape. width: bytes per element of the
    parameter; beta1: as --beta1; bits: bits of its moments if they are chosen separately (embedding_bits), else None.
    """

    state_bytes: Callable[[Shape, int, float, int | None], int]
    # Weight decay acts on the parameter directly instead of being added to the gradient.
    decoupled_decay: bool = True
    # The state is Adam's two moments and step count, so it can be converted between such optimizers. Their steps can round
    # stochastically.
    adam: bool = False
    # Bytes of a parameter's step count if it is a tensor; with stochastic rounding it is a Python number.
    step_count_bytes: int = 0
    # Moments are quantised: --embedding_states chooses those of embedding and head.
    low_bit: bool = False
    # Bytes of state that all parameters share, if any of them has quantised moments.
    shared_bytes: int = 0
    # --beta1 has an effect; without beta1 the optimizer keeps no moment at all (moments_need_beta1).
    uses_beta1: bool = False
    moments_need_beta1: bool = False
    # Each element has its own, unquantised moment, so that ReLoRA can prune moments one by one.
    prunable: bool = False
    # The step of a shard equals the shard of the whole tensor's step, as --parallel fsdp requires.
    shardable: bool = True
    # torch.compile compiles its step.
    compiled: bool = False
    # Temporaries of a step, bytes per element of one slice of the tensor, or of the whole tensor if steps_whole.
    scratch_per_element: int = 0
    scratch_per_element_cuda: int = 0
    steps_whole: bool = False
    # The optimizer to suggest if memory is too small.
    smaller: str | None = None

    def keeps_moments(self, beta1: float) -> bool:
        """Tells whether the optimizer has moments that can be reset or pruned."""
        return bool(beta1) or not self.moments_need_beta1


def _adam(shape: Shape, width: int, beta1: float, bits: int | None) -> int:
    """torch's fused Adam: two moments in the parameter's dtype and a float32 step count."""
    return 2 * width * math.prod(shape) + 4


def _sgd(shape: Shape, width: int, beta1: float, bits: int | None) -> int:
    """torch's SGD: a momentum buffer in the parameter's dtype."""
    return width * math.prod(shape) if beta1 else 0


def _adafactor(shape: Shape, width: int, beta1: float, bits: int | None) -> int:
    """transformers' Adafactor: at least float32; row and column sums for matrices."""
    elements = math.prod(shape)
    second = shape[0] + shape[1] if len(shape) == 2 else elements
    return max(4, width) * (second + (elements if beta1 else 0))


def _adam8bit(shape: Shape, width: int, beta1: float, bits: int | None) -> int:
    """bitsandbytes' 8-bit Adam: two one-byte moments with a float32 scale per block; float32 moments for small tensors."""
    elements = math.prod(shape)
    if elements < BNB_MIN_ELEMENTS or bits == 32:
        return 2 * 4 * elements
    return 2 * elements + 2 * 4 * math.ceil(elements / BNB_BLOCK_ELEMENTS)


def _adamw4bit(shape: Shape, width: int, beta1: float, bits: int | None) -> int:
    """torchao's AdamW: codes, scales and a code book per moment for complete blocks; float32 for the rest and small tensors."""
    elements, bits = math.prod(shape), bits or 4
    if bits not in AO_KINDS or elements < AO_MIN_ELEMENTS:
        return 2 * 4 * elements
    block, per_byte, entries = AO_KINDS[bits]
    rest = elements % block
    quantised = elements - rest
    return 2 * (quantised // per_byte + 4 * (quantised // block) + 4 * entries + 4 * rest)


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(_adam, adam=True, decoupled_decay=False, step_count_bytes=4, prunable=True, smaller="adam8bit"),
    "adamw": Optimizer(_adam, adam=True, step_count_bytes=4, prunable=True, smaller="adam8bit"),
    "sgd": Optimizer(_sgd, decoupled_decay=False, uses_beta1=True, moments_need_beta1=True, prunable=True),
    "adafactor": Optimizer(
        _adafactor, uses_beta1=True, shardable=False, scratch_per_element=16, scratch_per_element_cuda=16, steps_whole=True
    ),
    "adam8bit": Optimizer(
        _adam8bit,
        adam=True,
        low_bit=True,
        # Two code books. On a GPU bitsandbytes' kernels need no temporaries.
        shared_bytes=2 * 4 * BNB_CODEBOOK_ENTRIES,
        scratch_per_element=24,
        smaller="adamw4bit",
    ),
    "adamw4bit": Optimizer(
        _adamw4bit, adam=True, low_bit=True, compiled=True, scratch_per_element=64, scratch_per_element_cuda=64
    ),
}

# Published names of optimizers -> the flags they stand for. The suffix `_per_layer` of any name means --per_layer.
PUBLISHED_NAMES: dict[str, dict[str, str]] = {
    "galore_adamw": {"optimizer": "adamw", "peft_model": "galore"},
    "galore_adafactor": {"optimizer": "adafactor", "peft_model": "galore"},
    "galore_adamw8bit": {"optimizer": "adam8bit", "peft_model": "galore"},
    "galore_adamw8bit_per_layer": {"optimizer": "adam8bit_per_layer", "peft_model": "galore"},
}
