"""sparse_lowrank_linear compared with plain autograd on the dense weight: outputs, gradients, dtypes, invalid arguments."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_lora import Support, dense_reference, generator_for, sparse_lowrank_linear
from sparse_lora.block import BlockSupport
from sparse_lora.functional import PATHS
from sparse_lora.uniform import UniformSupport

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Support | None, float | Tensor, Tensor | None]

# Every kind of sparse part, for a 6 x 7 weight or larger; block sizes differ in both directions.
PARTS: dict[str, dict[str, int]] = {"none": {"nnz": 0}, "uniform": {"nnz": 9}, "block": {"blocks": 4}}
every_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
every_path = pytest.mark.parametrize("path", PATHS)


def make_arguments(
    leading: tuple[int, ...] = (5,),
    in_features: int = 7,
    out_features: int = 6,
    rank: int = 3,
    nnz: int = 9,
    *,
    blocks: int = 0,
    bias: bool = True,
    trainable_scaling: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Arguments:
    """Returns random arguments whose tensors require gradients, drawn in float64, so that all dtypes have the same values.

    The support has `blocks` blocks, or is uniform if blocks is 0, or None if nnz is 0 too.
    """
    generator = generator_for(seed, "arguments")

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    x, lora_A, lora_B = draw(*leading, in_features), draw(rank, in_features), draw(out_features, rank)
    support: Support | None = None
    if blocks:
        support = BlockSupport(out_features, in_features, blocks)
    elif nnz:
        support = UniformSupport(out_features, in_features, nnz)
        support.draw_(generator)
    scaling: float | Tensor = draw(1) if trainable_scaling else 0.25
    values = None if support is None else draw(support.nnz)
    return x, lora_A, lora_B, values, support, scaling, draw(out_features) if bias else None


def output_and_gradients(function: Callable[..., Tensor], arguments: Arguments) -> dict[str, Tensor]:
    """Returns the output and the gradients of a random linear form of it, by argument name; uses new leaves each time."""
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    output = function(*leaves)
    form = torch.randn(output.shape, dtype=torch.float64, generator=generator_for(0, "form")).to(output.dtype)
    (output * form).sum().backward()
    names = ("x", "lora_A", "lora_B", "sparse_value", "support", "scaling", "bias")
    result = {"output": output.detach()}
    result |= {name: leaf.grad for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)}
    return result


def relative_error(found: Tensor, expected: Tensor) -> float:
    norm = expected.double().norm().item()
    difference = (found.double() - expected.double()).norm().item()
    return difference / norm if norm else difference


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float, arguments: Arguments) -> None:
    """Compares tensors up to a relative error `relative` in the L2 norm.

    The scaling's gradient <dW A^T, B> = <dB, B> / scaling is a sum that may cancel, so its error is relative to the norms of its
    factors.
    """
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        if name != "scaling":
            assert relative_error(found[name], expected[name]) <= relative, name
            continue
        scaling = arguments[5]
        assert isinstance(scaling, Tensor)
        size = expected["lora_B"].double().norm() * arguments[2].double().norm() / scaling.double().abs()
        assert (found[name].double() - expected[name].double()).abs().item() <= relative * size.item(), name


def test_the_dense_reference_equals_the_formula_entry_by_entry() -> None:
    """Compared with y_to = sum_i x_ti (scaling * sum_r B_or A_ri + S_oi) + bias_o in plain loops."""
    arguments = make_arguments((2,), 3, 4, 2, nnz=5)
    x, A, B, values, support, scaling, bias = (
        argument.tolist() if isinstance(argument, Tensor) else argument for argument in arguments
    )
    S = dict(zip(arguments[4].flat_indices().tolist(), values, strict=True))
    expected = [
        [
            bias[o]
            + sum(x[t][i] * (scaling[0] * sum(B[o][r] * A[r][i] for r in range(2)) + S.get(o * 3 + i, 0.0)) for i in range(3))
            for o in range(4)
        ]
        for t in range(2)
    ]
    assert torch.allclose(dense_reference(*arguments), torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


sizes = st.integers(1, 19)


@settings(deadline=None, max_examples=400)
@given(
    leading=st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple),
    in_features=sizes,
    out_features=sizes,
    rank=st.integers(1, 21),
    density=st.floats(0, 1),
    block=st.booleans(),
    path=st.sampled_from(("auto", *PATHS)),
    bias=st.booleans(),
    trainable_scaling=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_float64_equals_the_dense_reference(
    leading: tuple[int, ...],
    in_features: int,
    out_features: int,
    rank: int,
    density: float,
    block: bool,
    path: str,
    bias: bool,
    trainable_scaling: bool,
    seed: int,
) -> None:
    """Output and every gradient, for any number of leading dimensions, odd sizes, one row, any rank, with and without
    S of either kind, bias and trained scaling, on both paths. 1e-11 is 5e4 times float64's rounding: it allows cancellation,
    but no wrong term."""
    nnz = int(density * in_features * out_features)
    blocks = 1 + int(density * (min(in_features, out_features) - 1)) if block else 0
    options: dict[str, Any] = {"blocks": blocks, "bias": bias, "trainable_scaling": trainable_scaling, "seed": seed}
    arguments = make_arguments(leading, in_features, out_features, rank, nnz, **options)
    expected = output_and_gradients(dense_reference, arguments)
    found = output_and_gradients(partial(sparse_lowrank_linear, path=path), arguments)
    assert_close(found, expected, 1e-11, arguments)


@every_part
@every_path
def test_derivatives_pass_gradcheck(part: dict[str, int], path: str) -> None:
    """Numerical differentiation agrees in every argument, for first and second derivatives."""
    x, lora_A, lora_B, values, support, scaling, bias = make_arguments((2,), **part)

    def function(*tensors: Tensor) -> Tensor:
        given_values = None if values is None else tensors[5]
        return sparse_lowrank_linear(*tensors[:3], given_values, support, tensors[3], tensors[4], path)

    tensors = [t for t in (x, lora_A, lora_B, scaling, bias, values) if isinstance(t, Tensor)]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@every_part
@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_differs_only_by_rounding(dtype: torch.dtype, part: dict[str, int], path: str) -> None:
    """At most four roundings lie between the inputs and a result (factor, product, sum with S, outer product), each at
    most eps / 2 of its operand; operands of similar size may double them. Compared with float64 on the same inputs."""
    arguments = make_arguments((40,), 37, 29, 5, dtype=dtype, **part)
    exact = tuple(a.detach().double() if isinstance(a, Tensor) else a for a in arguments)
    found = output_and_gradients(partial(sparse_lowrank_linear, path=path), arguments)
    assert {value.dtype for value in found.values()} == {dtype}
    assert_close(found, output_and_gradients(dense_reference, exact), 4 * torch.finfo(dtype).eps, exact)


@every_part
@every_path
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters_dtype(part: dict[str, int], path: str) -> None:
    """As with nn.Linear: bfloat16 output, float32 gradients, within bfloat16's rounding (see above) of the float64 result."""
    arguments = make_arguments((2, 20), 37, 29, 5, dtype=torch.float32, **part)
    exact = tuple(a.detach().double() if isinstance(a, Tensor) else a for a in arguments)

    def under_autocast(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sparse_lowrank_linear(*args, path=path)

    found = output_and_gradients(under_autocast, arguments)
    assert found.pop("output").dtype == torch.bfloat16
    assert {value.dtype for value in found.values()} == {torch.float32}
    expected = output_and_gradients(dense_reference, exact)
    del expected["output"]
    assert_close(found, expected, 4 * torch.finfo(torch.bfloat16).eps, exact)


def test_autocast_accepts_bfloat16_inputs() -> None:
    """Under autocast, bfloat16 activations with float32 parameters are accepted."""
    arguments = make_arguments(dtype=torch.float32)
    x = arguments[0].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sparse_lowrank_linear(x, *arguments[1:]).dtype == torch.bfloat16


def test_autocast_does_not_change_float64() -> None:
    arguments = make_arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = sparse_lowrank_linear(*arguments)
    assert torch.equal(output, sparse_lowrank_linear(*arguments))


@pytest.mark.parametrize("forward_autocast", [False, True])
def test_backward_uses_the_dtype_of_forward_inside_or_outside_autocast(forward_autocast: bool) -> None:
    arguments = make_arguments((40,), dtype=torch.float32)

    def gradients(backward_autocast: bool) -> list[Tensor]:
        wanted = [a for a in arguments if isinstance(a, Tensor)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward_autocast):
            loss = sparse_lowrank_linear(*arguments).float().square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_autocast):
            return list(torch.autograd.grad(loss, wanted))

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(inside, outside)


