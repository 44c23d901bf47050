"""The uniform support: entries drawn at random over the whole matrix, and the format in which their positions are stored.

Sorted positions are stored as the gaps between them, one byte each. With a share delta of all entries the mean gap is 1 / delta,
and about (1 - delta)^256 of the gaps are 256 or more: 2e-6 at delta 0.05, 8 % at 0.01. Such an escaped gap keeps its lower byte
in its place like any other gap; its upper byte and its place go to a separate list, whose sorted places are stored alike.
For few positions, whose gaps are long, two bytes per gap or the plain positions take less memory.

Sizes follow from the shape alone, so that a tensor can be allocated, loaded and counted before anything is drawn. The list of
escaped gaps has room for 12 standard deviations more than a uniform draw is expected to need.

Shapes: T rows of the input, I in_features, O out_features, N nonzeros of S.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .support import SparsePart, Support, scratch_matrix, scratch_product

# Up to this many entries, positions are taken from a permutation of all entries, which is small; it also ends the recursion of
# `sample_positions`.
_PERMUTE_UP_TO = 4096
_SPARE_DEVIATIONS = 12
# A width is used only if the expected number of gaps that do not fit into its upper byte is at most this.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Layout:
    """The storage format of up to `count` sorted numbers below `limit`.

    width: bytes per number; 1 and 2 are for gaps (`escaped` is then set), 4 and 8 for plain numbers.
    escaped: the layout of the places of gaps that do not fit in `width` bytes.
    """

    count: int
    limit: int
    width: int
    escaped: Layout | None = None

    @property
    def upper_bytes_at(self) -> int:
        """Offset of the escaped gaps' upper bytes; parts start at multiples of 8, so that they can be viewed as integers."""
        return _aligned(self.count * self.width)

    @property
    def places_at(self) -> int:
        """Offset of the escaped gaps' places."""
        return self.upper_bytes_at + _aligned(0 if self.escaped is None else self.escaped.count)

    @property
    def nbytes(self) -> int:
        """Total number of bytes."""
        return self.count * self.width if self.escaped is None else self.places_at + self.escaped.nbytes


def plain_layout(count: int, limit: int) -> Layout:
    """Returns the layout of `count` plain numbers below `limit`, which may have any gaps."""
    return Layout(count, limit, 4 if limit <= 2**31 else 8)


@functools.cache
def layout_for(nnz: int, numel: int) -> Layout:
    """Returns the smallest layout for `nnz` uniformly drawn positions below `numel`."""
    return _smallest(nnz, nnz, nnz, numel)


def _smallest(count: int, expected: float, fewest: float, limit: int) -> Layout:
    """Returns the smallest layout for at most `count`, at least `fewest` and on average `expected` numbers below `limit`."""
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
    """Returns the probability that a gap between `count` uniform numbers below `limit` is at least `length`."""
    return 0.0 if length >= limit else math.exp(count * math.log1p(-length / limit))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


# --- Drawing and coding positions ---


def sample_positions(nnz: int, numel: int, generator: torch.Generator) -> Tensor:
    """Draws `nnz` of the positions 0 .. numel - 1 uniformly without replacement, sorted.

    The distinct values among independent uniform draws are a uniformly random set of their number, and stay one when a uniformly
    random part is dropped. Temporary memory is proportional to nnz, not to numel, as long as nnz <= numel / 2.

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
    # randint reduces a 32-bit number modulo numel, which favours the first rows of a 4096 x 11008 matrix by 1 %. With 63 bits the
    # bias is numel / 2^63.
    draws = torch.empty(count, dtype=torch.int64, device="cpu").random_(generator=generator)
    return draws.remainder_(numel)


def _kept(dropped: Tensor, numel: int) -> Tensor:
    """Returns a boolean mask of `numel` positions, False for the dropped ones."""
    mask = torch.ones(numel, dtype=torch.bool, device="cpu")
    mask[dropped] = False
    return mask


def encode(positions: Tensor, layout: Layout) -> Tensor | None:
    """Encodes sorted int64 CPU positions as the uint8 tensor (layout.nbytes,) that `decode` reads; None if they do not fit.

    If there are fewer than layout.count positions, the last one is repeated.
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
    # Keeps the lowest bytes of a little-endian integer; `_decode` undoes the sign of two-byte integers.
    _numbers(code, layout).copy_(gaps - (upper << (8 * layout.width)))
    code[layout.upper_bytes_at :][: places.numel()].copy_(upper[places])
    code[layout.places_at :].copy_(coded_places)
    return code


