"""The block support: where its entries are, how many, and that its products are those of the matrix it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_lora import SparseLowRankLinear, generator_for
from sparse_lora.block import BlockPart, BlockSupport, block_count, runs
from sparse_lora.linear import make_support

sizes = st.integers(1, 40)


def slice_numbers(size: int, blocks: int) -> Tensor:
    """For each of `size` indices the slice it is in: consecutive slices, the first size % blocks of them one longer."""
    return torch.tensor([b for b in range(blocks) for _ in range(size // blocks + (b < size % blocks))])


@settings(deadline=None, max_examples=200)
@given(sizes, sizes, st.data())
def test_output_o_reads_slice_o_modulo_the_number_of_blocks(rows: int, columns: int, data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, min(rows, columns)))
    support = BlockSupport(rows, columns, blocks)
    expected = (torch.arange(rows) % blocks)[:, None] == slice_numbers(columns, blocks)[None, :]
    assert torch.equal(support.flat_indices(), expected.flatten().nonzero().squeeze(1))
    assert support.nnz == expected.sum()
    assert len(runs(rows, columns, blocks)) <= 3


@settings(deadline=None, max_examples=100)
@given(sizes, sizes, st.integers(1, 9), st.integers(0, 2**31), st.data())
def test_its_products_are_those_of_the_matrix(rows: int, columns: int, num_rows: int, seed: int, data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, min(rows, columns)))
    support = BlockSupport(rows, columns, blocks)
    generator = generator_for(seed, "x")
    values, x, g, weight = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((support.nnz,), (num_rows, columns), (num_rows, rows), (rows, columns))
    )
    S = torch.zeros(rows * columns, dtype=torch.float64).index_put((support.flat_indices(),), values).view(rows, columns)
    part = BlockPart(blocks, rows, columns)
    dx, W = x.clone(), weight.clone()
    h, B, bias = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((num_rows, 2), (rows, 2), (rows,)))
    grad_values = part.gradients_(g, x, values, dx, need_values=True)
    part.add_to_(W, values)
    assert torch.allclose(part.output(h, B, bias, x, values), h @ B.t() + bias + x @ S.t(), rtol=1e-12, atol=1e-12)
    assert torch.allclose(dx, x + g @ S, rtol=1e-12, atol=1e-12)
    assert torch.equal(W, weight + S)
    dW = g.t() @ x
    assert torch.equal(part.gather(dW), dW.flatten()[support.flat_indices()])
    assert grad_values is not None
    assert torch.allclose(grad_values, dW.flatten()[support.flat_indices()], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "sparsity", "blocks"),
    [((4096, 11008), 0.05, 20), ((5461, 2048), 0.03, 33), ((2048, 5461), 1 / 32, 32), ((512, 512), 0.03, 33)],
)
def test_it_has_full_rank_and_the_asked_number_of_entries_to_within_rounding(
    shape: tuple[int, int], sparsity: float, blocks: int
) -> None:
    """A share 1 / k instead of delta, and slices that differ by one: at most 2 % from int(delta * out * in)."""
    support = make_support("block", *shape, sparsity)
    assert support.blocks == blocks
    assert abs(support.nnz / int(sparsity * shape[0] * shape[1]) - 1) < 0.02
    assert support.nbytes == 0
    assert not list(support.buffers())
    layer = SparseLowRankLinear(66, 99, 1, 1 / 33, support="block", seed=0)
    assert torch.linalg.matrix_rank(layer.dense_weight().detach()) == 66


@pytest.mark.parametrize(("sparsity", "blocks"), [(1.0, 1), (0.5, 2), (0.03, 33), (0.05, 20), (0.01, 100), (0.07, 14)])
def test_a_share_becomes_a_number_of_blocks(sparsity: float, blocks: int) -> None:
    assert block_count(sparsity) == blocks


def test_a_share_that_no_number_of_blocks_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"sparsity 0.4: .* nearest are 0.3333 and 0.5: choose one of these"):
        block_count(0.4)


def test_more_blocks_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"33 blocks do not fit a 20 x 64 weight: choose 1 .. 20"):
        make_support("block", 20, 64, 0.03)
