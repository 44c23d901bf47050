"""Properties of the optimizers that --optimizer names, as the rest of the program needs them. Imports no torch.

A new optimizer is one row of OPTIMIZERS and one function of optim.build.BUILDERS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# bitsandbytes: tensors below this many elements keep float32 moments; the others have one scale per block.
BNB_MIN_ELEMENTS = 4096
BNB_BLOCK_ELEMENTS = 256
BNB_CODEBOOK_ENTRIES = 256
# Gradient conditioning (optim.conditioning.Conditioned): bytes of its state of a tensor, three float32 averages; and of its
# temporaries per element of a slice, which are absolute values, a mask, factors in float32 and in the gradient's dtype.
CONDITIONING_BYTES = 3 * 4
CONDITIONING_SCRATCH = 9
# torchao: bits -> (elements per float32 scale, elements per byte of codes, entries of a moment's code book).
AO_KINDS = {4: (128, 2, 16), 8: (256, 1, 256)}
AO_MIN_ELEMENTS = 4096

Shape = tuple[int, ...]
# Bytes of the state of a parameter, see Optimizer.
StateBytes = Callable[[Shape, int, float, int | None], int]


@dataclass(frozen=True)
class Optimizer:
    """The properties of one optimizer.

    state_bytes(shape, width, beta1, bits): bytes of the state of a parameter of this shape. width: bytes per element of the
    parameter; beta1: as --beta1; bits: bits of its moments if they are chosen separately (embedding_bits), else None.
    """

    state_bytes: StateBytes
    # Weight decay acts on the parameter directly instead of being added to the gradient.
    decoupled_decay: bool = True
    # The state is Adam's two moments and step count, so it can be converted between such optimizers. Their steps can round
    # stochastically.
    adam: bool = False
    # Bytes of a parameter's step count if it is a tensor; with stochastic rounding it is a Python number.
    step_count_bytes: int = 0
    # Bits of a quantised moment, None if moments are not quantised.
    moment_bits: int | None = None
    # Bytes of state that all parameters share, if any of them has quantised moments; of matrices, see matrix_bytes.
    shared_bytes: int = 0
    matrix_shared_bytes: int = 0
    # --beta1 has an effect; without beta1 the optimizer keeps no moment at all (moments_need_beta1).
    uses_beta1: bool = False
    moments_need_beta1: bool = False
    # Each element has its own, unquantised moment, so that ReLoRA can prune moments one by one.
    prunable: bool = False
    # The optimizer is not Adam itself, but Adam steps some or all of its parameters.
    uses_adam: bool = False
    # Why --parallel fsdp is impossible: the step of a part of a tensor is not that part of the whole tensor's step.
    not_shardable: str | None = None
    # The matrices of attention and MLP linears are stepped along an orthogonalised momentum: bytes of the state of one, arguments
    # as for state_bytes, which is for all other parameters.
    matrix_bytes: StateBytes | None = None
    # The factors of a linear are stepped together.
    steps_pairs: bool = False
    # The optimizer conditions the gradients of all parameters.
    conditions_all_gradients: bool = False
    # Updates between two resets of all moments, unless --reset_moments_every says otherwise.
    reset_every: int | None = None
    # Why gradients of micro-batches cannot be added to its moments (--accumulate moments).
    not_accumulating: str | None = None
    # Temporaries of a step, bytes per element of one slice of the tensor, or of the whole tensor if steps_whole; whether a step
    # on a GPU has them too.
    scratch_per_element: int = 0
    scratch_on_gpu: bool = True
    steps_whole: bool = False
    # The optimizer to suggest if memory is too small.
    smaller: str | None = None

    @property
    def low_bit(self) -> bool:
        """Whether moments are quantised: --embedding_states chooses those of embedding and head."""
        return self.moment_bits is not None

    @property
    def has_adam(self) -> bool:
        """Whether Adam steps some of the parameters or all: --beta2, --eps and --stochastic_rounding work."""
        return self.adam or self.uses_adam

    def steps_slices(self, stochastic_rounding: bool) -> bool:
        """Tells whether embedding and head are stepped by an optimizer that needs a slice of their gradient at a time."""
        return self.low_bit or (stochastic_rounding and (self.adam or self.matrix_bytes is not None))

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


def _muon(shape: Shape, width: int, beta1: float, bits: int | None) -> int:
    """One moment in the parameter's dtype."""
    return width * math.prod(shape)


def _muon8bit(shape: Shape, width: int, beta1: float, bits: int | None) -> int:
    """One one-byte moment with a float32 scale per block; a float32 moment of small matrices."""
    elements = math.prod(shape)
    return 4 * elements if elements < BNB_MIN_ELEMENTS else elements + 4 * math.ceil(elements / BNB_BLOCK_ELEMENTS)