def decode(code: Tensor, nnz: int, numel: int) -> Tensor:
    """Decodes a UniformSupport's stored tensor to sorted row-major positions, (nnz,), int32 or int64.

    Needs only the tensor and sizes, so that the autograd function can save the stored form and decode it in backward.
    """
    layout = layout_for(nnz, numel)
    # Positions that were chosen instead of drawn may not fit the layout; `place_` then stores them plain.
    if code.numel() != layout.nbytes:
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
        # Unused places at the end of the list repeat the last one, with an upper byte of 0.
        gaps.index_add_(0, _decode(code[layout.places_at :], layout.escaped, dtype), upper << (8 * layout.width))
    return gaps.cumsum_(0)


def _numbers(code: Tensor, layout: Layout) -> Tensor:
    """Returns a view of a layout's first part: (count,), integers of its width."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return code[: layout.count * layout.width].view(kinds[layout.width])


class UniformSupport(Support):
    """A support of any number of positions, drawn without replacement over the whole matrix (arXiv 2406.02214, section 3.2).

    A position takes about one byte for 1 % of the entries and more (`layout`), in a buffer that checkpoints contain. Positions
    are undefined in a new support and after `to_empty`, until `draw_` is called.
    """

    kind = "uniform"
    code: Tensor
    decoded: Tensor | None  # the sorted positions after `cache_positions`: (nnz,), int32 or int64
    columns: Tensor | None  # columns of the positions, row by row: (nnz,), int16 if in_features allows, else int32
    starts: Tensor | None  # index in `columns` at which each row starts: (out,), int32

    def __init__(self, out_features: int, in_features: int, nnz: int, device: torch.device | str | None = None) -> None:
        """device: the buffer's device; "meta" allocates nothing."""
        super().__init__(out_features, in_features, nnz)
        # Stored as bytes, because gloo does not broadcast int16; every part is a view.
        self.register_buffer("code", torch.empty(self.layout.nbytes, dtype=torch.uint8, device=device))
        self.register_buffer("decoded", None, persistent=False)
        self.register_buffer("columns", None, persistent=False)
        self.register_buffer("starts", None, persistent=False)

    @property
    def layout(self) -> Layout:
        """Storage format of the positions."""
        return layout_for(self.nnz, self.numel)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored positions take."""
        return self.code.numel()

    @property
    def stored(self) -> Tensor:
        """The decoded positions if they are cached, else the stored tensor."""
        return self.code if self.decoded is None else self.decoded

    @torch.no_grad()
    def cache_positions(self) -> None:
        """Keeps the decoded positions, 4 or 8 bytes each, so that no pass decodes them again; until positions change."""
        self.decoded = decode(self.code, self.nnz, self.numel)

    def flat_indices(self) -> Tensor:
        """Sorted int64 positions (nnz,) in the row-major weight."""
        return UniformPart(self.code, self.nnz, self.out_features, self.in_features).positions().to(torch.int64)

    @property
    def ready_for_few_rows(self) -> bool:  # type: ignore[override]
        """True after `keep_rows`."""
        return self.columns is not None

    @torch.no_grad()
    def keep_rows(self) -> None:
        """Creates `columns` and `starts` from the current positions, for `add_few_rows_`."""
        positions = self.flat_indices()
        narrow = self.in_features <= torch.iinfo(torch.int16).max + 1
        self.columns = (positions % self.in_features).to(torch.int16 if narrow else torch.int32)
        beginnings = torch.arange(self.out_features, device=positions.device) * self.in_features
        self.starts = torch.searchsorted(positions, beginnings).to(torch.int32)

    def add_few_rows_(self, y_TO: Tensor, x_TI: Tensor, values: Tensor) -> None:
        """Adds x S^T to y; each output is a weighted sum of inputs, as embedding_bag computes."""
        if self.columns is None or self.starts is None:
            raise RuntimeError("the support has no table of its rows: call keep_rows, or sparse_lora.prepare_for_inference")
        num_rows = x_TI.shape[0]
        # With fewer than four columns embedding_bag is five times slower.
        inputs_IT = F.pad(x_TI, (0, 0, 0, max(0, 4 - num_rows))).t().contiguous()
        # embedding_bag requires int32; int16 storage halves the table's memory.
        columns = self.columns.to(torch.int32)
        sums_OT = F.embedding_bag(columns, inputs_IT, self.starts, mode="sum", per_sample_weights=values)
        y_TO += sums_OT[:, :num_rows].t()

    @torch.no_grad()
    def draw_(self, generator: torch.Generator) -> None:
        """Draws the positions uniformly without replacement from a CPU generator, into the existing storage."""
        code = None
        # A draw that does not fit its storage deviates by more than 12 standard deviations; it is practically impossible.
        while code is None:
            code = encode(sample_positions(self.nnz, self.numel, generator), self.layout)
        self._store(code)

    @torch.no_grad()
    def place_(self, positions: Tensor) -> None:
        """Sets the positions to given ones.

        If their gaps do not fit the layout of drawn positions, they are stored plain, in new storage of 4 or 8 bytes each. A
        support with drawn positions then cannot load this support's state.

        Args:
            positions: int64 (nnz,), strictly increasing, in 0 .. numel - 1.

        Raises:
            ValueError: the positions do not meet these conditions.
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
        # Plain numbers always fit.
        assert code is not None
        self._store(code)

    def _store(self, code: Tensor) -> None:
        """Copies `code` to the existing storage, or replaces the storage if the sizes differ; drops what was made from it."""
        self._drop_tables()
        if code.shape == self.code.shape:
            self.code.copy_(code)
        else:
            self.code = code.to(self.code.device)

    def _drop_tables(self) -> None:
        self.decoded = self.columns = self.starts = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_tables()
        super()._load_from_state_dict(*args, **kwargs)


