"""The block support: positions and number of its entries, and products equal to those of the dense matrix S.

Block support divides the inputs into `blocks` slices; output o reads slice o % blocks and nothing else.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_lora import SparseLowRankLinear, generator_for
from sparse_lora.block import BlockPart, BlockSupport, block_count, runs
from sparse_lora.linear import make_support

SIZES = st.integers(1, 40)


def slice_of_each_input(columns: int, blocks: int) -> Tensor:
    """Returns the number of each input's slice: consecutive slices, of which the first columns % blocks are longer by one."""
    lengths = [columns // blocks + (number < columns % blocks) for number in range(blocks)]
    return torch.arange(blocks).repeat_interleave(torch.tensor(lengths))


@settings(deadline=None, max_examples=200)
@given(SIZES, SIZES, st.data())
def test_output_o_reads_slice_o_modulo_the_number_of_blocks(rows: int, columns: int, data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, min(rows, columns)))
    support = BlockSupport(rows, columns, blocks)
    is_entry = (torch.arange(rows) % blocks)[:, None] == slice_of_each_input(columns, blocks)[None, :]
    assert torch.equal(support.flat_indices(), is_entry.flatten().nonzero().squeeze(1))
    assert support.nnz == is_entry.sum()
    assert len(runs(rows, columns, blocks)) <= 3


@dataclass
class Case:
    """A block support with random values, the dense matrix S with these values, and random inputs x and gradients g."""

    part: BlockPart
    positions: Tensor
    values: Tensor
    S: Tensor
    x: Tensor
    g: Tensor
    generator: torch.Generator

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, columns, num_inputs = draw(SIZES), draw(SIZES), draw(st.integers(1, 9))
    blocks = draw(st.integers(1, min(rows, columns)))
    generator = generator_for(draw(st.integers(0, 2**31)), "x")
    support = BlockSupport(rows, columns, blocks)
    values, x, g = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((support.nnz,), (num_inputs, columns), (num_inputs, rows))
    )
    positions = support.flat_indices()
    S = torch.zeros(rows * columns, dtype=torch.float64).index_put((positions,), values).view(rows, columns)
    return Case(BlockPart(blocks, rows, columns), positions, values, S, x, g, generator)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_the_output_is_the_dense_product_plus_low_rank_part_and_bias(case: Case) -> None:
    num_inputs, rows = case.g.shape
    h, B, bias = case.random(num_inputs, 2), case.random(rows, 2), case.random(rows)
    assert_near(case.part.output(h, B, bias, case.x, case.values), h @ B.t() + bias + case.x @ case.S.t())


@settings(deadline=None, max_examples=100)
@given(cases())
def test_gradients_of_inputs_and_values_are_those_of_the_dense_matrix(case: Case) -> None:
    grad_x = case.x.clone()
    grad_values = case.part.gradients_(case.g, case.x, case.values, grad_x, need_values=True)
    assert_near(grad_x, case.x + case.g @ case.S)
    assert grad_values is not None
    assert_near(grad_values, (case.g.t() @ case.x).flatten()[case.positions])


@settings(deadline=None, max_examples=100)
@given(cases())
def test_values_are_added_to_a_weight_and_read_from_it_exactly(case: Case) -> None:
    weight = case.random(*case.S.shape)
    total = weight.clone()
    case.part.add_to_(total, case.values)
    assert torch.equal(total, weight + case.S)
    assert torch.equal(case.part.gather(weight), weight.flatten()[case.positions])


@pytest.mark.parametrize(
    ("shape", "sparsity", "blocks"),
    [((4096, 11008), 0.05, 20), ((5461, 2048), 0.03, 33), ((2048, 5461), 1 / 32, 32), ((512, 512), 0.03, 33)],
)
def test_the_number_of_entries_is_the_requested_one_within_two_percent(
    shape: tuple[int, int], sparsity: float, blocks: int
) -> None:
    """Two roundings: the share is 1 / blocks instead of `sparsity`, and the lengths of the slices differ by one."""
    support = make_support("block", *shape, sparsity)
    assert support.blocks == blocks
    assert abs(support.nnz / int(sparsity * shape[0] * shape[1]) - 1) < 0.02


def test_positions_need_no_memory() -> None:
    support = make_support("block", 512, 512, 0.03)
    assert support.nbytes == 0
    assert not list(support.buffers())


def test_a_layer_with_block_support_has_full_rank() -> None:
    layer = SparseLowRankLinear(66, 99, 1, 1 / 33, support="block", seed=0)
    assert torch.linalg.matrix_rank(layer.dense_weight().detach()) == 66


@pytest.mark.parametrize(("sparsity", "blocks"), [(1.0, 1), (0.5, 2), (0.03, 33), (0.05, 20), (0.01, 100), (0.07, 14)])
def test_the_number_of_blocks_is_one_over_the_sparsity_rounded(sparsity: float, blocks: int) -> None:
    assert block_count(sparsity) == blocks


def test_a_sparsity_far_from_one_over_a_whole_number_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"sparsity 0.4: .* nearest are 0.3333 and 0.5: choose one of these"):
        block_count(0.4)


def test_more_blocks_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"33 blocks do not fit a 20 x 64 weight: choose 1 .. 20"):
        make_support("block", 20, 64, 0.03)
