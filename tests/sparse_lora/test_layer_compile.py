"""The layer under torch.compile: one graph, the results of eager mode, and no dense weight saved for backward."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from sparse_lora import AdaptedLinear, SparseLowRankLinear
from sparse_lora.functional import _gradients_op, _output_op
from sparse_lora.support import generator_for


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Stack(nn.Module):
    """A model with every kind of layer on both paths; no size is a multiple of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SparseLowRankLinear(26, 43, 4, 0.1, bias=True, trainable_scaling=True, seed=1)
        self.second = SparseLowRankLinear(43, 26, 4, 0.1, seed=2, path="factored")
        self.third = SparseLowRankLinear(26, 26, 4, 0.0, seed=3)
        self.fourth = SparseLowRankLinear(26, 43, 4, 0.1, support="block", path="factored", seed=4)
        self.fifth = SparseLowRankLinear(43, 26, 4, 0.1, support="block", path="materialised", seed=5)
        for name, parameter in self.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, generator=generator_for(0, name))

    def forward(self, x: Tensor) -> Tensor:
        middle: Tensor = self.third(self.second(torch.relu(self.first(x))))
        output: Tensor = self.fifth(torch.relu(self.fourth(torch.relu(middle))))
        return output


def output_gradients_and_saved_sizes(
    model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, autocast: bool
) -> tuple[list[Tensor], list[int]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    saved: list[int] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        y = function(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())], saved


# aot_eager_decomp_partition chooses the tensors saved for backward as inductor does, without generating code.
@pytest.mark.parametrize(
    ("backend", "autocast"), [("inductor", False), ("aot_eager_decomp_partition", True)], ids=["inductor", "autocast"]
)
def test_compiled_equals_eager_and_saves_no_dense_weight(backend: str, autocast: bool) -> None:
    """One graph (fullgraph raises an error at a break), results equal up to rounding for two numbers of rows, and nothing as
    large as the smallest weight (26 x 26) saved for backward except the layers' inputs and outputs."""
    model = Stack()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for num_rows in (3, 61):
        x = torch.randn(2, num_rows, 26, generator=generator_for(num_rows, "x"))
        expected, _ = output_gradients_and_saved_sizes(model, model, x, autocast)
        found, saved = output_gradients_and_saved_sizes(model, compiled, x, autocast)
        # The compiler may fuse the operations between the layers: bfloat16 activations then skip a rounding.
        tolerance = 2 * torch.finfo(torch.bfloat16).eps if autocast else 1e-5
        for eager, other in zip(expected, found, strict=True):
            assert (eager - other).norm() <= tolerance * eager.norm()
        assert {26 * 43, 26 * 26}.isdisjoint(saved)
        assert max(saved) <= max(2 * num_rows * 43, 4 * 43)


@pytest.mark.parametrize(
    ("factored", "with_base", "cached"), [(False, False, False), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize(("sparsity", "kind"), [(0.0, "uniform"), (0.1, "uniform"), (0.2, "block")])
def test_the_custom_operators_pass_torchs_checks(
    sparsity: float, kind: str, factored: bool, with_base: bool, cached: bool
) -> None:
    """torch's opcheck: no input is changed or returned, and shapes, dtypes and strides are predicted correctly."""
    layer = SparseLowRankLinear(13, 9, 4, sparsity, support=kind, bias=True, trainable_scaling=True, seed=0)
    stored, blocks = (None, 0) if layer.support is None else (layer.support.stored, layer.support.blocks)
    scaling = torch.tanh(layer.scaling.detach())
    for x in (torch.randn(2, 30, 13), torch.randn(30, 2, 13).transpose(0, 1), torch.randn(13)):
        tensors = [t if t is None else t.detach() for t in (x, layer.lora_A, layer.lora_B, layer.sparse_value, stored)]
        base, bias = torch.randn(9, 13) if with_base else None, layer.bias.detach()
        weight = layer.dense_weight().detach() if cached else None
        checks = ("test_schema", "test_faketensor")
        settings = (1.0, torch.float32, blocks, factored)
        torch.library.opcheck(_output_op, (*tensors, scaling, base, weight, bias, *settings), test_utils=checks)
        _, kept = _output_op(*tensors, scaling, base, weight, bias, *settings)
        needed = [True, True, True, sparsity > 0, True, with_base]
        grad_output = torch.randn(*x.shape[:-1], 9)
        arguments = (grad_output, kept, *tensors, scaling, base, weight, *settings, needed)
        torch.library.opcheck(_gradients_op, arguments, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_linear_compiles_to_one_graph(dtype: torch.dtype) -> None:
    """Outputs and gradients equal those of eager mode, with W0 added to W (float32) or multiplied separately (bfloat16)."""
    layer = AdaptedLinear(nn.Linear(26, 43).requires_grad_(False).to(dtype), 4, 0.1, support="largest")
    for parameter in layer.adapter:
        nn.init.normal_(parameter)
    x = torch.randn(50, 26, dtype=dtype)
    found = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")):
        y = function(x)
        found.append([y, *torch.autograd.grad(y.sum(), layer.adapter)])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*found, strict=True))
