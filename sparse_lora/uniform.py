"""The uniform support: entries drawn at random over the whole matrix, and the format in which their positions are stored.

Sorted positions are stored as the gaps between them, one byte each: with a share delta of all entries the mean gap is
1 / delta, and a gap of 256 or more has the probability exp(-256 delta), 2e-6 at delta .05 and 8 % at .01. Of those escaped gaps
the lower byte is stored in the gap's place like any other; the upper byte and the place go to a list of their own, whose sorted
places are stored in the same way. Where fewer positions make gaps long, two bytes each, or the plain positions, take less.

The sizes follow from the shape alone, so that a tensor can be allocated, loaded and accounted for before anything is drawn: the
list of escaped gaps has room for 12 standard deviations above what a uniform draw is expected to need.

Shapes: T rows of the input, I in_features, O out_features, N nonzeros of S.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .support import SparsePart, Support, passing_product, scratch_matrix

# Up to this many positions a permutation of all of them is drawn: no scratch worth saving, and it ends the recursion
# of `sample_positions`.
_PERMUTE_UP_TO = 4096
_SPARE_DEVIATIONS = 12
# Gaps beyond the upper byte's reach must be rarer than this, all together, or the width is not taken.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Layout:
    """Storage of up to `count` sorted numbers below `limit`.

    width: bytes per number; 1 and 2 are gaps (`escaped` is then set), 4 and 8 plain numbers.
    escaped: the layout of the places of the gaps that do not fit in `width` bytes.
    """

    count: int
    limit: int
    width: int
    escaped: Layout | None = None

    @property
    def upper_bytes_at(self) -> int:
        """Offset of the escaped gaps' upper bytes; parts begin at multiples of 8, so that they can be viewed as integers."""
        return _aligned(self.count * self.width)

    @property
    def places_at(self) -> int:
        """Offset of the escaped gaps' places."""
        return self.upper_bytes_at + _aligned(0 if self.escaped is None else self.escaped.count)

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.count * self.width if self.escaped is None else self.places_at + self.escaped.nbytes


def plain_layout(count: int, limit: int) -> Layout:
    """`count` plain numbers below `limit`, however they lie."""
    return Layout(count, limit, 4 if limit <= 2**31 else 8)


@functools.cache
def layout_for(nnz: int, numel: int) -> Layout:
    """The smallest layout for `nnz` uniformly drawn positions below `numel`."""
    return _smallest(nnz, nnz, nnz, numel)


