"""The Triton kernels compared with float64: in Triton's interpreter, in a separate process, and on a GPU if available."""

import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lora import SparseLowRankLinear, dense_reference, generator_for, kernels
from sparse_lora.kernels import LARGE_TILE, SMALL_TILE, Tile
from sparse_lora.uniform import UniformSupport, decode

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
Call = Callable[..., Any]

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "triton_kernels.py"
TINY_TILE = Tile(16, 32, 16, 4, 2)


def _execute(pickled: bytes) -> bytes:
    function, arguments, options = pickle.loads(pickled)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's, about its next version
        return pickle.dumps(function(*arguments, **options))


def _set(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _process(variables: dict[str, str]) -> ProcessPoolExecutor:
    """Starts a process with these variables: Triton reads TRITON_INTERPRET when it is imported, so this process is too late."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _set, (variables,))


def _calling(pool: ProcessPoolExecutor) -> Call:
    # Pickled here, so that no tensor travels as shared memory.
    return lambda function, *arguments, **options: pickle.loads(
        pool.submit(_execute, pickle.dumps((function, arguments, options))).result()
    )


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    """Returns call(function, *arguments, **options), which calls the function in a process with Triton's interpreter."""
    triton, numpy = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 5):
        pytest.skip("the interpreter of Triton 3.6 fails with NumPy 2.5 and newer")
    with _process({"TRITON_INTERPRET": "1"}) as pool:
        yield _calling(pool)


