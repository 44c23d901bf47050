"""The layer on a CPU and on a GPU: every support and path against float64, the decoded positions, and under torch.compile."""

import pytest
import torch
from torch import Tensor

from sparse_lora import SparseLowRankLinear, dense_reference, generator_for
from sparse_lora.functional import PATHS
from sparse_lora.uniform import UniformSupport

# Three roundings to bfloat16 in a chain, each of 2^-9 at most, are below .006 of the norm.
LARGEST_ERROR = 1e-2
SUPPORTS = ("uniform", "block", "none")


def random(*shape: int, name: str, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator_for(0, name)).to(device, torch.bfloat16)


def layer_on(device: torch.device, support: str, path: str) -> SparseLowRankLinear:
    """Returns a layer in bfloat16, sizes not multiples of 8, whose B is not zero."""
    sparsity, kind = (0.0, "uniform") if support == "none" else (0.1, support)
    layer = SparseLowRankLinear(67, 45, 8, sparsity, support=kind, path=path, seed=1, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        layer.lora_B.copy_(0.1 * random(45, 8, name="B", device=device))
    return layer


def gradients(y: Tensor, x: Tensor, parameters: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("support", SUPPORTS)
def test_output_and_gradients_equal_float64_up_to_rounding(device, support, path):
    layer = layer_on(device, support, path)
    x, grad = (random(50, width, name=str(width), device=device) for width in (67, 45))
    found = gradients(layer(x.requires_grad_()), x, list(layer.parameters()), grad)
    wide = {name: parameter.detach().double().requires_grad_() for name, parameter in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    scaling = layer.effective_scaling()
    y64 = dense_reference(x64, wide["lora_A"], wide["lora_B"], wide.get("sparse_value"), layer.support, scaling)
    exact = gradients(y64, x64, list(wide.values()), grad.double())
    for name, a, b in zip(["y", "x", *wide], found, exact, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < LARGEST_ERROR, name


@pytest.mark.parametrize(("nnz", "width"), [(1, 45), (300, 45), (3000, 45), (60, 6700)])
def test_positions_decoded_on_a_device_are_those_that_were_drawn(device, nnz, width):
    """Densities of .0003 to 1, whose gaps are stored in one to four bytes."""
    support = UniformSupport(67, width, nnz)
    positions = torch.randperm(67 * width, generator=generator_for(0, f"{nnz}"))[:nnz].msort()
    support.place_(positions)
    assert torch.equal(support.to(device).flat_indices().cpu(), positions)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("support", ["uniform", "block"])
def test_compiled_equals_eager(device, support, path):
    """On a GPU with generated code; on a CPU, where generating it takes long and other tests do, traced only."""
    torch._dynamo.reset()
    layer = layer_on(device, support, path)
    compiled = torch.compile(layer, backend="inductor" if device.type == "cuda" else "aot_eager", fullgraph=True)
    x, grad = (random(50, width, name=str(width), device=device) for width in (67, 45))
    results = [gradients(call(x.requires_grad_()), x, list(layer.parameters()), grad) for call in (layer, compiled)]
    torch._dynamo.reset()
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=0, atol=0)