class UniformPart(SparsePart):
    """The arithmetic of S with a uniform support.

    Products use S as a temporary dense matrix: with a few percent of random entries, multiplying the zeros too is faster than any
    sparse kernel.
    """

    def __init__(self, stored: Tensor, nnz: int, out_features: int, in_features: int) -> None:
        """stored: UniformSupport's stored tensor, uint8, or its decoded positions."""
        self.stored, self.nnz, self.shape = stored, nnz, (out_features, in_features)
        self._positions = None if stored.dtype == torch.uint8 else stored

    def positions(self) -> Tensor:
        """Returns sorted row-major positions (N,), int32 or int64; cached, because a backward pass needs them twice."""
        if self._positions is None:
            self._positions = decode(self.stored, self.nnz, math.prod(self.shape))
        return self._positions

    def add_to_(self, weight: Tensor, values: Tensor) -> None:
        """Adds S to the weight. Positions are unique, so no entry is written twice."""
        weight.view(-1).index_add_(0, self.positions(), values)

    def weight(self, scaled_B: Tensor, lora_A: Tensor, values: Tensor, base: Tensor | None, scratch: bool) -> Tensor:
        """Returns W = scaled_B A + base + S, (O, I); computes scaled_B A + S by one Triton kernel if they are used."""
        if not _kernels_run(lora_A):
            return super().weight(scaled_B, lora_A, values, base, scratch)
        built = kernels.build_weight(lora_A, scaled_B, values, self.positions())
        return built if base is None else built.add_(base)

    def gather(self, grad_weight: Tensor) -> Tensor:
        """Returns the values' gradient (N,), taken from the weight's gradient (O, I)."""
        return grad_weight.view(-1).index_select(0, self.positions())

    def _dense(self, values: Tensor) -> Tensor:
        weight = scratch_matrix(*self.shape, values).zero_()
        self.add_to_(weight, values)
        return weight

    def output(self, h_TR: Tensor, scaled_B: Tensor, bias: Tensor | None, x_TI: Tensor, values: Tensor) -> Tensor:
        """Returns h scaled_B^T + bias + x S^T, (T, O)."""
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
        return self.gather(scratch_product(g_TO.t(), x_TI))

    def avoids_weight_gradient(self, num_rows: int, rank: int, like: Tensor) -> bool:
        """Tells whether the Triton kernels are used and the rows are few enough for them."""
        out_features, in_features = self.shape
        return _kernels_run(like) and kernels.pays_off(num_rows, in_features, out_features, rank)


def _kernels_run(tensor: Tensor) -> bool:
    """Tells whether the Triton kernels are used; never while autograd records, since they have no gradients."""
    return not torch.is_grad_enabled() and kernels.are_used(tensor.device, tensor.dtype)
