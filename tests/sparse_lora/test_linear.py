"""SparseLowRankLinear: parameters, initial values, seeds, devices and invalid arguments."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lora import SparseLowRankLinear, dense_reference, generator_for


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    assert module.state_dict().keys() == expected.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


def test_parameters_have_the_published_names_and_shapes() -> None:
    """Names are those of published checkpoints, which can be imported; there are int(sparsity * out * in) values."""
    layer = SparseLowRankLinear(10, 7, 3, 0.25, bias=True, trainable_scaling=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    nnz = int(0.25 * 7 * 10)
    assert shapes == {"lora_A": (3, 10), "lora_B": (7, 3), "sparse_value": (nnz,), "scaling": (1,), "bias": (7,)}
    assert layer.support is not None
    assert layer.support.nnz == nnz
    plain = SparseLowRankLinear(10, 7, 3, 0.25)
    assert [name for name, _ in plain.named_parameters()] == ["lora_A", "lora_B", "sparse_value"]
    low_rank = SparseLowRankLinear(10, 7, 3, 0.0)
    assert [name for name, _ in low_rank.named_parameters()] == ["lora_A", "lora_B"]
    assert low_rank.support is None


def test_forward_scales_by_alpha_over_rank_or_by_tanh() -> None:
    x = torch.randn(5, 10, dtype=torch.float64)
    for trainable, scaling in ((False, 8.0 / 3), (True, math.tanh(0.7))):
        layer = SparseLowRankLinear(10, 7, 3, 0.25, alpha=8.0, bias=True, trainable_scaling=trainable, dtype=torch.float64)
        nn.init.normal_(layer.lora_B)
        if layer.scaling is not None:
            nn.init.constant_(layer.scaling, 0.7)
        expected = dense_reference(x, layer.lora_A, layer.lora_B, layer.sparse_value, layer.support, scaling, layer.bias)
        assert torch.allclose(layer(x), expected, rtol=1e-12)


def test_dense_weight_is_what_forward_multiplies_by() -> None:
    """They are bit-identical, and autocast does not change dense_weight."""
    layer = SparseLowRankLinear(30, 20, 3, 0.1, seed=0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(100, 30)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dense_weight()))
    expected = layer.dense_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.dense_weight(), expected)


def standard_deviations(found: float, expected: float, num_draws: int) -> float:
    """Returns the distance of an empirical variance from the expected one in standard errors (at most sqrt(2 / n) of it)."""
    return abs(found / expected - 1) / math.sqrt(2 / num_draws)


def test_initial_values_are_the_published_ones() -> None:
    """A and values ~ U(-1/sqrt(in), 1/sqrt(in)), variance 1 / (3 in); bias the same in out; B = 0; scaling 1."""
    layer = SparseLowRankLinear(100, 4000, 64, 0.03, bias=True, trainable_scaling=True, seed=5)
    for values, fan in ((layer.lora_A, 100), (layer.sparse_value, 100), (layer.bias, 4000)):
        assert values is not None
        assert values.abs().max().item() <= 1 / math.sqrt(fan)
        assert standard_deviations(values.var().item(), 1 / (3 * fan), values.numel()) < 5
        assert abs(values.mean().item()) < 5 / math.sqrt(3 * fan * values.numel())
    assert not layer.lora_B.any()
    assert layer.scaling is not None
    assert layer.scaling.tolist() == [1.0]


@pytest.mark.parametrize("trainable_scaling", [False, True])
@pytest.mark.parametrize("rank", [4, 64])
def test_low_rank_only_starts_with_the_variance_of_a_sparse_part(rank: int, trainable_scaling: bool) -> None:
    """scaling B A has variance .03 / (3 in) for any rank and alpha, as S with delta = .03, and A has a gradient at once."""
    layer = SparseLowRankLinear(300, 500, rank, 0.0, alpha=7.0, trainable_scaling=trainable_scaling, seed=2)
    weight = layer.dense_weight()
    # The entries share rows of B and A: about rank * (in + out) / 2 independent draws.
    assert standard_deviations(weight.var().item(), 0.03 / (3 * 300), rank * 400) < 5
    sparse = SparseLowRankLinear(300, 500, rank, 0.03, seed=2).dense_weight()
    assert standard_deviations(sparse.var().item(), 0.03 / (3 * 300), 0.03 * 300 * 500) < 5
    layer(torch.randn(4, 300)).square().sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.any()


def test_a_layer_depends_on_seed_and_name_only() -> None:
    """Layers built before, the default generator, other options and copying make no difference."""
    first = SparseLowRankLinear(20, 30, 4, 0.1, seed=3)
    torch.manual_seed(99)
    SparseLowRankLinear(20, 30, 4, 0.1)
    second = SparseLowRankLinear(20, 30, 4, 0.1, seed=3)
    assert_equal_state(second, state(first))
    with_bias = SparseLowRankLinear(20, 30, 4, 0.1, bias=True, trainable_scaling=True, seed=3)
    assert all(torch.equal(with_bias.state_dict()[name], value) for name, value in state(first).items())
    first.reset_parameters(3, "layers.0.mlp")
    assert not torch.equal(first.lora_A, second.lora_A)
    assert_equal_state(copy.deepcopy(first), state(first))


def test_each_tensor_has_its_own_random_stream() -> None:
    """A and the sparse values, with equal number and bound, differ; so do values of another name or seed."""
    layer = SparseLowRankLinear(20, 40, 4, 0.1, seed=0)
    assert layer.sparse_value is not None
    assert layer.lora_A.numel() == layer.sparse_value.numel()
    assert not torch.equal(layer.lora_A.flatten(), layer.sparse_value)
    streams = {tuple(layer.lora_A.flatten().tolist())}
    for seed, name in ((0, "a"), (0, "b"), (1, "a")):
        layer.reset_parameters(seed, name)
        streams.add(tuple(layer.lora_A.flatten().tolist()))
    assert len(streams) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.0, 0.1])
def test_all_dtypes_start_from_the_same_values(dtype: torch.dtype, sparsity: float) -> None:
    options: dict[str, Any] = {"bias": True, "trainable_scaling": True, "seed": 3}
    reference = SparseLowRankLinear(20, 30, 4, sparsity, **options)
    layer = SparseLowRankLinear(20, 30, 4, sparsity, dtype=dtype, **options)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert_equal_state(layer, state(reference))


@pytest.mark.parametrize("sparsity", [0.0, 0.1])
def test_meta_then_to_empty_then_reset_equals_direct_construction(sparsity: float) -> None:
    expected = SparseLowRankLinear(20, 30, 4, sparsity, bias=True)
    expected.reset_parameters(11, "model.layers.0.mlp.up_proj")
    layer = SparseLowRankLinear(20, 30, 4, sparsity, bias=True, device="meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer(torch.empty(2, 20, device="meta")).shape == (2, 30)
    layer.to_empty(device="cpu")
    with torch.device("meta"):  # the default device must not matter
        layer.reset_parameters(11, "model.layers.0.mlp.up_proj")
    assert_equal_state(layer, state(expected))


def test_reset_keeps_the_storage() -> None:
    """Optimizers, DDP and compiled graphs keep references to the tensors."""
    layer = SparseLowRankLinear(20, 30, 4, 0.1, bias=True, seed=0)
    pointers = {name: value.data_ptr() for name, value in layer.state_dict().items()}
    layer.reset_parameters(1, "x")
    assert {name: value.data_ptr() for name, value in layer.state_dict().items()} == pointers
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in layer.parameters())


def test_without_a_seed_the_default_generator_decides() -> None:
    torch.manual_seed(1)
    first, second = (SparseLowRankLinear(20, 30, 4, 0.1) for _ in range(2))
    torch.manual_seed(1)
    again = SparseLowRankLinear(20, 30, 4, 0.1)
    assert_equal_state(again, state(first))
    assert not torch.equal(first.lora_A, second.lora_A)


def test_initial_values_come_from_the_generator_of_the_qualified_name() -> None:
    """Sharded ranks rely on it to draw the same values: float32 from the generator of (seed, name.parameter)."""
    layer = SparseLowRankLinear(20, 30, 4, 0.1)
    layer.reset_parameters(7, "model.q_proj")
    bound = 1 / math.sqrt(20)
    expected = torch.empty(4, 20).uniform_(-bound, bound, generator=generator_for(7, "model.q_proj.lora_A"))
    assert torch.equal(layer.lora_A, expected)
    assert all(torch.equal(dict(layer.named_parameters())[n], v) for n, v in layer.initial_values(7, "model.q_proj"))


def test_the_state_dict_contains_the_support() -> None:
    layer, other = (SparseLowRankLinear(20, 30, 4, 0.1, seed=seed) for seed in (0, 1))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dense_weight(), layer.dense_weight())


GOOD: dict[str, Any] = {"in_features": 10, "out_features": 20, "rank": 4, "sparsity": 0.1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rank": 0}, "rank is 0, but it must be a whole number of at least 1"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": True}, "rank is True"),
        ({"sparsity": -0.1}, "sparsity is -0.1, .* choose 0 .. 1"),
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"sparsity": math.nan}, "sparsity is nan"),
        ({"sparsity": "3%"}, "sparsity is '3%'"),
        ({"sparsity": 0.001}, "sparsity 0.001 of a 20 x 10 weight leaves no entry: use at least 0.005, or 0"),
        ({"alpha": 0.0}, "alpha is 0.0, but it must be a positive number"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"support": "random"}, "support is 'random', but it must be one of: uniform"),
        ({"in_features": 0}, "a weight of 20 x 0 has no entries"),
        ({"rank": 0, "sparsity": 2}, "rank is 0.*; sparsity is 2"),
    ],
)
def test_values_out_of_range_are_refused_by_name(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLowRankLinear(**(GOOD | bad))


@pytest.mark.parametrize("sparsity", [0, 1, 0.005])
def test_values_at_the_limits_work(sparsity: float) -> None:
    """S with no entries, all entries or one entry, and a rank above both sizes."""
    layer = SparseLowRankLinear(10, 20, 25, sparsity)
    layer(torch.randn(30, 10)).sum().backward()
    assert sum(p.numel() for p in layer.parameters()) == 25 * 30 + int(sparsity * 20 * 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_rows", [1, 200])
def test_a_gpu_starts_from_the_same_values_and_computes_the_same(num_rows: int) -> None:
    """The state is bit-identical; output and gradients in float64 equal those of the CPU up to rounding."""
    options: dict[str, Any] = {"bias": True, "trainable_scaling": True, "seed": 3, "dtype": torch.float64}
    on_cpu = SparseLowRankLinear(67, 45, 8, 0.1, **options)
    on_gpu = SparseLowRankLinear(67, 45, 8, 0.1, device="cuda", **options)
    assert_equal_state(on_gpu.cpu(), state(on_cpu))
    on_gpu.cuda()
    x = torch.randn(num_rows, 67, dtype=torch.float64)
    expected, found = on_cpu(x), on_gpu(x.cuda())
    assert torch.allclose(found.cpu(), expected, rtol=1e-10, atol=1e-12)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (name, a), (_, b) in zip(on_cpu.named_parameters(), on_gpu.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(b.grad.cpu(), a.grad, rtol=1e-10, atol=1e-12), name
