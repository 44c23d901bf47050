"""The inference path for few rows: equal results, when it is used, and the memory it needs."""

import pytest
import torch

from sparse_lora import SparseLowRankLinear, dense_reference, functional, prepare_for_inference
from sparse_lora.uniform import UniformSupport

KINDS = [(0.1, "uniform"), (0.1, "block"), (0.0, "uniform")]


def layer_of(sparsity: float, support: str, **changes: object) -> SparseLowRankLinear:
    layer = SparseLowRankLinear(46, 37, 5, sparsity, support=support, seed=1, **changes)
    torch.nn.init.normal_(layer.lora_B)
    return layer


def reference(layer: SparseLowRankLinear, x: torch.Tensor) -> torch.Tensor:
    values = (layer.lora_A, layer.lora_B, layer.sparse_value, layer.support, layer.effective_scaling(), layer.bias)
    return dense_reference(x, *values)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows in each call of _few_rows_output."""
    calls: list[int] = []
    original = functional._few_rows_output

    def spy(x: torch.Tensor, *others: object) -> torch.Tensor:
        calls.append(x.shape[:-1].numel())
        return original(x, *others)

    monkeypatch.setattr(functional, "_few_rows_output", spy)
    return calls


@pytest.mark.parametrize("shape", [(1, 46), (3, 46), (2, 5, 46), (32, 46)])
@pytest.mark.parametrize(("sparsity", "support"), KINDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_few_rows_give_exact_results(
    served: list[int], shape: tuple[int, ...], sparsity: float, support: str, scaled: bool
) -> None:
    layer = prepare_for_inference(layer_of(sparsity, support, bias=True, trainable_scaling=scaled))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = layer(x)
        expected = reference(layer, x)
    assert served == [x.shape[:-1].numel()]
    assert found.shape == (*shape[:-1], 37)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sparsity", "support"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_few_rows_are_exact_in_other_dtypes(served: list[int], sparsity: float, support: str, dtype: torch.dtype) -> None:
    layer = prepare_for_inference(layer_of(sparsity, support, dtype=dtype))
    x = torch.randn(2, 46, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = layer(x)
        expected = reference(layer.double(), x.double())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-12
    assert served == [2]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_the_inference_path_is_used_only_if_it_applies(served: list[int]) -> None:
    """Not with gradients, for many rows, under autocast, on the materialised path, or without the table of rows."""
    layer = layer_of(0.1, "uniform")
    x = torch.randn(33, 46)
    with torch.no_grad():
        layer(x[:1])
    layer.support.keep_rows()
    layer(x[:1]).sum().backward()
    with torch.no_grad():
        layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x[:1])
        layer.path = "materialised"
        layer(x[:1])
        assert served == []
        layer.path = "auto"
        layer(x[:32])
    assert served == [32]
    assert layer.lora_A.grad is not None


def test_preparing_for_inference_takes_two_bytes_per_nonzero_and_changes_no_state() -> None:
    layer = layer_of(0.1, "uniform")
    before = list(layer.state_dict())
    assert prepare_for_inference(layer) is layer
    assert list(layer.state_dict()) == before
    assert not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    support = layer.support
    assert isinstance(support, UniformSupport)
    assert support.columns.nbytes + support.starts.nbytes == 2 * support.nnz + 4 * 37
    assert layer.to(torch.bfloat16).support.columns.dtype == torch.int16


@pytest.mark.parametrize("in_features", [2**15, 2**15 + 1])
def test_columns_beyond_16_bits_are_stored_in_32(in_features: int) -> None:
    """The last column is the largest that 16 bits can store, or one more."""
    support = UniformSupport(3, in_features, 40)
    support.draw_(torch.Generator().manual_seed(0))
    flat = support.flat_indices()
    flat[-1] = 3 * in_features - 1
    support.place_(flat.msort())
    support.keep_rows()
    assert support.columns.dtype == (torch.int16 if in_features == 2**15 else torch.int32)
    x, values = torch.randn(2, in_features), torch.randn(40)
    found = torch.zeros(2, 3)
    support.add_few_rows_(found, x, values)
    dense = torch.zeros(3 * in_features).index_put((support.flat_indices(),), values).view(3, in_features)
    torch.testing.assert_close(found, x @ dense.T, rtol=1e-5, atol=1e-5)


def test_rows_without_sparse_entries_are_computed_correctly() -> None:
    """Rows at the beginning, at the end and in between have no entries."""
    layer = layer_of(0.1, "uniform")
    nnz = layer.support.nnz
    rows = torch.tensor([3, 4, 9]).repeat_interleave(46)[:nnz] if nnz <= 138 else torch.arange(nnz) // 46 + 3
    layer.support.place_((rows * 46 + torch.arange(nnz) % 46).msort())
    prepare_for_inference(layer)
    x = torch.randn(1, 46)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-5, atol=1e-5)


def test_a_support_without_its_table_of_rows_is_refused() -> None:
    layer = layer_of(0.1, "uniform")
    with pytest.raises(RuntimeError, match=r"call keep_rows, or sparse_lora\.prepare_for_inference"):
        layer.support.add_few_rows_(torch.zeros(1, 37), torch.zeros(1, 46), layer.sparse_value.detach())


def test_new_positions_are_used_for_few_rows_too(served: list[int]) -> None:
    layer = prepare_for_inference(layer_of(0.1, "uniform"))
    layer.draw_support(5, "")
    x = torch.randn(3, 46, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-5, atol=1e-5)
        assert served == []
        torch.testing.assert_close(prepare_for_inference(layer)(x), reference(layer, x), rtol=1e-5, atol=1e-5)
    assert served == [3]
