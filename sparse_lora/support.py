"""What every kind of support is: which entries of a weight its sparse part S has, the arithmetic of S, and memory for it.

Shapes: T rows of the input, I in_features, O out_features, N nonzeros of S.
"""

import hashlib
import math
import operator
import threading
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


def generator_for(seed: int, name: str) -> torch.Generator:
    """CPU generator for the tensor `name` of the run `seed`: the same numbers on any machine and in any order of calls.

    Every initial value of a model is drawn from the generator of its own qualified name, so that it depends neither on
    the device, nor on the number of processes, nor on which other tensors exist or were drawn before.

    Args:
        seed: any integer.
        name: qualified name of the tensor, such as "model.layers.0.self_attn.q_proj.lora_A".
    """
    key = f"{operator.index(seed)}\0{name}".encode()
    # torch's CPU generator uses the low 32 bits of its seed only. Two of n tensors get the same stream with
    # probability n^2 / 2^33: about 1e-4 for the 1,000 tensors of a 7B model, and harmless when it happens.
    digest = hashlib.blake2b(key, digest_size=4).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))


class Support(nn.Module, ABC):
    """Positions of S in a row-major (out_features, in_features) weight; values are kept in the order of the sorted positions.

    A new Support may hold no valid positions yet, nor one after `to_empty`: call `draw_`.

    Args:
        out_features, in_features: shape of the weight.
        nnz: number of positions, 0 .. out_features * in_features.
    """

    kind: str
    ready_for_few_rows = True  # whether add_few_rows_ may be called
    blocks = 0  # number of blocks, 0 for a support without blocks
    code: Tensor | None  # the stored form of the positions, if any is stored

    def __init__(self, out_features: int, in_features: int, nnz: int) -> None:
        super().__init__()
        self.out_features, self.in_features, self.nnz = out_features, in_features, nnz
        if not 0 <= nnz <= self.numel:
            raise ValueError(f"nnz = {nnz} does not fit a {out_features} x {in_features} weight: choose 0 .. {self.numel}")

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return self.out_features * self.in_features

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the stored positions take."""

    @abstractmethod
    def flat_indices(self) -> Tensor:
        """Sorted int64 positions (nnz,) in the row-major weight."""

    @abstractmethod
    def add_few_rows_(self, y_TO: Tensor, x_TI: Tensor, values: Tensor) -> None:
        """y += x S^T, contiguous y, without gradients, by reading the values once: for few rows."""

    @abstractmethod
    def draw_(self, generator: torch.Generator) -> None:
        """Draws the positions from a CPU generator; a kind with fixed positions ignores the generator."""

    def extra_repr(self) -> str:
        return f"{self.kind}, nnz={self.nnz}, numel={self.numel}, nbytes={self.nbytes}"


class SparsePart(ABC):
    """The arithmetic of S, given its values (N,), all tensors of one dtype. Methods whose names end in _ work in place.

    Made from what autograd saved, not from a Support: a backward pass under torch.compile has tensors and numbers only.
    """

    @abstractmethod
    def add_to_(self, weight: Tensor, values: Tensor) -> None:
        """weight (O, I) += S."""

    @abstractmethod
    def gather(self, grad_weight: Tensor) -> Tensor:
        """The values' gradient (N,): the entries of the weight's gradient (O, I) at S's positions."""

    @abstractmethod
    def output(self, h_TR: Tensor, scaled_B: Tensor, bias: Tensor | None, x_TI: Tensor, values: Tensor) -> Tensor:
        """y = h scaled_B^T + bias + x S^T, (T, O)."""

    @abstractmethod
    def gradients_(
        self, g_TO: Tensor, x_TI: Tensor, values: Tensor | None, grad_TI: Tensor | None, need_values: bool
    ) -> Tensor | None:
        """Adds G S to grad_TI, the input's gradient, unless it is None, and returns the values' gradient (N,) if it is needed."""

    def weight(self, scaled_B: Tensor, lora_A: Tensor, values: Tensor, base: Tensor | None, passing: bool) -> Tensor:
        """W = scaled_B A + base + S, (O, I); passing: in scratch memory, valid until the next such product."""
        weight = low_rank_weight(scaled_B, lora_A, base, passing)
        self.add_to_(weight, values)
        return weight

    def avoids_weight_gradient(self, num_rows: int, rank: int, like: Tensor) -> bool:
        """Whether `gradients_`, with thin products for the factors, takes less time than building all of G^T x (O, I).

        False unless a kind of support has a kernel for it. like: a tensor of the products' dtype and device.
        """
        return False


def low_rank_weight(scaled_B: Tensor, lora_A: Tensor, base: Tensor | None, passing: bool) -> Tensor:
    """scaled_B A (+ base), (O, I); passing: in scratch memory, valid until the next such product."""
    weight = passing_product(scaled_B, lora_A) if passing else scaled_B @ lora_A
    if base is not None:
        weight += base
    return weight


# --- Scratch memory for one matrix at a time ---
#
# A CPU's allocator returns large blocks to the system: fetching 90 MB anew took as long as a tenth of the product it was for
# (4096 x 11008, 2,048 rows). A GPU's allocator keeps what is freed, and a C library keeps blocks below LARGE_BYTES.

# From this size on the trainer's allocator gives blocks back (peft_pretraining/distributed/device.py); glibc by itself does from
# 128 KiB to 32 MiB on, depending on what was freed before.
LARGE_BYTES = 4 * 2**20


class _Kept(threading.local):
    """A thread's own memory: a backward pass may run in another thread than the forward pass of the next model."""

    memory: Tensor | None = None


_kept = _Kept()


def scratch_matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns), undefined, of the dtype and on the device of `like`; reuses the memory of the last one if that pays off.

    Valid until the next call in the same thread, so use it for a single product. While autograd records, new memory is
    returned, which may be saved.
    """
    num_bytes = rows * columns * like.element_size()
    if like.device.type != "cpu" or num_bytes < LARGE_BYTES or torch.is_grad_enabled():
        return like.new_empty(rows, columns)
    if _kept.memory is None or _kept.memory.numel() < num_bytes:
        _kept.memory = None  # the smaller one goes first
        _kept.memory = torch.empty(num_bytes, dtype=torch.uint8)
    return _kept.memory[:num_bytes].view(like.dtype).view(rows, columns)


def passing_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in scratch memory: valid until the next scratch matrix."""
    if torch.is_grad_enabled():
        return left @ right
    return torch.mm(left, right, out=scratch_matrix(left.shape[0], right.shape[1], left))


def large_bytes(shape: tuple[int, int], width: int) -> int:
    """Bytes that stay in use after a scratch matrix of this shape, `width` bytes per entry, on a CPU."""
    num_bytes = math.prod(shape) * width
    return num_bytes if num_bytes >= LARGE_BYTES else 0
