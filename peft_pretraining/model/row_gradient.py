"""Gradients of the embedding and the output head that are computed some rows at a time.

An optimizer that steps slices needs no tensor of the whole gradient's size: `PerLayerUpdate` gives such a parameter a function
`take_rows`, which the backward pass calls with the gradient.

Shape letters: V rows (the vocabulary), D columns, K different token ids of a micro-batch.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a slice from which a whole gradient is assembled.
_ASSEMBLED_ELEMENTS = 2**21


class RowGradient:
    """The gradient of a matrix (V, D), computed for some of its rows at a time; the base class.

    shape: (V, D). dtype: the matrix's dtype. norm_bound: the gradient's L2 norm is at most this float32 scalar, not finite if the
    gradient may not be.
    """

    def __init__(self, matrix: Tensor, norm_bound: Tensor):
        self.shape, self.dtype, self.device, self.norm_bound = matrix.shape, matrix.dtype, matrix.device, norm_bound
        # Number and gradient of the row that the last part's end cut, if it cut one.
        self._cut: tuple[int, Tensor] | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns rows start to stop of the gradient, (stop - start, D), in the matrix's dtype."""
        raise NotImplementedError

    def elements(self, part: slice) -> Tensor:
        """Returns a part of the flattened gradient; parts are asked for in order.

        Rows that a part cuts are computed whole. The row that its end cuts is kept for the next part: the first half of that row
        of the matrix may be stepped before, and a gradient computed from such a row would be wrong.
        """
        columns = self.shape[1]
        first, stop = part.start // columns, -(-part.stop // columns)
        rows = self.rows(first, stop)
        if self._cut is not None and self._cut[0] == first and part.start % columns:
            rows[0] = self._cut[1]
        self._cut = (stop - 1, rows[-1].clone()) if part.stop % columns else None
        return rows.view(-1)[part.start - first * columns : part.stop - first * columns]

    def whole(self) -> Tensor:
        """Returns the gradient as one tensor."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        step = max(1, _ASSEMBLED_ELEMENTS // self.shape[1])
        for start in range(0, len(out), step):
            stop = min(start + step, len(out))
            out[start:stop] = self.rows(start, stop)
        return out


# Called with a parameter's gradient; returns whether it used it, otherwise autograd needs the whole gradient.
TakeRows = Callable[[RowGradient], bool]


def deliver(gradient: RowGradient, take_rows: TakeRows | None) -> Tensor | None:
    """Gives the gradient to `take_rows`; if that is None or refuses, returns the whole gradient for autograd."""
    return None if take_rows is not None and take_rows(gradient) else gradient.whole()


class EmbeddingGradient(RowGradient):
    """The gradient of an embedding: the rows of the K token ids that occurred; all other rows are zero."""

    def __init__(self, table: Tensor, ids: Tensor, grad_output: Tensor):
        """table: (V, D). ids: token ids, any shape. grad_output: gradient of the embedded tokens, (*ids.shape, D)."""
        occurred, number = torch.unique(ids, return_inverse=True)
        # The library's own backward pass, so that repeated ids are summed in the same order as without this class.
        self._values = torch.ops.aten.embedding_dense_backward(grad_output, number, len(occurred), -1, False)
        self._occurred, self._ids = occurred, occurred.tolist()
        super().__init__(table, torch.linalg.vector_norm(self._values, dtype=torch.promote_types(table.dtype, torch.float32)))

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns rows start to stop of the gradient, (stop - start, D), in the table's dtype."""
        out = torch.zeros((stop - start, self.shape[1]), dtype=self.dtype, device=self.device)
        first, last = bisect_left(self._ids, start), bisect_left(self._ids, stop)
        out[self._occurred[first:last] - start] = self._values[first:last]
        return out


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.take_rows = getattr(table, "take_rows", None)
        ctx.save_for_backward(table, ids)
        return F.embedding(ids, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        table, ids = ctx.saved_tensors
        return deliver(EmbeddingGradient(table, ids, grad_output), ctx.take_rows), None


def embed(table: Tensor, ids: Tensor) -> Tensor:
    """Returns the rows of `table` (V, D) for token ids, as F.embedding; `take_rows` gets the gradient as a RowGradient."""
    embedded: Tensor = _Embedding.apply(table, ids)
    return embedded
