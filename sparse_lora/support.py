"""Support and SparsePart, the bases of every kind of support: positions of the sparse part S, its arithmetic, scratch memory.

Shapes: T rows of the input, I in_features, O out_features, N nonzeros of S.
"""

import hashlib
import math
import operator
import threading
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

# Support for fine-tuning only, in addition to the drawn kinds: the largest-magnitude entries of the pretrained weight.
LARGEST = "largest"


def generator_for(seed: int, name: str) -> torch.Generator:
    """Returns the CPU generator for one tensor of a run; it gives the same numbers on any machine and in any order of calls.

    Every tensor of a model is drawn by the generator of its own qualified name, so that its values do not depend on the device,
    the number of processes, or which other tensors exist.

    Args:
        seed: any integer.
        name: qualified name of the tensor, such as "model.layers.0.self_attn.q_proj.lora_A".
    """
    key = f"{operator.index(seed)}\0{name}".encode()
    # torch's CPU generator uses only the low 32 bits of its seed. Two of n tensors share a stream with probability n^2 / 2^33:
    # about 1e-4 for the 1,000 tensors of a 7B model, and harmless.
    digest = hashlib.blake2b(key, digest_size=4).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))


class Support(nn.Module, ABC):
    """Positions of S in a row-major (out_features, in_features) weight; values are kept in the order of the sorted positions.

    The positions may be undefined in a new Support and after `to_empty`, until `draw_` is called.

    Args:
        out_features, in_features: shape of the weight.
        nnz: number of positions, 0 .. out_features * in_features.
    """

    kind: str
    ready_for_few_rows = True  # True if add_few_rows_ may be called
    blocks = 0  # number of blocks, 0 for a support without blocks
    code: Tensor | None  # the stored form of the positions, if any is stored

    def __init__(self, out_features: int, in_features: int, nnz: int) -> None:
        super().__init__()
        self.out_features, self.in_features, self.nnz = out_features, in_features, nnz
        if not 0 <= nnz <= self.numel:
            raise ValueError(f"nnz = {nnz} does not fit a {out_features} x {in_features} weight: choose 0 .. {self.numel}")

    @property
    def numel(self) -> int:
        """Number of entries of the weight."""
        return self.out_features * self.in_features

    @property
    def stored(self) -> Tensor | None:
        """What `functional.sparse_part` reads the positions from; None if they are not stored."""
        return self.code

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the stored positions take."""

    @abstractmethod
    def flat_indices(self) -> Tensor:
        """Sorted int64 positions (nnz,) in the row-major weight."""

    @abstractmethod
    def add_few_rows_(self, y_TO: Tensor, x_TI: Tensor, values: Tensor) -> None:
        """Adds x S^T to y, contiguous, without gradients; reads the values once, which is fastest for few rows."""

    def keep_rows(self) -> None:
        """Makes what `add_few_rows_` needs; nothing for a kind that is always ready."""

    def cache_positions(self) -> None:
        """Keeps decoded positions so that no pass decodes them again; nothing for a kind that stores none."""

    @abstractmethod
    def draw_(self, generator: torch.Generator) -> None:
        """Draws the positions from a CPU generator; a kind with fixed positions ignores the generator."""

    def extra_repr(self) -> str:
        return f"{self.kind}, nnz={self.nnz}, numel={self.numel}, nbytes={self.nbytes}"


class SparsePart(ABC):
    """The arithmetic of S, given its values (N,); all tensors have one dtype. Methods whose names end in _ work in place.

    It is made from saved tensors and numbers, not from a Support, because a backward pass under torch.compile has nothing else.
    """

    @abstractmethod
    def add_to_(self, weight: Tensor, values: Tensor) -> None:
        """Adds S to weight (O, I)."""

    @abstractmethod
    def gather(self, grad_weight: Tensor) -> Tensor:
        """Returns the values' gradient (N,), which is the weight's gradient (O, I) at S's positions."""

    @abstractmethod
    def output(self, h_TR: Tensor, scaled_B: Tensor, bias: Tensor | None, x_TI: Tensor, values: Tensor) -> Tensor:
        """Returns y = h scaled_B^T + bias + x S^T, (T, O)."""

    @abstractmethod
    def gradients_(
        self, g_TO: Tensor, x_TI: Tensor, values: Tensor | None, grad_TI: Tensor | None, need_values: bool
    ) -> Tensor | None:
        """Adds G S to the input's gradient grad_TI, unless that is None, and returns the values' gradient (N,) if needed."""

    def weight(self, scaled_B: Tensor, lora_A: Tensor, values: Tensor, base: Tensor | None, scratch: bool) -> Tensor:
        """Returns W = scaled_B A + base + S, (O, I); with `scratch` in scratch memory, valid until the next scratch matrix."""
        weight = low_rank_weight(scaled_B, lora_A, base, scratch)
        self.add_to_(weight, values)
        return weight

    def avoids_weight_gradient(self, num_rows: int, rank: int, like: Tensor) -> bool:
        """Tells whether `gradients_`, with thin products for the factors, is faster than building all of G^T x (O, I).

        False for kinds of support without a kernel for it. like: a tensor of the products' dtype and device.
        """
        return False


