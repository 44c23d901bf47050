"""A uniform support can store given positions with gaps of any size, and a layer computes correctly with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lora import SparseLowRankLinear, dense_reference, generator_for
from sparse_lora.uniform import UniformSupport

# 3,000 of 300,000 entries: a layout of one byte per gap, with room for a few hundred gaps of 256 and more.
ROWS, COLUMNS, NNZ = 300, 1000, 3000
FIRST = torch.arange(NNZ)  # one cluster with short gaps
LAST = torch.arange(ROWS * COLUMNS - NNZ, ROWS * COLUMNS)  # one gap larger than two bytes
SPREAD = torch.arange(NNZ) * 100
PAIRS = torch.cat([torch.arange(NNZ // 2) * 200, torch.arange(NNZ // 2) * 200 + 1]).msort()
# 1,000 gaps of 298: too many for the list.
LONG = torch.cat([torch.arange(1000) * 300 + offset for offset in (0, 1, 2)]).msort()


@pytest.mark.parametrize("positions", [FIRST, LAST, SPREAD, PAIRS, LONG], ids=["first", "last", "spread", "pairs", "long"])
def test_any_chosen_positions_are_read_back(positions: torch.Tensor) -> None:
    support = UniformSupport(ROWS, COLUMNS, NNZ)
    support.place_(positions)
    assert torch.equal(support.flat_indices(), positions)


def test_positions_with_many_long_gaps_are_stored_plain() -> None:
    """The test above covers both kinds of storage: gaps of one byte, and plain positions of four bytes each."""
    drawn, plain = (UniformSupport(ROWS, COLUMNS, NNZ) for _ in range(2))
    drawn.place_(SPREAD)
    plain.place_(LONG)
    assert drawn.nbytes == drawn.layout.nbytes
    assert plain.nbytes == 4 * NNZ > plain.layout.nbytes


def test_drawing_replaces_chosen_positions() -> None:
    chosen, fresh = (UniformSupport(ROWS, COLUMNS, NNZ) for _ in range(2))
    chosen.place_(LONG)
    for support in (chosen, fresh):
        support.draw_(generator_for(0, "w"))
    assert torch.equal(chosen.code, fresh.code)


@settings(deadline=None, max_examples=50)
@given(st.sets(st.integers(0, 59_999), min_size=1, max_size=600))
def test_any_set_of_positions_is_read_back(numbers: set[int]) -> None:
    positions = torch.tensor(sorted(numbers))
    support = UniformSupport(200, 300, len(numbers))
    support.place_(positions)
    assert torch.equal(support.flat_indices(), positions)


@pytest.mark.parametrize("positions", [FIRST, LONG], ids=["gaps", "plain"])
def test_a_layer_computes_with_chosen_positions(positions: torch.Tensor) -> None:
    """Output and gradients equal those of a dense matrix with the values at these positions."""
    layer = SparseLowRankLinear(COLUMNS, ROWS, 4, NNZ / (ROWS * COLUMNS), seed=3, dtype=torch.float64)
    assert layer.support is not None
    assert layer.sparse_value is not None
    layer.support.place_(positions)
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = dense_reference(x, layer.lora_A, layer.lora_B, layer.sparse_value, layer.support, 8.0)
    assert torch.allclose(layer(x), expected)
    parameters = [layer.lora_A, layer.lora_B, layer.sparse_value]
    own, plain = (torch.autograd.grad(output.square().sum(), parameters) for output in (layer(x), expected))
    assert all(torch.allclose(a, b) for a, b in zip(own, plain, strict=True))
    dense = torch.zeros(ROWS * COLUMNS, dtype=torch.float64)
    dense[positions] = layer.sparse_value.detach()
    low_rank = 8.0 * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer.dense_weight(), low_rank + dense.view(ROWS, COLUMNS))


@pytest.mark.parametrize(
    "wrong",
    [FIRST[:-1], FIRST.int(), FIRST.flip(0), FIRST - 1, FIRST.clamp(max=5), FIRST + ROWS * COLUMNS - 5],
    ids=["too few", "int32", "falling", "negative", "twice", "beyond"],
)
def test_an_invalid_set_of_positions_is_refused(wrong: torch.Tensor) -> None:
    support = UniformSupport(ROWS, COLUMNS, NNZ)
    support.draw_(generator_for(0, "w"))
    before = support.code.clone()
    with pytest.raises(ValueError, match="positions"):
        support.place_(wrong)
    assert torch.equal(support.code, before)