def _muon4bit(shape: Shape, width: int, beta1: float, bits: int | None) -> int:
    """One moment as adamw4bit's."""
    return _adamw4bit(shape, width, beta1, 4) // 2


def _spectron(of_muon: StateBytes) -> StateBytes:
    """Returns Spectron's bytes: Muon's, and a float32 vector of a number per row."""
    return lambda shape, width, beta1, bits: of_muon(shape, width, beta1, bits) + 4 * shape[0]


def _adamw4bit(shape: Shape, width: int, beta1: float, bits: int | None) -> int:
    """torchao's AdamW: codes, scales and a code book per moment for complete blocks; float32 for the rest and small tensors."""
    elements, bits = math.prod(shape), bits or 4
    if bits not in AO_KINDS or elements < AO_MIN_ELEMENTS:
        return 2 * 4 * elements
    block, per_byte, entries = AO_KINDS[bits]
    rest = elements % block
    quantised = elements - rest
    return 2 * (quantised // per_byte + 4 * (quantised // block) + 4 * entries + 4 * rest)


# bitsandbytes' code book of one moment.
_CODE_BOOK_BYTES = 4 * BNB_CODEBOOK_ENTRIES


# The temporaries of Adam's steps, bytes per element; on a GPU bitsandbytes' kernels need none.
_ADAM8BIT: dict[str, Any] = {
    "moment_bits": 8,
    "shared_bytes": 2 * _CODE_BOOK_BYTES,
    "scratch_per_element": 24,
    "scratch_on_gpu": False,
}
_ADAMW4BIT: dict[str, Any] = {"moment_bits": 4, "scratch_per_element": 64}


def _orthogonal(
    matrix_bytes: StateBytes,
    others: StateBytes = _adam,
    **more: Any,
) -> Optimizer:
    """Muon or Spectron for the matrices of attention and MLP linears; AdamW, with states of `others`, for all else."""
    reason = "it orthogonalises whole matrices, of which a process has a part"
    count = 4 if others is _adam else 0
    return Optimizer(others, uses_adam=True, step_count_bytes=count, not_shardable=reason, matrix_bytes=matrix_bytes, **more)


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(_adam, adam=True, decoupled_decay=False, step_count_bytes=4, prunable=True, smaller="adam8bit"),
    "adamw": Optimizer(_adam, adam=True, step_count_bytes=4, prunable=True, smaller="adam8bit"),
    "sgd": Optimizer(
        _sgd,
        decoupled_decay=False,
        uses_beta1=True,
        moments_need_beta1=True,
        prunable=True,
        not_accumulating="it keeps no moment unless --beta1 is given",
    ),
    "adafactor": Optimizer(
        _adafactor,
        uses_beta1=True,
        not_shardable="its second moments are means over whole rows and columns, of which a process has a part",
        not_accumulating="it clips its step by the size of the whole gradient",
        scratch_per_element=16,
        steps_whole=True,
    ),
    "adam8bit": Optimizer(_adam8bit, adam=True, smaller="adamw4bit", **_ADAM8BIT),
    "adamw4bit": Optimizer(_adamw4bit, adam=True, **_ADAMW4BIT),
    "stable_spam": Optimizer(
        _adam,
        uses_adam=True,
        step_count_bytes=4,
        conditions_all_gradients=True,
        not_shardable="it needs the norm and the largest entry of whole gradients, of which a process has a part",
        not_accumulating="it scales each gradient by the norm of the whole",
        reset_every=1000,
    ),
    "muon": _orthogonal(_muon, smaller="muon8bit"),
    "muon8bit": _orthogonal(_muon8bit, _adam8bit, smaller="muon4bit", matrix_shared_bytes=_CODE_BOOK_BYTES, **_ADAM8BIT),
    "muon4bit": _orthogonal(_muon4bit, _adamw4bit, **_ADAMW4BIT),
    "spectron": _orthogonal(_spectron(_muon), steps_pairs=True, smaller="spectron8bit"),
    "spectron8bit": _orthogonal(
        _spectron(_muon8bit),
        _adam8bit,
        steps_pairs=True,
        smaller="spectron4bit",
        matrix_shared_bytes=_CODE_BOOK_BYTES,
        **_ADAM8BIT,
    ),
    "spectron4bit": _orthogonal(_spectron(_muon4bit), _adamw4bit, steps_pairs=True, **_ADAMW4BIT),
}

# Published names of optimizers -> the flags they stand for. The suffix `_per_layer` of any name means --per_layer.
PUBLISHED_NAMES: dict[str, dict[str, str]] = {
    "galore_adamw": {"optimizer": "adamw", "peft_model": "galore"},
    "galore_adafactor": {"optimizer": "adafactor", "peft_model": "galore"},
    "galore_adamw8bit": {"optimizer": "adam8bit", "peft_model": "galore"},
    "galore_adamw8bit_per_layer": {"optimizer": "adam8bit_per_layer", "peft_model": "galore"},
}
