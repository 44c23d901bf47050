"""The uniform support: entries drawn at random over the whole matrix, stored in a format known to this file and layout.py only.

Shapes: T rows of the input, I in_features, O out_features, N nonzeros of S.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .layout import Layout, layout_for, plain_layout
from .scratch import passing_product, scratch_matrix
from .support import Support

# Up to this many positions a permutation of all of them is drawn: no scratch worth saving, and it ends the recursion
# of `sample_positions`.
_PERMUTE_UP_TO = 4096


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

    About one byte per position for 1 % of the entries and more (`layout`), in a buffer that checkpoints carry. A new one holds no
    valid positions yet, nor does one after `to_empty`: call `draw_`.
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


class UniformPart:
    """The arithmetic of S with a uniform support; see support.SparsePart. In a product S is a dense matrix for a while: with few
    percent of entries at random, matrix units multiply the zeros faster than any kernel finds the others."""

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

    def weight(self, scaled_B: Tensor, lora_A: Tensor, values: Tensor) -> Tensor | None:
        """W = scaled_B A + S, (O, I), in one pass by a kernel."""
        return kernels.build_weight(lora_A, scaled_B, values, self.positions()) if _kernels_run(lora_A) else None

    def gather(self, grad_weight: Tensor) -> Tensor:
        """The entries of a gradient of the weight, (O, I), that are those of the values."""
        return grad_weight.view(-1).index_select(0, self.positions())

    def _dense(self, values: Tensor) -> Tensor:
        weight = scratch_matrix(*self.shape, values).zero_()
        self.add_to_(weight, values)
        return weight

    def output(self, h_TR: Tensor, scaled_B: Tensor, bias: Tensor | None, x_TI: Tensor, values: Tensor) -> Tensor:
        """h scaled_B^T + bias + x S^T."""
        return F.linear(h_TR, scaled_B, bias).addmm_(x_TI, self._dense(values).t())

    def arranged(self, g_TO: Tensor) -> Tensor:
        """As it is."""
        return g_TO

    def add_input_gradient_(self, grad_TI: Tensor, arranged_TO: Tensor, values: Tensor) -> None:
        """dx += G S."""
        grad_TI.addmm_(arranged_TO, self._dense(values))

    def value_gradient(self, arranged_TO: Tensor, x_TI: Tensor) -> Tensor:
        """G^T x at the positions, (N,)."""
        if self.spares_weight_gradient(arranged_TO, x_TI, 0):
            return kernels.gather_gradient(arranged_TO, x_TI, self.positions())
        return self.gather(passing_product(arranged_TO.t(), x_TI))

    def spares_weight_gradient(self, g_TO: Tensor, x_TI: Tensor, rank: int) -> bool:
        """Where the kernels run, for few rows."""
        out_features, in_features = self.shape
        return _kernels_run(x_TI) and kernels.pays_off(x_TI.shape[0], in_features, out_features, rank)


def _kernels_run(tensor: Tensor) -> bool:
    """They give no gradients: where somebody differentiates a backward pass, plain operations do."""
    return not torch.is_grad_enabled() and kernels.is_available(tensor.device, tensor.dtype)
