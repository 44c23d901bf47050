"""The tensors that the layer saves for backward, and the number of live matrices of the weight's size."""

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_lora import SparseLowRankLinear
from sparse_lora.functional import PATHS
from sparse_lora.linear import SUPPORT_KINDS

IN, OUT, RANK, SPARSITY = 64, 80, 8, 0.1
DTYPES = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


def make_layer(dtype: torch.dtype = torch.float32, sparsity: float = SPARSITY, **options: str) -> SparseLowRankLinear:
    options = {"path": "materialised", **options}
    layer = SparseLowRankLinear(*(IN, OUT, RANK, sparsity), bias=True, trainable_scaling=True, seed=0, dtype=dtype, **options)
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(0))
    return layer


class LiveDenseMatrices(TorchDispatchMode):
    """Counts the storages of at least the weight's size that are alive after each operation; `most` is the peak."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.num_elements = num_elements
        self.alive: dict[int, StorageWeakRef] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() >= self.num_elements * leaf.element_size():
                reference = StorageWeakRef(leaf.untyped_storage())
                self.alive[reference.cdata] = reference
        self.alive = {key: reference for key, reference in self.alive.items() if not reference.expired()}
        self.most = max(self.most, len(self.alive))
        return result


def test_the_counter_counts_every_matrix_of_plain_autograd() -> None:
    """Tests the counter: W, dW and the gradient of W's factor are alive together in an ordinary backward pass."""
    x, weight = torch.randn(4, IN), torch.randn(OUT, IN, requires_grad=True)
    with LiveDenseMatrices(IN * OUT) as matrices:
        dense = weight * 2.0
        nn.functional.linear(x, dense).sum().backward()
    assert matrices.most == 3


# Neither x (48 x 64) nor y (48 x 80) is as large as the weight.
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES.values(), ids=DTYPES.keys())
def test_one_dense_matrix_is_alive_at_a_time(path: str, dtype: torch.dtype, autocast: bool) -> None:
    """W is freed before dW is built, and nothing is left at the end."""
    layer = make_layer(dtype, path=path)
    x = torch.randn(48, IN, dtype=dtype, requires_grad=True)
    with LiveDenseMatrices(IN * OUT) as matrices:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = layer(x)
        assert matrices.most == 1
        y.float().square().sum().backward()
        assert matrices.most == 1
        y = y + 1  # another operation, so that the counter is updated
    assert not matrices.alive


@pytest.mark.parametrize(("sparsity", "support"), [(0.0, "uniform"), (SPARSITY, "block")])
def test_factors_and_blocks_build_no_dense_matrix(sparsity: float, support: str) -> None:
    layer = make_layer(sparsity=sparsity, support=support, path="factored")
    with LiveDenseMatrices(IN * OUT) as matrices:
        layer(torch.randn(48, IN, requires_grad=True)).square().sum().backward()
    assert matrices.most == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("support", SUPPORT_KINDS)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES.values(), ids=DTYPES.keys())
def test_only_the_inputs_are_saved_for_backward(path: str, support: str, dtype: torch.dtype, autocast: bool) -> None:
    """The layer saves x, A, B, the values, the support's code and the scaling (the tensors themselves, not copies), and on the
    factored path x A^T of shape 48 x RANK."""
    layer = make_layer(dtype, support=support, path=path)
    x = torch.randn(48, IN, dtype=dtype, requires_grad=True)
    saved: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        layer(x)
    assert layer.support is not None
    own = (x, layer.lora_A, layer.lora_B, layer.sparse_value, layer.support.code)
    pointers = {tensor.data_ptr() for tensor in own if tensor is not None}
    large = [tensor for tensor in saved if tensor.numel() > 1]
    kept = [tensor for tensor in large if tensor.data_ptr() not in pointers]
    assert {tensor.data_ptr() for tensor in large} - {tensor.data_ptr() for tensor in kept} == pointers
    assert [tuple(tensor.shape) for tensor in kept] == ([(48, RANK)] if path == "factored" else [])
    assert len(large) == len(pointers) + len(kept)
    assert all(tensor.numel() < IN * OUT for tensor in saved)
