"""The block support: S is block-diagonal, so that its products are small dense ones and nothing is stored of its positions.

With k blocks, outputs and inputs are cut into k consecutive slices each, of sizes that differ by one at most, and slice b of the
outputs reads slice b of the inputs. Values lie block after block, each row-major: the order of the sorted positions.

Shapes: T rows of the input, I in_features, O out_features, N nonzeros of S; n blocks of a run, r rows and c columns of each.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .support import Support

# 1 / k must be this near to the share that was asked for, relative to it.
_TOLERANCE = 0.05


def block_count(sparsity: float) -> int:
    """k, the number of blocks for a share `sparsity` of all entries: round(1 / sparsity).

    Raises:
        ValueError: no 1 / k is within 5 % of the share.
    """
    blocks = max(1, round(1 / sparsity))
    if abs(1 / blocks - sparsity) > _TOLERANCE * sparsity:
        below, above = 1 / (int(1 / sparsity) + 1), 1 / max(1, int(1 / sparsity))
        raise ValueError(
            f"sparsity {sparsity}: k blocks have a share 1 / k of all entries, the nearest are {below:.4g} and {above:.4g}: "
            'choose one of these, or support "uniform"'
        )
    return blocks


@dataclass(frozen=True)
class Run:
    """Consecutive blocks of one shape: `count` of (rows, columns), the first at (row, column), its values from `value` on."""

    count: int
    rows: int
    columns: int
    row: int
    column: int
    value: int

    @property
    def num_values(self) -> int:
        """Of all its blocks."""
        return self.count * self.rows * self.columns


@functools.cache
def runs(out_features: int, in_features: int, blocks: int) -> tuple[Run, ...]:
    """All blocks, in at most three runs: the first out % k slices are one longer than the others, and so the first in % k."""
    found: list[Run] = []
    row = column = value = 0
    bounds = sorted({0, out_features % blocks, in_features % blocks, blocks})
    for first, end in itertools.pairwise(bounds):
        rows = out_features // blocks + (first < out_features % blocks)
        columns = in_features // blocks + (first < in_features % blocks)
        found.append(Run(end - first, rows, columns, row, column, value))
        row, column, value = row + (end - first) * rows, column + (end - first) * columns, value + found[-1].num_values
    return tuple(found)


class BlockSupport(Support):
    """k dense blocks on the diagonal: full rank, out * in / k positions to within rounding, nothing stored of them."""

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
        """None at all."""
        return 0

    def flat_indices(self) -> Tensor:
        """Sorted int64 positions (nnz,) in the row-major weight."""
        numbers = torch.arange(self.numel).view(self.out_features, self.in_features)
        return BlockPart(self.blocks, self.out_features, self.in_features).gather(numbers)

    def draw_(self, generator: torch.Generator) -> None:
        """Nothing is drawn."""


class BlockPart:
    """The arithmetic of S with a block support; see support.SparsePart. Batched products on views of all that is there."""

    def __init__(self, blocks: int, out_features: int, in_features: int) -> None:
        """blocks: k."""
        self.runs = runs(out_features, in_features, blocks)

    def _with_values(self, values: Tensor) -> Iterator[tuple[Run, Tensor]]:
        for run in self.runs:
            yield run, values[run.value :][: run.num_values].view(run.count, run.rows, run.columns)

    def add_to_(self, weight: Tensor, values: Tensor) -> None:
        """weight += S."""
        for run, values_nrc in self._with_values(values):
            _diagonal(weight, run).add_(values_nrc)

    def weight(self, scaled_B: Tensor, lora_A: Tensor, values: Tensor) -> None:
        """No quicker way."""

    def gather(self, grad_weight: Tensor) -> Tensor:
        """The blocks of a gradient of the weight, (O, I), one after another."""
        return torch.cat([_diagonal(grad_weight, run).reshape(-1) for run in self.runs])

    def add_output_(self, y_TO: Tensor, x_TI: Tensor, values: Tensor) -> None:
        """y += x S^T."""
        for run, values_nrc in self._with_values(values):
            _slices(y_TO, run.row, run.count, run.rows).baddbmm_(
                _slices(x_TI, run.column, run.count, run.columns), values_nrc.mT
            )

    def add_input_gradient_(self, grad_TI: Tensor, g_TO: Tensor, values: Tensor) -> None:
        """dx += G S."""
        for run, values_nrc in self._with_values(values):
            _slices(grad_TI, run.column, run.count, run.columns).baddbmm_(
                _slices(g_TO, run.row, run.count, run.rows), values_nrc
            )

    def value_gradient(self, g_TO: Tensor, x_TI: Tensor) -> Tensor:
        """The blocks of G^T x, one after another, and nothing else of it."""
        found = []
        for run in self.runs:
            g_nTr = _slices(g_TO, run.row, run.count, run.rows)
            x_nTc = _slices(x_TI, run.column, run.count, run.columns)
            if g_TO.device.type == "cpu":
                # Batched, a CPU first turns the whole of a factor that is transposed around: 2 to 8 times slower.
                found += [(g_Tr.t() @ x_Tc).view(-1) for g_Tr, x_Tc in zip(g_nTr, x_nTc, strict=True)]
            else:
                found.append((g_nTr.mT @ x_nTc).view(-1))
        return torch.cat(found)

    def spares_weight_gradient(self, g_TO: Tensor, x_TI: Tensor, rank: int) -> bool:
        """Then the factored path would have been taken."""
        return False


def _slices(tensor: Tensor, start: int, count: int, size: int) -> Tensor:
    """View (count, T, size) of `count` neighbouring slices of the columns of a (T, ...) tensor."""
    sliced: Tensor = tensor[:, start : start + count * size].unflatten(1, (count, size))
    return sliced.transpose(0, 1)


def _diagonal(weight: Tensor, run: Run) -> Tensor:
    """View (n, r, c) of a run's blocks in a contiguous (O, I) matrix."""
    stride = weight.shape[1]
    offset = weight.storage_offset() + run.row * stride + run.column
    strides = (run.rows * stride + run.columns, stride, 1)
    return weight.as_strided((run.count, run.rows, run.columns), strides, offset)
