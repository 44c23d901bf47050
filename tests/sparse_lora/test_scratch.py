"""Scratch matrices: large ones share one memory, and nothing that lives longer is stored in it."""

import threading

import pytest
import torch

from sparse_lora import SparseLowRankLinear, dense_reference, support
from sparse_lora.block import BlockSupport
from sparse_lora.functional import PATHS
from sparse_lora.linear import SUPPORT_KINDS
from sparse_lora.support import large_bytes, scratch_matrix, scratch_product


@pytest.fixture
def every_size_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "LARGE_BYTES", 1)
    monkeypatch.setattr(support._kept, "memory", None, raising=False)


@torch.no_grad()
def test_large_matrices_of_a_thread_share_one_memory(every_size_is_large: None) -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    first = scratch_matrix(6, 7, like)
    assert (first.shape, first.dtype) == ((6, 7), torch.bfloat16)
    assert scratch_matrix(3, 5, like.float()).data_ptr() == first.data_ptr()
    assert scratch_matrix(60, 70, like).data_ptr() != first.data_ptr()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(scratch_matrix(60, 70, like).data_ptr()))
    thread.start()
    thread.join()
    assert found != [scratch_matrix(60, 70, like).data_ptr()]


@torch.no_grad()
def test_memory_of_a_cpu_layer_is_on_the_cpu_whatever_the_default_device(every_size_is_large: None) -> None:
    with torch.device("meta"):
        assert scratch_matrix(6, 7, torch.zeros(1, device="cpu")).device.type == "cpu"
        assert BlockSupport(20, 20, 10).flat_indices().device.type == "cpu"


def test_small_matrices_and_products_with_gradients_have_their_own_memory() -> None:
    like = torch.zeros(1)
    with torch.no_grad():
        small = [scratch_matrix(6, 7, like) for _ in range(2)]
    assert small[0].data_ptr() != small[1].data_ptr()
    large = [scratch_matrix(1024, 1025, like) for _ in range(2)]
    assert large[0].data_ptr() != large[1].data_ptr()
    assert large_bytes((1024, 1025), 4) == 4 * 1024 * 1025
    assert large_bytes((1024, 1023), 4) == 0
    left = torch.randn(3, 4, requires_grad=True)
    assert scratch_product(left, torch.eye(4)).requires_grad


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("support", SUPPORT_KINDS)
def test_layers_that_share_scratch_memory_give_the_same_results(every_size_is_large: None, support: str, path: str) -> None:
    """All results of layers of different sizes are compared at the end, so none may be overwritten by a later matrix."""
    sizes = ((20, 30), (30, 50), (50, 10))
    layers = [SparseLowRankLinear(i, o, 4, 0.1, support=support, path=path, seed=i) for i, o in sizes]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B)
    parameters = [p for layer in layers for p in layer.parameters()]
    results = []
    for seed in (0, 1):
        x = torch.randn(9, 20, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        y = expected = x
        for layer in layers:
            y = layer(y)
            others = (layer.lora_A, layer.lora_B, layer.sparse_value, layer.support, layer.effective_scaling())
            expected = dense_reference(expected, *others)
        for output in (y, expected):
            results.append([output.detach(), *torch.autograd.grad(output.square().sum(), [x, *parameters])])
    for found, wanted in zip(results[::2], results[1::2], strict=True):
        for one, other in zip(found, wanted, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
