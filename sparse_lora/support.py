"""What every kind of support is: which entries of a weight its sparse part S has, and the arithmetic of S.

Shapes: T rows of the input, I in_features, O out_features, N nonzeros of S.
"""

import hashlib
import operator
from abc import ABC, abstractmethod
from typing import Protocol

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
    blocks = 0  # how many S consists of, 0 where it has no such structure
    code: Tensor | None  # what is stored of the positions, if anything

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
        """Draws the positions from a CPU generator, where the kind has anything to draw."""

    def extra_repr(self) -> str:
        return f"{self.kind}, nnz={self.nnz}, numel={self.numel}, nbytes={self.nbytes}"


class SparsePart(Protocol):
    """The arithmetic of S, given its values (N,), all tensors of one dtype. What ends in _ works in place.

    Made from what autograd saved, not from a Support: a backward pass under torch.compile has tensors and numbers only.
    """

    def add_to_(self, weight: Tensor, values: Tensor) -> None:
        """weight (O, I) += S."""

    def weight(self, scaled_B: Tensor, lora_A: Tensor, values: Tensor) -> Tensor | None:
        """W = scaled_B A + S, (O, I), where there is a quicker way than a product and add_to_."""

    def gather(self, grad_weight: Tensor) -> Tensor:
        """The values' gradient (N,) out of the weight's (O, I)."""

    def output(self, h_TR: Tensor, scaled_B: Tensor, bias: Tensor | None, x_TI: Tensor, values: Tensor) -> Tensor:
        """y = h scaled_B^T + bias + x S^T, (T, O)."""

    def arranged(self, g_TO: Tensor) -> Tensor:
        """G with its columns in the order in which the next two take it; the same tensor where that is no other."""

    def add_input_gradient_(self, grad_TI: Tensor, arranged_TO: Tensor, values: Tensor) -> None:
        """dx += G S."""

    def value_gradient(self, arranged_TO: Tensor, x_TI: Tensor) -> Tensor:
        """The values' gradient (N,), without the weight's where that is possible."""

    def spares_weight_gradient(self, g_TO: Tensor, x_TI: Tensor, rank: int) -> bool:
        """Whether value_gradient, with the factors' gradients from thin products, takes less time than building G^T x for all."""