def _on_the_gpu(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    moved = [argument.cuda() if isinstance(argument, Tensor) else argument for argument in arguments]
    return function(*moved, **options).cpu()


@pytest.fixture(params=[pytest.param("interpreter", marks=needs_triton), pytest.param("cuda", marks=pytest.mark.gpu)])
def call(request: pytest.FixtureRequest) -> Call:
    """Returns call(function, *arguments, **options) for CPU tensors, which runs in the interpreter or on a GPU."""
    return request.getfixturevalue("interpreted") if request.param == "interpreter" else _on_the_gpu


def uniform(out_features: int, in_features: int, nnz: int) -> Tensor:
    support = UniformSupport(out_features, in_features, nnz)
    support.draw_(generator_for(0, "support"))
    return decode(support.code, nnz, support.numel)


def random(*shape: int, dtype: torch.dtype, name: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator_for(0, name)).to(dtype)


def assert_rounded_once(found: Tensor, exact: Tensor, magnitude: Tensor, num_terms: int) -> None:
    """Each entry's error is at most one rounding to its dtype plus that of a float32 sum of `num_terms` products, which is
    bounded by num_terms * 2^-23 * (sum of absolute values) for any order of summation."""
    assert found.dtype in kernels.DTYPES
    bound = exact.abs() * torch.finfo(found.dtype).eps / 2 + num_terms * 2.0**-23 * magnitude
    worst = ((found.double() - exact).abs() - bound).max().item() if found.numel() else 0.0
    assert worst <= 0, f"an entry is off by {worst:.2e} more than rounding"


def check_build_weight(
    call: Call, out_features: int, in_features: int, rank: int, positions: Tensor, dtype: torch.dtype, tile: Tile | None
) -> None:
    lora_A, scaled_B = (
        random(rank, in_features, dtype=dtype, name="A"),
        random(out_features, rank, dtype=dtype, name="B"),
    )
    # Much larger than B A, so that an entry that is rounded before S is added exceeds the bound.
    values = 8 * random(positions.numel(), dtype=dtype, name="values")
    found = call(kernels.build_weight, lora_A, scaled_B, values, positions, tile=tile)
    assert found.shape == (out_features, in_features)
    assert found.dtype == dtype
    exact, magnitude = scaled_B.double() @ lora_A.double(), scaled_B.double().abs() @ lora_A.double().abs()
    exact.view(-1)[positions.long()] += values.double()
    magnitude.view(-1)[positions.long()] += values.double().abs()
    assert_rounded_once(found, exact, magnitude, rank + 1)


def check_gather_gradient(
    call: Call,
    out_features: int,
    in_features: int,
    num_rows: int,
    positions: Tensor,
    dtype: torch.dtype,
    tile: Tile | None,
    *,
    num_splits: int | None = None,
    result: torch.dtype | None = None,
) -> None:
    grad_output = random(num_rows, out_features, dtype=dtype, name="G")
    x = random(num_rows, in_features, dtype=dtype, name="x")
    found = call(kernels.gather_gradient, grad_output, x, positions, dtype=result, tile=tile, num_splits=num_splits)
    assert found.shape == positions.shape
    assert found.dtype == (result or dtype)
    exact = (grad_output.double().t() @ x.double()).view(-1)[positions.long()]
    magnitude = (grad_output.double().abs().t() @ x.double().abs()).view(-1)[positions.long()]
    assert_rounded_once(found, exact, magnitude, num_rows + (num_splits or 1))


# (out, in, rank or rows): tiles and blocks end at, before and after the edge; fewer columns than a block; all sizes 1.
SHAPES = [(67, 45, 5), (32, 64, 16), (33, 129, 33), (130, 17, 1), (1, 200, 7), (1, 1, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
every_dtype = pytest.mark.parametrize("dtype", kernels.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@every_shape
@every_dtype
def test_a_weight_of_any_shape_equals_float64_rounded_once(call: Call, shape: tuple[int, int, int], dtype) -> None:
    out_features, in_features, rank = shape
    positions = uniform(out_features, in_features, out_features * in_features // 5)
    check_build_weight(call, out_features, in_features, rank, positions, dtype, TINY_TILE)


@every_shape
@every_dtype
def test_a_gradient_of_any_shape_equals_float64_rounded_once(call: Call, shape: tuple[int, int, int], dtype) -> None:
    out_features, in_features, num_rows = shape
    positions = uniform(out_features, in_features, out_features * in_features // 5)
    check_gather_gradient(call, out_features, in_features, num_rows, positions, dtype, TINY_TILE)


def supports(out_features: int, in_features: int) -> dict[str, Tensor]:
    """Returns supports that no uniform draw gives, some with the most positions that a block can have."""
    index = torch.arange(out_features * in_features, dtype=torch.int32)
    row, column = index // in_features, index % in_features
    return {
        "none": index[:0],
        "all": index,
        "one row": index[row == 17],
        "last row": index[row == out_features - 1],
        "one column": index[column == in_features - 1],
        "first and last": index[[0, -1]],
        "edges of blocks": index[(column % 16 == 0) | (column % 16 == 15)],
        "one dense block": index[(row // 16 == 1) & (column // 32 == 1)],
    }


@pytest.mark.parametrize("name", supports(1, 1))
def test_unusual_supports_give_correct_results(call: Call, name: str) -> None:
    positions = supports(37, 75)[name]
    check_build_weight(call, 37, 75, 8, positions, torch.bfloat16, TINY_TILE)
    check_gather_gradient(call, 37, 75, 9, positions, torch.bfloat16, TINY_TILE)


@pytest.mark.parametrize("tile", [LARGE_TILE, SMALL_TILE, Tile(64, 16, 16, 4, 2), Tile(16, 64, 32, 4, 2)], ids=str)
def test_every_tile_gives_correct_results(call: Call, tile: Tile) -> None:
    """Blocks as wide as the tile, 16 columns, and several in a tile."""
    positions = uniform(139, 150, 3000).long()
    check_build_weight(call, 139, 150, 40, positions, torch.bfloat16, tile)
    check_gather_gradient(call, 139, 150, 40, positions, torch.bfloat16, tile)


def test_tiles_are_chosen_if_none_is_given(call: Call) -> None:
    positions = uniform(70, 150, 1000)
    check_build_weight(call, 70, 150, 20, positions, torch.float32, None)
    check_gather_gradient(call, 70, 150, 20, positions, torch.float32, None)


@pytest.mark.parametrize("num_splits", [2, 3, 8])
def test_a_gradient_summed_over_shares_of_the_rows_is_correct(call: Call, num_splits: int) -> None:
    """Including 8 shares of 9 rows, some of them empty, and a result in another dtype."""
    options: dict[str, Any] = {"num_splits": num_splits, "result": torch.float32}
    for num_rows in (9, 50):
        positions = uniform(40, 70, 300)
        check_gather_gradient(call, 40, 70, num_rows, positions, torch.bfloat16, TINY_TILE, **options)


def test_no_rows_give_a_zero_gradient(call: Call) -> None:
    positions = uniform(40, 70, 300)
    G, x = torch.empty(0, 40), torch.empty(0, 70)
    assert not call(kernels.gather_gradient, G, x, positions, tile=TINY_TILE).any()


def test_matrices_need_not_be_contiguous(call: Call) -> None:
    """A gradient that expand() made, transposed factors, a slice of wider rows."""
    positions, values = uniform(40, 70, 300), random(300, dtype=torch.float32, name="values")
    A, B, x = (random(*shape, dtype=torch.float32, name="m") for shape in ((70, 6), (6, 40), (50, 90)))
    G = torch.full((1, 1), 0.5).expand(50, 40)
    found = call(kernels.build_weight, A.t(), B.t(), values, positions, tile=TINY_TILE)
    contiguous = A.t().contiguous(), B.t().contiguous(), values, positions
    assert torch.equal(found, call(kernels.build_weight, *contiguous, tile=TINY_TILE))
    found = call(kernels.gather_gradient, G, x[:, 3:73], positions, tile=TINY_TILE)
    contiguous = G.contiguous(), x[:, 3:73].contiguous(), positions
    assert torch.equal(found, call(kernels.gather_gradient, *contiguous, tile=TINY_TILE))


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("nnz", [0, 1, 100, 67 * 45])
def test_the_table_of_block_starts_equals_a_binary_search(call: Call, width: int, nnz: int) -> None:
    positions = uniform(67, 45, nnz)
    blocks = -(-45 // width)
    bounds = torch.arange(67)[:, None] * 45 + torch.arange(blocks)[None, :] * width
    expected = torch.searchsorted(positions.long(), torch.cat((bounds.view(-1), torch.tensor([67 * 45]))))
    assert torch.equal(call(kernels._block_starts, positions, 67, 45, width).long(), expected)
    assert kernels.scratch_bytes(67, 45) == 4 * (67 * 2 + 1)


def _operator_and_compiled(lora_A: Tensor, scaled_B: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    def build(lora_A: Tensor, scaled_B: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        return kernels.build_weight(lora_A, scaled_B, values, positions, tile=TINY_TILE)

    operator = torch.library.custom_op("test_kernels::build", build, mutates_args=())
    operator.register_fake(lambda A, B, values, positions: A.new_empty(B.shape[0], A.shape[1]))

    def twice(*arguments: Tensor) -> Tensor:
        return 2 * operator(*arguments)

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    arguments = (lora_A, scaled_B, values, positions)
    return twice(*arguments), compiled(*arguments)


@needs_triton
def test_a_compiled_graph_runs_the_kernel_inside_an_operator(interpreted: Call) -> None:
    A, B = (random(*shape, dtype=torch.float32, name="m") for shape in ((6, 70), (40, 6)))
    eager, compiled = interpreted(_operator_and_compiled, A, B, A.view(-1)[:300], uniform(40, 70, 300))
    assert torch.equal(eager, compiled)


def _forward_and_backward(path: str, num_rows: int) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Returns the layer's output and gradients, those of the dense reference, and the names of the kernels that ran."""
    ran: list[str] = []

    def watched(name: str) -> Call:
        original = getattr(kernels, name)
        return lambda *arguments, **options: ran.append(name) or original(*arguments, **options)

    kernels.build_weight, kernels.gather_gradient = watched("build_weight"), watched("gather_gradient")
    layer = SparseLowRankLinear(70, 40, 6, 0.1, seed=0, path=path)
    with torch.enable_grad():
        torch.nn.init.normal_(layer.lora_B, generator=generator_for(0, "B"))
        x = random(num_rows, 70, dtype=torch.float32, name="x").requires_grad_()
        wanted = (x, *layer.parameters())
        y = layer(x)
        found = [y, *torch.autograd.grad(y.square().sum(), wanted)]
        y = dense_reference(x, layer.lora_A, layer.lora_B, layer.sparse_value, layer.support, layer.effective_scaling())
        expected = [y, *torch.autograd.grad(y.square().sum(), wanted)]
    return [t.detach() for t in found], [t.detach() for t in expected], ran


@needs_triton
@pytest.mark.parametrize(
    ("path", "num_rows", "kernels_run"),
    [
        ("materialised", 20_000, ["build_weight", "build_weight"]),
        ("materialised", 30, ["build_weight", "build_weight", "gather_gradient"]),
        ("factored", 30, ["gather_gradient"]),
    ],
)
def test_the_layer_runs_the_kernels_that_pay_off(interpreted: Call, path: str, num_rows: int, kernels_run: list[str]) -> None:
    """W is built by the kernel in forward and backward; for few rows the values' gradient is gathered without dW."""
    found, expected, ran = interpreted(_forward_and_backward, path, num_rows)
    assert ran == kernels_run
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


GOOD = {
    "lora_A": torch.ones(2, 4),
    "scaled_B": torch.ones(3, 2),
    "values": torch.ones(3),
    "positions": torch.arange(3, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (
            {"lora_A": torch.ones(2, 4, dtype=torch.float64)},
            ValueError,
            "lora_A is torch.float64, but the kernels support",
        ),
        ({"scaled_B": torch.ones(3, 5)}, ValueError, r"scaled_B \(3, 5\) float32"),
        ({"scaled_B": torch.ones(3, 2, dtype=torch.bfloat16)}, ValueError, "the first two of one dtype"),
        ({"values": torch.ones(2)}, ValueError, r"values \(2,\) float32 and positions \(3,\) int32 must be"),
        ({"values": torch.ones(3, device="meta")}, ValueError, "values is on meta and positions on cpu"),
        ({"positions": torch.arange(3.0)}, ValueError, r"positions are \(3,\) float32"),
        ({"positions": torch.arange(6, dtype=torch.int32)[::2]}, ValueError, "they must be contiguous"),
        ({"values": torch.ones(3, requires_grad=True)}, RuntimeError, "values requires a gradient"),
    ],
)
def test_unsupported_arguments_of_the_kernels_are_refused(bad: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernels.build_weight(**(GOOD | bad))


def test_rows_of_a_gradient_must_agree() -> None:
    with pytest.raises(ValueError, match=r"grad_output \(5, 3\) float32 and x \(6, 4\) float32"):
        kernels.gather_gradient(torch.ones(5, 3), torch.ones(6, 4), GOOD["positions"])


@needs_triton
def test_the_interpreter_is_available_only_if_requested(interpreted: Call, monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert [interpreted(kernels.is_available, cpu, dtype) for dtype in kernels.DTYPES] == [True] * 3
    assert not interpreted(kernels.is_available, cpu, torch.float64)
    assert not interpreted(kernels.is_available, torch.device("meta"), torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernels.is_available(cpu, torch.bfloat16)


def test_nothing_needs_triton(monkeypatch) -> None:
    """Without Triton the kernels are not available, and calling them raises an error that says why."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "sparse_lora.kernels_triton", None)
    kernels._triton_kernels.cache_clear()
    try:
        assert not kernels.is_available(torch.device("cpu"), torch.bfloat16)
        with pytest.raises(RuntimeError, match="Triton is not installed"):
            kernels.build_weight(**GOOD)
    finally:
        kernels._triton_kernels.cache_clear()


@needs_triton
def test_the_trial_of_a_gpu_succeeds_in_the_interpreter(interpreted: Call) -> None:
    assert interpreted(kernels._trial_succeeds, torch.device("cpu"))


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("pass", None),
        ("import sys; sys.exit('RuntimeError: no C compiler')", "RuntimeError: no C compiler"),
        ("import os; os.abort()", "a trial ended with exit code -6"),  # as a driver may, after an illegal memory access
    ],
)
def test_a_gpu_whose_trial_fails_gets_a_warning_and_no_kernels(monkeypatch, program: str, problem: str | None) -> None:
    """The trial is a process of its own: this one outlives an abort."""
    monkeypatch.setattr(kernels, "_triton_kernels", SimpleNamespace)
    monkeypatch.setattr(kernels, "_TRIAL", program)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert kernels._works.__wrapped__(0) is (problem is None)
    texts = [f"Triton kernels are not used on cuda:0, PyTorch is used instead: {problem}"] if problem else []
    assert [str(warning.message) for warning in shown] == texts


def test_a_trial_that_hangs_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_TRIAL", "import time; time.sleep(1000)")
    monkeypatch.setattr(kernels, "_TRIAL_SECONDS", 0.5)
    assert kernels._trial_problem(0) == "a trial did not finish within 0.5 s"


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_trial_runs_from_any_folder_and_reports_a_missing_gpu_in_one_line(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = kernels._trial_problem(0)
    assert problem is not None
    assert re.match(r"\w+(Error|Exception): ", problem), problem
    assert not problem.startswith("ModuleNotFoundError")


@pytest.mark.parametrize(
    ("choice", "variable", "measured", "used"),
    [
        ("auto", None, {}, False),
        ("auto", None, {"9.0": 0.9}, True),
        ("auto", None, {"9.0": 1.1, "8.0": 0.5}, False),
        ("auto", "1", {}, True),
        ("auto", "0", {"9.0": 0.9}, False),
        ("torch", "1", {"9.0": 0.9}, False),
        ("triton", "0", {}, True),
    ],
)
def test_a_gpu_uses_the_kernels_if_asked_or_if_they_were_measured_to_be_faster(
    monkeypatch, choice: str, variable: str | None, measured: dict[str, float], used: bool
) -> None:
    monkeypatch.setattr(kernels, "_choice", "auto")
    monkeypatch.setattr(kernels, "RELATIVE_TIMES", measured)
    monkeypatch.setattr(kernels, "is_available", lambda device, dtype: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("SPARSE_LORA_TRITON", raising=False)
    if variable is not None:
        monkeypatch.setenv("SPARSE_LORA_TRITON", variable)
    kernels.choose(choice)
    assert kernels.are_used(torch.device("cuda", 0), torch.bfloat16) is used


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels 'cuda': must be one of auto, triton, torch"):
        kernels.choose("cuda")


@pytest.mark.gpu
def test_a_gpu_has_the_kernels() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert kernels.is_available(torch.device("cuda"), torch.bfloat16)


@pytest.mark.gpu
def test_positions_beyond_32_bits_on_a_gpu() -> None:
    """65,537 x 32,800 entries are more than 2^31: the last row's offsets and positions need 64 bits."""
    out_features, in_features = 65_537, 32_800
    numel = out_features * in_features
    positions = torch.tensor([0, 5, 2**31 - 1, 2**31, numel - in_features, numel - 1], device="cuda")
    values = torch.arange(1, 7, dtype=torch.bfloat16, device="cuda")
    A, B = (torch.ones(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((16, in_features), (out_features, 16)))
    weight = kernels.build_weight(A, B, values, positions).view(-1)
    assert torch.equal(weight[positions], values + 16)
    assert (weight != 16).sum() == 6
    G, x = B.t().contiguous(), A
    x[:, -1] = 2
    found = kernels.gather_gradient(G, x, positions).tolist()
    assert found == [16, 16, 32 if 2**31 % in_features == 0 else 16, 16, 16, 32]


def test_shares_fill_the_processors() -> None:
    """176 tiles on 132 processors take 2 rounds; divided into 3 shares each, they take 4 rounds of a third."""
    assert kernels._splits_for(176, 32_768, 132) == 3
    assert kernels._splits_for(176, 600, 132) == 1
    assert kernels._splits_for(132, 32_768, 132) == 1
    assert kernels._splits_for(16, 32_768, 132) == 8


def test_gathering_pays_off_for_few_rows_only() -> None:
    """For 4096 x 11008 at rank 1024, up to the number of rows at which the terms in pays_off's docstring are equal."""
    sizes = (11008, 4096, 1024)
    gained = 2 * 1024 + 8 * kernels._PRODUCTS_PER_BYTE
    lost_per_row = 1 / kernels._RELATIVE_SPEED - 1 + 2 * 1024 * (1 / 4096 + 1 / 11008)
    crossing = gained / lost_per_row
    assert kernels.pays_off(int(crossing * 0.99), *sizes)
    assert not kernels.pays_off(int(crossing * 1.01), *sizes)


def _compiled_for_an_h100(kernel: str, tile: Tile, folder: Path) -> tuple[int, int]:
    """Compiles a kernel for sm_90; returns its bytes of stack (spilled registers) and of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparse_lora import kernels_triton

    function = getattr(kernels_triton, kernel)
    constants = {**kernels._constants(tile, kernels._WIDTH, torch.bfloat16), "AT_ONCE": kernels._GATHERED_AT_ONCE}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    types = {"positions": "*i32", "starts": "*i32", "gathered": "*fp32"}
    types |= dict.fromkeys(("lora_A", "scaled_B", "values", "weight", "grad_output", "x"), "*bf16")
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # Properties that Triton derives at a call: aligned pointers and strides.
    aligned = [name for name in names if name in types or name.startswith("stride_")]
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    used = subprocess.run([dump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert "wgmma.mma_async" in compiled.asm["ptx"], "the products do not run on the tensor cores"
    return int(re.search(r"STACK:(\d+)", used)[1]), compiled.metadata.shared


@needs_triton
def test_both_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """Compiling needs no GPU; the interpreter accepts code that the compiler rejects. Almost no registers spill."""
    with _process({"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}) as pool:
        for kernel in ("build_weight", "gather_gradient"):
            for tile in (LARGE_TILE, SMALL_TILE):
                spilled, shared = _calling(pool)(_compiled_for_an_h100, kernel, tile, tmp_path)
                assert spilled <= 16, (kernel, tile)
                assert shared <= 227 * 1024, (kernel, tile)


def _benchmark() -> Any:
    """Returns the module benchmarks/triton_kernels.py."""
    sys.path.insert(0, str(BENCHMARK.parent))
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _benchmarked() -> dict:
    """Returns the measurements of benchmarks/triton_kernels.py for a tiny linear, on the CPU."""
    module = _benchmark()
    found = module.measure(module.Case(70, 40, 8, 0.1, 33), torch.device("cpu"), 2, [SMALL_TILE])
    module.print_row("tiny", found)
    return found


@needs_triton
def test_the_kernel_benchmark_compares_and_times_every_way(interpreted: Call) -> None:
    """In the interpreter. The benchmark raises an error if two ways differ by more than rounding."""
    found = interpreted(_benchmarked)
    tried = "kernel 64x64x64, 4 warps, 4 stages"
    assert found["weight"].keys() == {"kernel", "added", "scattered", tried, "largest_difference"}
    assert found["gradients"].keys() == {"kernel", "dense", "largest_difference"}
    assert found["values"].keys() == {"kernel", "dense", tried, "largest_difference"}
    assert all(each["median_ms"] > 0 for each in found["values"].values() if isinstance(each, dict))


def test_a_measurement_is_recorded_for_its_family_of_gpus(tmp_path: Path) -> None:
    """W is built twice per update; the gradients take the kernel only where `pays_off` says so."""
    pays, loses = (
        {
            "pays_off": pays_off,
            "weight": {"kernel": {"median_ms": built}, "added": {"median_ms": 2.0}},
            "gradients": {"kernel": {"median_ms": 5.0}, "dense": {"median_ms": dense}},
        }
        for pays_off, built, dense in ((True, 1.0, 6.0), (False, 3.0, 4.0))
    )
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps({"capability": "9.0", "rows": [pays, loses]}))
    table = tmp_path / "measured.py"
    table.write_text('"""First line."""\n\n# Comment.\nRELATIVE_TIMES: dict[str, float] = {"8.0": 1.2}\n')
    benchmark = _benchmark()
    for _ in range(2):
        benchmark.record(file, table)
    expected = (2 * 1 + 5 + 2 * 3 + 4) / (2 * 2 + 6 + 2 * 2 + 4)
    assert table.read_text() == (
        f'"""First line."""\n\n# Comment.\nRELATIVE_TIMES: dict[str, float] = {{"8.0": 1.2, "9.0": {expected:.3f}}}\n'
    )


def test_the_program_s_table_can_be_recorded_to(tmp_path: Path) -> None:
    file, table = tmp_path / "kernels.json", tmp_path / "measured.py"
    row = {"pays_off": False, "weight": {"kernel": {"median_ms": 1}, "added": {"median_ms": 2}}}
    row["gradients"] = {"kernel": {"median_ms": 1}, "dense": {"median_ms": 2}}
    file.write_text(json.dumps({"capability": "12.0", "rows": [row]}))
    table.write_text(Path(kernels.__file__).with_name("measured.py").read_text())
    _benchmark().record(file, table)
    written: dict[str, Any] = {}
    exec(table.read_text(), written)
    assert written["RELATIVE_TIMES"] == kernels.RELATIVE_TIMES | {"12.0": round((2 * 1 + 2) / (2 * 2 + 2), 3)}


def test_the_kernel_benchmark_needs_a_gpu() -> None:
    command = [sys.executable, str(BENCHMARK)]
    ended = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "found no such GPU" in ended.stderr