@every_path
@pytest.mark.parametrize("blocks", [0, 4], ids=["uniform", "block"])
def test_gradients_that_are_not_needed_are_none_and_change_no_others(blocks: int, path: str) -> None:
    arguments = make_arguments((5,), blocks=blocks)
    function = partial(sparse_lowrank_linear, path=path)
    expected = output_and_gradients(function, arguments)
    names = ("x", "lora_A", "lora_B", "sparse_value", "support", "scaling", "bias")
    for wanted in itertools.chain.from_iterable(itertools.combinations((0, 1, 2, 3, 5, 6), n) for n in (1, 2, 5)):
        leaves = [a.detach().clone().requires_grad_(i in wanted) if isinstance(a, Tensor) else a for i, a in enumerate(arguments)]
        output = function(*leaves)
        form = torch.randn(output.shape, dtype=torch.float64, generator=generator_for(0, "form"))
        (output * form).sum().backward()
        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            if isinstance(leaf, Tensor):
                assert (leaf.grad is not None) == (i in wanted)
                if leaf.grad is not None:
                    assert torch.allclose(leaf.grad, expected[name], rtol=1e-12, atol=1e-12), name


@every_part
@every_path
def test_activation_checkpointing_is_bit_identical(part: dict[str, int], path: str) -> None:
    arguments = make_arguments((40,), dtype=torch.float32, **part)
    function = partial(sparse_lowrank_linear, path=path)

    def checkpointed(*args: Tensor) -> Tensor:
        return checkpoint(function, *args, use_reentrant=False)

    expected = output_and_gradients(function, arguments)
    for name, value in output_and_gradients(checkpointed, arguments).items():
        assert torch.equal(value, expected[name]), name