def _smallest(count: int, expected: float, fewest: float, limit: int) -> Layout:
    """Smallest layout with room for `count` numbers below `limit`; `expected` and at least `fewest` will be there."""
    candidates = [plain_layout(count, limit)]
    for width in (1, 2):
        reach = 256**width
        if expected * _share_of_gaps(reach * 256, fewest, limit) > _NEGLIGIBLE:
            continue
        escaped = expected * _share_of_gaps(reach, fewest, limit)
        room = math.ceil(escaped + _SPARE_DEVIATIONS * (math.sqrt(escaped) + 1))
        room = min(room, limit // reach, count)
        if room < count:
            below = max(0.0, escaped - _SPARE_DEVIATIONS * math.sqrt(escaped))
            candidates.append(Layout(count, limit, width, _smallest(room, escaped, below, count)))
    return min(candidates, key=lambda layout: layout.nbytes)


def _share_of_gaps(length: int, count: float, limit: int) -> float:
    """Probability that a gap between `count` uniform numbers below `limit` is at least `length`."""
    return 0.0 if length >= limit else math.exp(count * math.log1p(-length / limit))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


# --- Drawing and coding positions ---


def sample_positions(nnz: int, numel: int, generator: torch.Generator) -> Tensor:
    """A uniformly drawn set of `nnz` of the positions 0 .. numel - 1, without replacement, sorted.

    The distinct values among independent uniform draws are, given their number, a uniformly random set of that number;
    so is what remains of such a set when a uniformly random part of it is dropped. Scratch is proportional to nnz,
    not to numel, as long as nnz <= numel / 2.

    Returns:
        int64 tensor (nnz,) on the CPU, strictly increasing.
    """
    if not 0 <= nnz <= numel:
        raise ValueError(f"cannot choose {nnz} of {numel} positions: nnz must lie in 0 .. {numel}")
    if numel <= _PERMUTE_UP_TO:
        return torch.randperm(numel, generator=generator, device="cpu")[:nnz].msort()
    if 2 * nnz > numel:
        return _kept(sample_positions(numel - nnz, numel, generator), numel).nonzero().squeeze(1)
    # n ln(n / (n - k)) draws give k distinct values on average, with a standard deviation below sqrt(k).
    num_draws = math.ceil(-numel * math.log1p(-nnz / numel) + 4 * math.sqrt(nnz))
    positions: Tensor = _draw(num_draws, numel, generator).unique()
    while positions.numel() < nnz:
        more = _draw(nnz - positions.numel() + 16, numel, generator)
        positions = torch.cat((positions, more)).unique()
    surplus = positions.numel() - nnz
    return positions[_kept(sample_positions(surplus, positions.numel(), generator), positions.numel())]


def _draw(count: int, numel: int, generator: torch.Generator) -> Tensor:
    # Not randint: it reduces a 32-bit number modulo numel, which favours the first rows of a 4096 x 11008 matrix by
    # 1 %. From 63 bits the remainder's bias is numel / 2^63.
    draws = torch.empty(count, dtype=torch.int64, device="cpu").random_(generator=generator)
    return draws.remainder_(numel)


def _kept(dropped: Tensor, numel: int) -> Tensor:
    """Boolean mask of the `numel` positions without the dropped ones."""
    mask = torch.ones(numel, dtype=torch.bool, device="cpu")
    mask[dropped] = False
    return mask


def encode(positions: Tensor, layout: Layout) -> Tensor | None:
    """Sorted int64 positions on the CPU -> the uint8 tensor (layout.nbytes,) that `decode` reads; None if they do not fit.

    Fewer than layout.count positions are filled up by repeating the last one.
    """
    last = positions[-1:] if positions.numel() else positions.new_zeros(1)
    positions = torch.cat((positions, last.expand(layout.count - positions.numel())))
    code = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cpu")
    if layout.escaped is None:
        _numbers(code, layout).copy_(positions)
        return code
    gaps = positions.diff(prepend=positions.new_zeros(1))
    upper = gaps >> (8 * layout.width)
    places = upper.nonzero().squeeze(1)
    if places.numel() > layout.escaped.count or (upper > 255).any():
        return None
    coded_places = encode(places, layout.escaped)
    if coded_places is None:
        return None
    # The lowest bytes of a little-endian integer; its sign, for two bytes, is the decoder's business.
    _numbers(code, layout).copy_(gaps - (upper << (8 * layout.width)))
    code[layout.upper_bytes_at :][: places.numel()].copy_(upper[places])
    code[layout.places_at :].copy_(coded_places)
    return code


def decode(code: Tensor, nnz: int, numel: int) -> Tensor:
    """The sorted row-major positions that a UniformSupport's stored tensor stands for: (nnz,), int32 or int64, no lasting copy.

    A function of the tensor and of sizes alone, so that the autograd function can save the stored form and decode it in
    backward.
    """
    layout = layout_for(nnz, numel)
    if code.numel() != layout.nbytes:  # positions that were chosen, not drawn, and whose gaps do not fit it
        layout = plain_layout(nnz, numel)
    return _decode(code, layout, torch.int32 if numel <= 2**31 else torch.int64)


def _decode(code: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    numbers = _numbers(code, layout)
    if layout.escaped is None:
        return numbers
    gaps = numbers.to(dtype)
    if layout.width == 2:
        gaps &= 0xFFFF
    if layout.escaped.count:
        upper = code[layout.upper_bytes_at :][: layout.escaped.count].to(dtype)
        # Places that fill up the list are repeated and have 0 as their upper byte.
        gaps.index_add_(0, _decode(code[layout.places_at :], layout.escaped, dtype), upper << (8 * layout.width))
    return gaps.cumsum_(0)


def _numbers(code: Tensor, layout: Layout) -> Tensor:
    """View of the first part of a layout: (count,), integers of its width."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return code[: layout.count * layout.width].view(kinds[layout.width])


class UniformSupport(Support):
    """Any number of positions, drawn without replacement over the whole matrix (arXiv 2406.02214, section 3.2).

    Stored in about one byte per position for 1 % of the entries and more (`layout`), in a buffer that checkpoints contain. A new
    support holds no valid positions yet, nor does one after `to_empty`: call `draw_`.
    """

    kind = "uniform"
    code: Tensor
    columns: Tensor | None  # of the positions, row after row: (nnz,), int16 where in_features allows, else int32
    starts: Tensor | None  # where each row begins among them: (out,), int32

    def __init__(self, out_features: int, in_features: int, nnz: int, device: torch.device | str | None = None) -> None:
        """device: of the buffer; "meta" allocates nothing."""
        super().__init__(out_features, in_features, nnz)
        # Bytes, not wider integers: gloo does not broadcast int16, and every part is a view of them.
        self.register_buffer("code", torch.empty(self.layout.nbytes, dtype=torch.uint8, device=device))
        self.register_buffer("columns", None, persistent=False)
        self.register_buffer("starts", None, persistent=False)

    @property
    def layout(self) -> Layout:
        """How the positions are stored."""
        return layout_for(self.nnz, self.numel)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored positions take."""
        return self.code.numel()

    def flat_indices(self) -> Tensor:
        """Sorted int64 positions (nnz,) in the row-major weight."""
        return UniformPart(self.code, self.nnz, self.out_features, self.in_features).positions().to(torch.int64)

    @property
    def ready_for_few_rows(self) -> bool:  # type: ignore[override]
        """After keep_rows."""
        return self.columns is not None

    @torch.no_grad()
    def keep_rows(self) -> None:
        """Make `columns` and `starts` for add_few_rows_; they are those of the positions as they are now."""
        positions = self.flat_indices()
        narrow = self.in_features <= torch.iinfo(torch.int16).max + 1
        self.columns = (positions % self.in_features).to(torch.int16 if narrow else torch.int32)
        beginnings = torch.arange(self.out_features, device=positions.device) * self.in_features
        self.starts = torch.searchsorted(positions, beginnings).to(torch.int32)

    def add_few_rows_(self, y_TO: Tensor, x_TI: Tensor, values: Tensor) -> None:
        """y += x S^T: each output is a weighted sum of inputs, as bags of an embedding are."""
        if self.columns is None or self.starts is None:
            raise RuntimeError("the support has no table of its rows: call keep_rows, or sparse_lora.prepare_for_inference")
        num_rows = x_TI.shape[0]
        # With fewer than four columns torch takes another way, five times slower.
        inputs_IT = F.pad(x_TI, (0, 0, 0, max(0, 4 - num_rows))).t().contiguous()
        columns = self.columns.to(torch.int32)  # what embedding_bag takes; kept narrow, a table takes half the memory
        sums_OT = F.embedding_bag(columns, inputs_IT, self.starts, mode="sum", per_sample_weights=values)
        y_TO += sums_OT[:, :num_rows].t()

    @torch.no_grad()
    def draw_(self, generator: torch.Generator) -> None:
        """Draws the positions uniformly without replacement from a CPU generator, into the existing storage."""
        code = None
        # A draw that does not fit its storage is 12 standard deviations off; drawn anew, nobody will ever see it.
        while code is None:
            code = encode(sample_positions(self.nnz, self.numel, generator), self.layout)
        self._store(code)

    @torch.no_grad()
    def place_(self, positions: Tensor) -> None:
        """Takes these positions instead of drawn ones.

        Where their gaps are not those of random positions they are stored plain, in new storage of 4 or 8 bytes each; a support
        whose positions are drawn then cannot load this one's state.

        Args:
            positions: int64 (nnz,), strictly increasing, in 0 .. numel - 1.

        Raises:
            ValueError: they are something else.
        """
        positions = positions.cpu()
        if positions.shape != (self.nnz,) or positions.dtype != torch.int64:
            raise ValueError(
                f"positions are {positions.dtype} of shape {tuple(positions.shape)}, not torch.int64 of ({self.nnz},)"
            )
        if self.nnz and (positions[0] < 0 or positions[-1] >= self.numel or bool((positions.diff() < 1).any())):
            raise ValueError(f"positions must increase strictly from 0 or more to at most {self.numel - 1}")
        code = encode(positions, self.layout)
        if code is None:
            code = encode(positions, plain_layout(self.nnz, self.numel))
        assert code is not None  # plain numbers always fit
        self._store(code)

    def _store(self, code: Tensor) -> None:
        """Into the storage there is, where it has the size."""
        if code.shape == self.code.shape:
            self.code.copy_(code)
        else:
            self.code = code.to(self.code.device)


class UniformPart(SparsePart):
    """The arithmetic of S with a uniform support. In a product S is a dense matrix for a while: with few percent of entries at
    random, matrix units multiply the zeros faster than any kernel finds the others."""

    def __init__(self, code: Tensor, nnz: int, out_features: int, in_features: int) -> None:
        """code: as stored by UniformSupport."""
        self.code, self.nnz, self.shape = code, nnz, (out_features, in_features)
        self._positions: Tensor | None = None

    def positions(self) -> Tensor:
        """Sorted row-major positions (N,), int32 or int64; kept as long as this object, a backward pass needs them twice."""
        if self._positions is None:
            self._positions = decode(self.code, self.nnz, math.prod(self.shape))
        return self._positions

    def add_to_(self, weight: Tensor, values: Tensor) -> None:
        """weight += S. Positions are unique and sorted: no two writes meet."""
        weight.view(-1).index_add_(0, self.positions(), values)

    def weight(self, scaled_B: Tensor, lora_A: Tensor, values: Tensor, base: Tensor | None, passing: bool) -> Tensor:
        """W = scaled_B A + base + S, (O, I); scaled_B A + S in one pass by a kernel where the kernels run."""
        if not _kernels_run(lora_A):
            return super().weight(scaled_B, lora_A, values, base, passing)
        built = kernels.build_weight(lora_A, scaled_B, values, self.positions())
        return built if base is None else built.add_(base)

    def gather(self, grad_weight: Tensor) -> Tensor:
        """The values' gradient (N,) from the weight's (O, I)."""
        return grad_weight.view(-1).index_select(0, self.positions())

    def _dense(self, values: Tensor) -> Tensor:
        weight = scratch_matrix(*self.shape, values).zero_()
        self.add_to_(weight, values)
        return weight

    def output(self, h_TR: Tensor, scaled_B: Tensor, bias: Tensor | None, x_TI: Tensor, values: Tensor) -> Tensor:
        """h scaled_B^T + bias + x S^T."""
        return F.linear(h_TR, scaled_B, bias).addmm_(x_TI, self._dense(values).t())

    def gradients_(
        self, g_TO: Tensor, x_TI: Tensor, values: Tensor | None, grad_TI: Tensor | None, need_values: bool
    ) -> Tensor | None:
        """Adds G S to grad_TI, and returns the entries of G^T x at the positions, (N,)."""
        if grad_TI is not None and values is not None:
            grad_TI.addmm_(g_TO, self._dense(values))
        if not need_values:
            return None
        if self.avoids_weight_gradient(x_TI.shape[0], 0, x_TI):
            return kernels.gather_gradient(g_TO, x_TI, self.positions())
        return self.gather(passing_product(g_TO.t(), x_TI))

    def avoids_weight_gradient(self, num_rows: int, rank: int, like: Tensor) -> bool:
        """Whether the kernels run and the rows are few."""
        out_features, in_features = self.shape
        return _kernels_run(like) and kernels.pays_off(num_rows, in_features, out_features, rank)


def _kernels_run(tensor: Tensor) -> bool:
    """Whether the Triton kernels are used; never while autograd records, since they give no gradients."""
    return not torch.is_grad_enabled() and kernels.is_available(tensor.device, tensor.dtype)
