"""The block support: S is block-diagonal up to a fixed reordering of the outputs; its products are small dense products, and its
positions need no storage.

With k blocks, inputs are cut into k consecutive slices, of sizes that differ by one at most, and output o reads slice o mod k.
Neighbouring outputs thus read different slices, and the outputs of an attention head together read all of them. Blocks of
consecutive outputs do not have this property and reach a higher loss (docs/results.md). Values are stored row by row.

Shapes: T rows of the input, I in_features, O out_features, N nonzeros of S; n blocks of a run, r rows and c columns of each.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .support import SparsePart, Support, scratch_matrix

# Largest relative difference between 1 / k and the requested share.
_TOLERANCE = 0.05


def block_count(sparsity: float) -> int:
    """Returns k, the number of blocks for a share `sparsity` of all entries: round(1 / sparsity).

    Raises:
        ValueError: no 1 / k is within 5 % of the share.
    """
    # Beyond any weight's number of blocks, so that tiny shares do not overflow.
    inverse = min(1 / sparsity, 1e18)
    blocks = max(1, round(inverse))
    if abs(1 / blocks - sparsity) > _TOLERANCE * sparsity:
        below, above = 1 / (int(inverse) + 1), 1 / max(1, int(inverse))
        raise ValueError(
            f"sparsity {sparsity}: k blocks hold a share 1 / k of all entries, the nearest are {below:.4g} and {above:.4g}: "
            'choose one of these, or support "uniform"'
        )
    return blocks


@dataclass(frozen=True)
class BlockRun:
    """A run of `count` neighbouring blocks of one shape (rows, columns), starting at block number `first`.

    column: number of columns of all blocks before the first one.
    """

    first: int
    count: int
    rows: int
    columns: int
    column: int

    @property
    def num_values(self) -> int:
        """Number of values of all blocks of the run."""
        return self.count * self.rows * self.columns


@functools.cache
def runs(out_features: int, in_features: int, blocks: int) -> tuple[BlockRun, ...]:
    """Returns all blocks in at most three runs.

    The first out % k blocks have one more row than the others, and the first in % k blocks one more column.
    """
    result: list[BlockRun] = []
    column = 0
    bounds = sorted({0, out_features % blocks, in_features % blocks, blocks})
    for first, end in itertools.pairwise(bounds):
        rows = out_features // blocks + (first < out_features % blocks)
        columns = in_features // blocks + (first < in_features % blocks)
        result.append(BlockRun(first, end - first, rows, columns, column))
        column += (end - first) * columns
    return tuple(result)


class BlockSupport(Support):
    """A support of k dense blocks: full rank, out * in / k positions up to rounding, none of them stored."""

    kind = "block"

    def __init__(self, out_features: int, in_features: int, blocks: int) -> None:
        """blocks: k, 1 .. min(out_features, in_features)."""
        if not 1 <= blocks <= min(out_features, in_features):
            raise ValueError(
                f"{blocks} blocks do not fit a {out_features} x {in_features} weight: "
                f"choose 1 .. {min(out_features, in_features)}"
            )
        nnz = sum(run.num_values for run in runs(out_features, in_features, blocks))
        super().__init__(out_features, in_features, nnz)
        self.blocks, self.code = blocks, None

    @property
    def nbytes(self) -> int:
        """Always 0: positions follow from the shape and k."""
        return 0

    def flat_indices(self) -> Tensor:
        """Sorted int64 positions (nnz,) in the row-major weight."""
        numbers = torch.arange(self.numel, device="cpu").view(self.out_features, self.in_features)
        return BlockPart(self.blocks, self.out_features, self.in_features).gather(numbers)

    def add_few_rows_(self, y_TO: Tensor, x_TI: Tensor, values: Tensor) -> None:
        """Adds x S^T to y."""
        BlockPart(self.blocks, self.out_features, self.in_features).add_few_rows_(y_TO, x_TI, values)

    def draw_(self, generator: torch.Generator) -> None:
        """Does nothing: the positions are fixed."""


class BlockPart(SparsePart):
    """The arithmetic of S with a block support: batched products of slices, which are views.

    A block's outputs are k columns apart, which no matrix product supports. Outputs are therefore computed block by block
    ("by_block") and reordered once; their gradients are reordered once before a backward pass. In by_block order each block has
    room for ceil(O / k) outputs; unused room is never read.
    """

    def __init__(self, blocks: int, out_features: int, in_features: int) -> None:
        """blocks: k."""
        self.blocks, self.out_features, self.in_features = blocks, out_features, in_features
        self.runs = runs(out_features, in_features, blocks)
        self._room = -(-out_features // blocks)

    def _in_values(self, values: Tensor, run: BlockRun) -> Tensor:
        """Returns a view (n, r, c) of the values; each k consecutive rows hold one value per column, I values together."""
        offset = values.storage_offset() + run.column
        return values.as_strided((run.count, run.rows, run.columns), (run.columns, self.in_features, 1), offset)

    def _in_weight(self, weight: Tensor, run: BlockRun) -> Tensor:
        """Returns a view (n, r, c) of the run's blocks in a contiguous (O, I) matrix."""
        offset = weight.storage_offset() + run.first * self.in_features + run.column
        strides = (self.in_features + run.columns, self.blocks * self.in_features, 1)
        return weight.as_strided((run.count, run.rows, run.columns), strides, offset)

    def _outputs(self, by_block: Tensor, run: BlockRun) -> Tensor:
        """Returns a view (n, T, r) of the run's outputs in a (T, k * room) matrix in by_block order."""
        return _slices(by_block, run.first * self._room, run.count, self._room)[..., : run.rows]

    def _pairs(self, ordered: Tensor, by_block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields pairs of views of the same columns: of (T, O) in the outputs' order, and of (T, k * room) in by_block order."""
        rounds, rest = divmod(self.out_features, self.blocks)
        blocks = by_block.unflatten(1, (self.blocks, self._room))
        yield ordered[:, : rounds * self.blocks].unflatten(1, (rounds, self.blocks)), blocks[..., :rounds].mT
        yield ordered[:, rounds * self.blocks :], blocks[:, :rest, self._room - 1]

    def _by_block(self, g_TO: Tensor) -> Tensor:
        """Reorders G's columns so that the outputs of each block are neighbours, (T, k * room)."""
        by_block = scratch_matrix(g_TO.shape[0], self.blocks * self._room, g_TO)
        for columns, reordered in self._pairs(g_TO, by_block):
            reordered.copy_(columns)
        return by_block

    def _rows_by_block(self, matrix: Tensor) -> Tensor:
        """Reorders the rows of (O, R) by block, (k * room, R); zeros where a block needs less room."""
        rounds, rest = divmod(self.out_features, self.blocks)
        by_block = matrix.new_zeros(self.blocks, self._room, matrix.shape[1])
        by_block[:, :rounds] = matrix[: rounds * self.blocks].unflatten(0, (rounds, self.blocks)).transpose(0, 1)
        by_block[:rest, self._room - 1] = matrix[rounds * self.blocks :]
        return by_block.flatten(0, 1)

    def add_to_(self, weight: Tensor, values: Tensor) -> None:
        """Adds S to the weight."""
        for run in self.runs:
            self._in_weight(weight, run).add_(self._in_values(values, run))

    def gather(self, grad_weight: Tensor) -> Tensor:
        """Returns the values' gradient (N,): the blocks' entries of the weight's gradient (O, I), in the order of the values."""
        gradient = grad_weight.new_empty(sum(run.num_values for run in self.runs))
        for run in self.runs:
            self._in_values(gradient, run).copy_(self._in_weight(grad_weight, run))
        return gradient

    def output(self, h_TR: Tensor, scaled_B: Tensor, bias: Tensor | None, x_TI: Tensor, values: Tensor) -> Tensor:
        """Returns h scaled_B^T + bias + x S^T, (T, O)."""
        rows = self._rows_by_block(scaled_B)
        by_block = torch.mm(h_TR, rows.t(), out=scratch_matrix(h_TR.shape[0], rows.shape[0], h_TR))
        for run in self.runs:
            _add_products_(self._outputs(by_block, run), _inputs(x_TI, run), self._in_values(values, run).mT)
        y_TO = h_TR.new_empty(h_TR.shape[0], self.out_features)
        for columns, reordered in self._pairs(y_TO, by_block):
            columns.copy_(reordered)
        return y_TO if bias is None else y_TO.add_(bias)

    def add_few_rows_(self, y_TO: Tensor, x_TI: Tensor, values: Tensor) -> None:
        """Adds x S^T to y, directly in the strided columns of each block's outputs."""
        for run in self.runs:
            shape, strides = (run.count, y_TO.shape[0], run.rows), (1, self.out_features, self.blocks)
            outputs = y_TO.as_strided(shape, strides, y_TO.storage_offset() + run.first)
            blocks = self._in_values(values, run)
            # A CPU multiplies by strided blocks up to four times slower than it copies them.
            if blocks.device.type == "cpu":
                blocks = blocks.contiguous()
            outputs += _inputs(x_TI, run) @ blocks.mT

    def gradients_(
        self, g_TO: Tensor, x_TI: Tensor, values: Tensor | None, grad_TI: Tensor | None, need_values: bool
    ) -> Tensor | None:
        """Adds G S to grad_TI, and returns the blocks' entries of G^T x, (N,), without computing the other entries."""
        by_block = self._by_block(g_TO)
        if grad_TI is not None and values is not None:
            for run in self.runs:
                _add_products_(_inputs(grad_TI, run), self._outputs(by_block, run), self._in_values(values, run))
        if not need_values:
            return None
        gradient = g_TO.new_empty(sum(run.num_values for run in self.runs))
        for run in self.runs:
            g_nTr, x_nTc = self._outputs(by_block, run), _inputs(x_TI, run)
            _add_products_(self._in_values(gradient, run), g_nTr.mT, x_nTc, beta=0)
        return gradient


def _add_products_(result: Tensor, left: Tensor, right: Tensor, beta: float = 1) -> None:
    """Sets result to beta * result + left @ right, for n matrices each; beta = 0 allows an uninitialised result."""
    if result.device.type != "cpu":
        result.baddbmm_(left, right, beta=beta)
        return
    # The CPU's batched product copies operands that are views, which makes it up to 8 times slower.
    for block in range(result.shape[0]):
        result[block].addmm_(left[block], right[block], beta=beta)


def _inputs(tensor_TI: Tensor, run: BlockRun) -> Tensor:
    """Returns a view (n, T, c) of the slices of the inputs that the run's blocks read."""
    return _slices(tensor_TI, run.column, run.count, run.columns)


def _slices(tensor: Tensor, start: int, count: int, size: int) -> Tensor:
    """Returns a view (count, T, size) of `count` neighbouring slices of the columns of a (T, ...) tensor."""
    sliced: Tensor = tensor[:, start : start + count * size].unflatten(1, (count, size))
    return sliced.transpose(0, 1)