@every_part
@every_path
@pytest.mark.parametrize("expanded", [False, True])
def test_strided_inputs_and_gradients_give_correct_gradients(part: dict[str, int], path: str, expanded: bool) -> None:
    """x and the incoming gradient may be transposed or expanded views."""
    x, *others = make_arguments((40, 3), **part)
    transposed = x.detach().transpose(0, 1).requires_grad_()

    def gradient(function: Callable[..., Tensor]) -> Tensor:
        output = function(transposed, *others).transpose(0, 1).reshape(-1)
        return torch.autograd.grad(output.sum() if expanded else output.cumsum(0).sum(), transposed)[0]

    found = gradient(partial(sparse_lowrank_linear, path=path))
    assert torch.allclose(found, gradient(dense_reference), rtol=1e-11, atol=1e-11)


@every_part
@every_path
def test_an_empty_batch_gives_zero_gradients(part: dict[str, int], path: str) -> None:
    arguments = make_arguments((0, 4), **part)
    result = output_and_gradients(partial(sparse_lowrank_linear, path=path), arguments)
    assert result.pop("output").shape == (0, 4, 6)
    assert all(not gradient.any() for gradient in result.values())


@every_path
@pytest.mark.parametrize("blocks", [0, 9], ids=["uniform", "block"])
def test_equal_inputs_give_bit_identical_results(blocks: int, path: str) -> None:
    """Scattering values into the weight is deterministic, because no position occurs twice."""
    arguments = make_arguments((64,), 96, 80, 8, nnz=900, blocks=blocks, dtype=torch.float32)
    first, second = (output_and_gradients(partial(sparse_lowrank_linear, path=path), arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_full_support_without_low_rank_part_is_an_ordinary_linear() -> None:
    """With every position in S and B = 0 the layer is x values^T."""
    x, lora_A, lora_B, values, support, _, bias = make_arguments((40,), nnz=42)
    found = sparse_lowrank_linear(x, lora_A, torch.zeros_like(lora_B), values, support, 1.0, bias)
    assert values is not None
    assert torch.allclose(found, F.linear(x, values.view(6, 7), bias), rtol=1e-12)


def replace_argument(position: int, value: object) -> Callable[[], Tensor]:
    arguments = list(make_arguments(dtype=torch.float32))
    arguments[position] = value
    return lambda: sparse_lowrank_linear(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(5, 8), r"x has shape \(5, 8\), but its last dimension must be in_features = 7"),
        (0, torch.zeros(()), r"in_features = 7"),
        (0, torch.zeros(5, 7, dtype=torch.float64), r"x is torch.float64 .* parameters are torch.float32.*autocast"),
        (2, torch.zeros(6, 4), r"lora_A is \(3, 7\) and lora_B \(6, 4\)"),
        (3, None, r"give both, or None for both"),
        (4, None, r"give both, or None for both"),
        (3, torch.zeros(8), r"sparse_value has shape \(8,\), but the support has 9 positions"),
        (4, UniformSupport(6, 8, 9), r"support is for a 6 x 8 weight, but this one is 6 x 7"),
        (4, UniformSupport(7, 6, 9), r"support is for a 7 x 6 weight, but this one is 6 x 7"),
        (5, torch.zeros(2), r"scaling has shape \(2,\)"),
        (6, torch.zeros(7), r"bias has shape \(7,\), but out_features is 6"),
    ],
)
def test_arguments_of_wrong_shape_are_refused_with_their_shapes(position: int, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace_argument(position, value)()


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"path is 'dense', but it must be one of: auto, materialised, factored"):
        sparse_lowrank_linear(*make_arguments(), path="dense")
