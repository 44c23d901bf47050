"""What linears keep between passes changes no bit of a result, is dropped when it is out of date, and is not saved."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from sparse_lora import AdaptedLinear, SparseLowRankLinear
from sparse_lora.cache import WeightCache, cache_positions

ROWS = 40


def layer(support: str = "uniform", path: str = "materialised", dtype: torch.dtype = torch.float32, **settings) -> nn.Sequential:
    """A model of one linear, whose B is not zero."""
    sparsity = {} if support == "none" else {"support": support}
    linear = SparseLowRankLinear(
        *(48, 36, 5, 0.0 if support == "none" else 0.125), path=path, seed=3, dtype=dtype, bias=True, **sparsity, **settings
    )
    with torch.no_grad():
        linear.lora_B.normal_(generator=torch.Generator().manual_seed(4))
    return nn.Sequential(linear)


def passes(model: nn.Module, autocast: bool = False, recompute: bool = False) -> Iterator[Tensor]:
    """Yields the output and all gradients of two micro-batches."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        dtype = model[0].lora_A.dtype
        x = torch.randn(ROWS, 48, generator=generator).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
        yield from (y, x.grad, *(parameter.grad.clone() for parameter in model.parameters()))


def equal(left: Iterator[Tensor], right: Iterator[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("path", ["materialised", "factored"])
def test_cached_positions_change_no_bit(path, dtype):
    model = layer(path=path, dtype=dtype)
    cached = copy.deepcopy(model)
    cache_positions(cached)
    assert torch.equal(cached[0].support.stored, model[0].support.flat_indices().int())
    assert equal(passes(model), passes(cached))


@pytest.mark.parametrize("variant", ["plain", "autocast", "recompute", "train_scaling", "bfloat16"])
@pytest.mark.parametrize("support", ["uniform", "block", "none"])
def test_cached_weights_change_no_bit(support, variant):
    settings = {"trainable_scaling": variant == "train_scaling"}
    model = layer(support, dtype=torch.bfloat16 if variant == "bfloat16" else torch.float32, **settings)
    cached = copy.deepcopy(model)
    cache = WeightCache(cached, ROWS)
    # Under autocast a cached W is rounded once, a built one after its factors.
    with cache.filled():
        ours = list(passes(cached, variant == "autocast", variant == "recompute"))
    theirs = list(passes(model, variant == "autocast", variant == "recompute"))
    if variant == "autocast":
        for left, right in zip(theirs, ours, strict=True):
            torch.testing.assert_close(left.float(), right.float(), rtol=0.02, atol=0.02 * left.detach().abs().max().item())
    else:
        assert equal(theirs, ours)


def test_a_cached_weight_is_what_the_passes_use():
    """A weight that is changed inside the block shows in the output and in x's gradient."""
    model = layer()
    plain = list(passes(copy.deepcopy(model)))
    cache = WeightCache(model, ROWS)
    with cache.filled():
        model[0].cached_weight.mul_(2)
        doubled = list(passes(model))
    bias = model[0].bias
    torch.testing.assert_close(doubled[0] - bias, 2 * (plain[0] - bias))
    torch.testing.assert_close(doubled[1], 2 * plain[1])


def test_large_cached_weights_change_no_bit():
    """Passes build a W of more than 4 MiB in memory that they use again, by another call of the library."""
    linear = SparseLowRankLinear(1100, 1024, 8, 0.02, path="materialised", seed=1)
    model, cached = nn.Sequential(linear), nn.Sequential(copy.deepcopy(linear))
    x = torch.randn(3, 1100)
    with WeightCache(cached, 3).filled():
        ours = cached(x)
        ours.sum().backward()
    theirs = model(x)
    theirs.sum().backward()
    assert torch.equal(ours, theirs)
    assert torch.equal(cached[0].lora_A.grad, linear.lora_A.grad)


def test_adapters_beside_a_dense_weight_are_left_alone():
    model = nn.Sequential(AdaptedLinear(nn.Linear(48, 36), 4, 0.1, path="materialised", seed=1))
    assert WeightCache(model, ROWS).layers == []


def test_weights_are_held_inside_the_block_only_even_if_it_fails():
    model = layer()

    def fail_inside() -> None:
        with WeightCache(model, ROWS).filled():
            assert model[0].cached_weight is not None
            raise OSError("inside")

    with pytest.raises(OSError, match="inside"):
        fail_inside()
    assert model[0].cached_weight is None


def test_linears_on_the_factored_path_build_no_weight():
    assert WeightCache(layer(path="factored"), ROWS).layers == []
    # 5 (48 + 36) of 48 x 36 multiplications: factors alone are cheaper for many rows; W is never built for S in a dense matrix.
    assert WeightCache(layer("none", path="auto"), 10_000).layers == []
    assert len(WeightCache(layer(path="auto"), 10_000).layers) == 1


def test_higher_derivatives_do_not_take_a_cached_weight_for_a_constant():
    model = layer(dtype=torch.float64)

    def of_B() -> Tensor:
        x = torch.randn(ROWS, 48, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()
        (grad_x,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (grad_B,) = torch.autograd.grad(grad_x.square().sum(), model[0].lora_B)
        return grad_B

    expected = of_B()
    with WeightCache(model, ROWS).filled():
        torch.testing.assert_close(of_B(), expected)


def test_drawing_placing_and_loading_drop_cached_positions():
    model, other = layer(), layer()
    other[0].reset_parameters(9, "")
    cache_positions(model)
    state = model.state_dict()
    assert not any("decoded" in name or "cached" in name for name in state)
    support = model[0].support
    support.draw_(torch.Generator().manual_seed(7))
    assert torch.equal(support.stored, support.code)
    cache_positions(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(support.flat_indices(), other[0].support.flat_indices())
    cache_positions(model)
    first = torch.arange(support.nnz)
    support.place_(first)
    assert torch.equal(support.flat_indices(), first)


@pytest.mark.parametrize("kept", ["positions", "weights"])
def test_compiled_layers_use_what_is_cached(kept):
    """Code that was compiled without a cache; a doubled cached weight, or moved positions, show in the output."""
    model = layer()
    compiled = copy.deepcopy(model)
    compiled[0].forward = torch.compile(compiled[0].forward, backend="aot_eager")
    list(passes(compiled))
    for changed in (False, True):
        model.zero_grad()
        compiled.zero_grad()
        if kept == "positions":
            cache_positions(compiled)
        with WeightCache(compiled, ROWS).filled() if kept == "weights" else nullcontext():
            if changed and kept == "positions":
                compiled[0].support.decoded.copy_(torch.arange(compiled[0].support.nnz))
            elif changed:
                compiled[0].cached_weight.mul_(2)
            assert equal(passes(model), passes(compiled)) != changed


def test_weights_of_the_next_update_are_not_compiled_again():
    counter = CompileCounterWithBackend("aot_eager")
    model = layer()
    compiled, cache = torch.compile(model, backend=counter), WeightCache(model, ROWS)
    counts = []
    for _ in range(3):
        with cache.filled():
            compiled(torch.randn(ROWS, 48)).sum().backward()
        with torch.no_grad():
            compiled(torch.randn(ROWS, 48))
        counts.append(counter.frame_count)
    assert counts == [2, 2, 2]  # with and without gradients