def low_rank_weight(scaled_B: Tensor, lora_A: Tensor, base: Tensor | None, scratch: bool) -> Tensor:
    """Returns scaled_B A (+ base), (O, I); with `scratch` in scratch memory, valid until the next scratch matrix."""
    weight = scratch_product(scaled_B, lora_A) if scratch else scaled_B @ lora_A
    if base is not None:
        weight += base
    return weight


def plain(tensor: Tensor) -> Tensor:
    """Returns the values of a tensor whose class stores them in another form (it has `dequantised`); any other tensor as it is.

    The layer calls it where its arithmetic starts, and keeps the stored tensor for backward.
    """
    dequantised = getattr(tensor, "dequantised", None)
    return tensor if dequantised is None else dequantised()


# --- Scratch memory for one matrix at a time ---
#
# A CPU's allocator returns large blocks to the system. Allocating 90 MB again took a tenth of the time of the product that
# needed it (4096 x 11008, 2,048 rows). A GPU's allocator keeps freed memory, and a C library keeps blocks below LARGE_BYTES.

# The trainer's allocator returns blocks of at least this size (peft_pretraining/distributed/device.py). glibc's own threshold
# varies between 128 KiB and 32 MiB, depending on what was freed before.
LARGE_BYTES = 4 * 2**20


class _Kept(threading.local):
    """A thread's scratch memory; separate, because a backward pass may run in another thread than the next forward pass."""

    memory: Tensor | None = None


_kept = _Kept()


def scratch_matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    """Returns an undefined (rows, columns) matrix with the dtype and device of `like`; large ones on a CPU reuse memory.

    It is valid until the next call in the same thread, so use it for a single product. While autograd records, new memory is
    returned, because autograd may save it.
    """
    num_bytes = rows * columns * like.element_size()
    if like.device.type != "cpu" or num_bytes < LARGE_BYTES or torch.is_grad_enabled():
        return like.new_empty(rows, columns)
    if _kept.memory is None or _kept.memory.numel() < num_bytes:
        # Frees the smaller block before allocating.
        _kept.memory = None
        _kept.memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    return _kept.memory[:num_bytes].view(like.dtype).view(rows, columns)


def scratch_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right in scratch memory, valid until the next scratch matrix."""
    if torch.is_grad_enabled():
        return left @ right
    return torch.mm(left, right, out=scratch_matrix(left.shape[0], right.shape[1], left))


def large_bytes(shape: tuple[int, int], width: int) -> int:
    """Returns the bytes that a scratch matrix of this shape, `width` bytes per entry, keeps in use on a CPU."""
    num_bytes = math.prod(shape) * width
    return num_bytes if num_bytes >= LARGE_BYTES else 0
