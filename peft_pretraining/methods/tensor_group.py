"""Groups of parameters of one shape, as counts and the memory account have them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorGroup:
    """`count` parameters of one shape.

    kind: "dense" | "low_rank" | "sparse". trained: False for the frozen weights of ReLoRA. projected: a matrix whose moments
    GaLore keeps in a subspace. support_entries: for a "sparse" group whose positions are stored, entries of the matrix that its
    values are spread over.
    embedding: embedding or output head, whose moments may have a size of their own.
    """

    kind: str
    shape: tuple[int, ...]
    count: int
    trained: bool = True
    projected: bool = False
    support_entries: int = 0
    embedding: bool = False

    @property
    def elements(self) -> int:
        """Elements of all `count` tensors."""
        return math.prod(self.shape) * self.count
