"""Optional Triton kernels for two products of a linear with a sparse part, used on a GPU where they were measured to be faster.

build_weight      W = scaled_B A + S in one pass: no second pass over memory for S, no atomics, one rounding.
gather_gradient   the entries of G^T x at S's positions, without writing G^T x.

Shapes: T rows, I in_features, O out_features, R rank, N positions. Accumulators are float32. The kernels have no gradients: call
them inside an autograd function or an operator. Tile sizes depend only on shapes and the GPU's model, never on timings, so that
resumed runs are bit-identical. The kernels themselves are in kernels_triton.py.
"""

import functools
import os
import subprocess
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .measured import RELATIVE_TIMES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# triton: the kernels wherever they run. torch: nowhere. auto: on GPUs for which `measured.RELATIVE_TIMES` has a time below 1.
CHOICES = ("auto", "triton", "torch")
_choice = "auto"

# Columns per block of the table `starts`, which has 4 bytes per block. Narrower blocks mean less work per tile, a larger table.
_WIDTH = 32
# Rows of tiles that are computed together.
_GROUP = 8
# Entries of a tile's row that are gathered at once; at a density of .05 nearly all rows of 128 columns have at most this many.
_GATHERED_AT_ONCE = 16
# For gather_gradient: the largest number of splits of the T rows, and the fewest rows in a split.
_MOST_SPLITS, _ROWS_PER_SPLIT = 8, 512

# Assumed, not measured: the speed of the kernel's products relative to cuBLAS, and the multiply-adds that an H100 makes in the
# time of moving one byte.
_RELATIVE_SPEED = 0.8
_PRODUCTS_PER_BYTE = 100


class Tile(NamedTuple):
    """Sizes of a kernel program: rows x columns of the weight, depth of one product, warps, and pipeline stages.

    rows, columns and depth are powers of two, at least 16.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Compiled for an H100 these spill at most 8 bytes per thread (gather_gradient, Triton 3.7); 128 x 256, and 128 x 128 with 4
# warps, spill 100 to 400.
LARGE_TILE = Tile(128, 128, 64, 8, 4)
SMALL_TILE = Tile(64, 64, 64, 4, 4)


def choose(choice: str) -> str:
    """Sets which kernels this process uses, one of CHOICES, and returns the choice of before.

    With auto, SPARSE_LORA_TRITON=1 or 0 in the environment decides. Raises ValueError for another name.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"kernels {choice!r}: must be one of {', '.join(CHOICES)}")
    before, _choice = _choice, choice
    return before


def may_be_used(choice: str) -> bool:
    """Tells whether this choice uses the kernels on some GPU."""
    return choice == "triton" or (choice == "auto" and any(time < 1 for time in RELATIVE_TIMES.values()))


def are_used(device: torch.device, dtype: torch.dtype) -> bool:
    """Tells whether linears use the kernels for tensors of `dtype` on `device`: they are wanted there, and available."""
    choice = _choice
    if choice == "auto":
        choice = {"1": "triton", "0": "torch"}.get(os.environ.get("SPARSE_LORA_TRITON", ""), "auto")
    if choice == "torch" or (choice == "auto" and device.type == "cuda" and not _measured_faster(device)):
        return False
    return is_available(device, dtype)


def _measured_faster(device: torch.device) -> bool:
    """Tells whether a measurement on a GPU of this compute capability found the kernels faster than plain PyTorch."""
    if not RELATIVE_TIMES:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return RELATIVE_TIMES.get(f"{major}.{minor}", 1.0) < 1


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Tells whether the kernels run for tensors of `dtype` on `device`.

    On a GPU: bfloat16 and float16 from compute capability 8.0, float32 if torch may use TF32 (exact float32 products are left to
    cuBLAS). The first call for a GPU compiles and runs a small trial in another process, and warns with the reason if it fails.
    On the CPU: if TRITON_INTERPRET=1 was set before Triton was imported (for tests; slow).
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and dtype in DTYPES:
        kernels = _triton_kernels()
        return kernels is not None and kernels.INTERPRETED
    if why_unavailable(device, dtype) is not None:
        return False
    return _works(torch.cuda.current_device() if device.index is None else device.index)


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why the kernels cannot run for these tensors, as far as that is known without a trial; None otherwise."""
    if device.type != "cuda":
        return f"they need a GPU, and the device is {device}"
    if dtype not in DTYPES or (dtype == torch.float32 and not _tf32_allowed()):
        return f"{dtype}: they take bfloat16, float16, and float32 if TF32 is allowed (--tf32)"
    if _triton_kernels() is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "they need a GPU of compute capability 8.0 or higher"
    return None


def build_weight(lora_A: Tensor, scaled_B: Tensor, values: Tensor, positions: Tensor, *, tile: Tile | None = None) -> Tensor:
    """Returns W = scaled_B A + S in lora_A's dtype, rounded once.

    Args:
        lora_A: (R, I).
        scaled_B: (O, R), in lora_A's dtype.
        values: (N,), in any of the kernels' dtypes.
        positions: (N,) int32 or int64, strictly increasing, row-major in (O, I), as uniform.decode returns them.
        tile: sizes; None chooses them by shape.

    Returns:
        (O, I).

    Raises:
        ValueError: a dtype is not supported, or tensors do not fit each other.
        RuntimeError: a tensor requires a gradient, or Triton is not installed.
    """
    _check({"lora_A": lora_A, "scaled_B": scaled_B, "values": values}, positions)
    (rank, in_features), out_features = lora_A.shape, scaled_B.shape[0]
    if scaled_B.shape[1] != rank or values.shape != positions.shape or scaled_B.dtype != lora_A.dtype:
        raise ValueError(
            f"lora_A {_describe(lora_A)}, scaled_B {_describe(scaled_B)}, values {_describe(values)} and positions "
            f"{_describe(positions)} must be (rank, in), (out, rank), (nnz,) and (nnz,), the first two of one dtype"
        )
    kernels, interpreted = _loaded_kernels()
    dtype, on_device = lora_A.dtype, _on(lora_A.device)
    if interpreted:
        lora_A, scaled_B, values = (_exact(t) for t in (lora_A, scaled_B, values))
    tile = tile or _tile_for(out_features, in_features, lora_A.device)
    tile = _for_dtype(tile, lora_A.dtype)
    width = min(_WIDTH, tile.columns)
    with on_device:
        starts = _block_starts(positions, out_features, in_features, width)
        lora_A, scaled_B = _with_wide_rows(lora_A), scaled_B.contiguous()
        weight = lora_A.new_empty(out_features, in_features)
        kernels.build_weight[(_num_tiles(out_features, in_features, tile),)](
            *(lora_A, scaled_B, values.contiguous(), positions, starts, weight),
            *(out_features, in_features, rank, lora_A.stride(0), scaled_B.stride(0), _cdiv(in_features, width)),
            **_constants(tile, width, lora_A.dtype),
        )
    return weight.to(dtype)


def gather_gradient(
    grad_output: Tensor,
    x: Tensor,
    positions: Tensor,
    *,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Returns the gradient of S's values: the entries of G^T x, (O, I), at the positions.

    With several splits, each handles a share of the T rows, and their float32 results, (splits, N), are added.

    Args:
        grad_output: G, (T, O).
        x: (T, I), in grad_output's dtype.
        positions: as in build_weight.
        dtype: the result's dtype; None for x's.
        tile, num_splits: None chooses them by shape.

    Returns:
        (N,).

    Raises:
        ValueError, RuntimeError: as build_weight.
    """
    _check({"grad_output": grad_output, "x": x}, positions)
    (num_rows, out_features), in_features = grad_output.shape, x.shape[1]
    if x.shape[0] != num_rows or x.dtype != grad_output.dtype:
        raise ValueError(
            f"grad_output {_describe(grad_output)} and x {_describe(x)} must be (rows, out) and (rows, in), of one dtype"
        )
    kernels, interpreted = _loaded_kernels()
    dtype, on_device = dtype or x.dtype, _on(x.device)
    if interpreted:
        grad_output, x = _exact(grad_output), _exact(x)
    tile = _for_dtype(tile or LARGE_TILE, x.dtype)
    width = min(_WIDTH, tile.columns)
    num_tiles = _num_tiles(out_features, in_features, tile)
    splits = num_splits or _splits_for(num_tiles, num_rows, _num_processors(x.device))
    with on_device:
        starts = _block_starts(positions, out_features, in_features, width)
        grad_output, x = _with_wide_rows(grad_output), _with_wide_rows(x)
        # Rounded once: by the kernel if there is one split, else after the splits' results are added.
        kind = dtype if splits == 1 and not interpreted else torch.float32
        gathered = torch.empty(splits, positions.numel(), dtype=kind, device=x.device)
        kernels.gather_gradient[(num_tiles, splits)](
            *(grad_output, x, positions, starts, gathered),
            *(num_rows, _cdiv(num_rows, splits), out_features, in_features),
            *(grad_output.stride(0), x.stride(0), positions.numel(), _cdiv(in_features, width)),
            **_constants(tile, width, x.dtype),
            AT_ONCE=min(_GATHERED_AT_ONCE, tile.columns),
        )
    return (gathered[0] if splits == 1 else gathered.sum(0)).to(dtype)


def pays_off(num_rows: int, in_features: int, out_features: int, rank: int) -> bool:
    """Tells whether gather_gradient plus factored products for A and B should be faster than one dense G^T x for all three.

    Compares multiply-adds: T I O at the kernel's speed plus 2 T R (I + O), against T I O + 2 R I O plus the time of writing G^T x
    once and reading it three times in 16 bits. The speeds are assumed; benchmarks/triton_kernels.py measures them.
    """
    dense = num_rows * in_features * out_features
    apart = dense / _RELATIVE_SPEED + 2 * num_rows * rank * (in_features + out_features)
    num_bytes = 2 * 4 * in_features * out_features
    return apart < dense + 2 * rank * in_features * out_features + num_bytes * _PRODUCTS_PER_BYTE


def scratch_bytes(out_features: int, in_features: int) -> int:
    """Returns the bytes that build_weight and gather_gradient need for the table `starts`."""
    return 4 * (out_features * _cdiv(in_features, _WIDTH) + 1)


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """Returns the module with the kernels; None if Triton is not installed."""
    try:
        import sparse_lora.kernels_triton as kernels
    except ImportError:
        return None
    return kernels


def _loaded_kernels() -> tuple[ModuleType, bool]:
    """Returns the module with the kernels, and whether Triton's interpreter runs them."""
    kernels = _triton_kernels()
    if kernels is None:
        raise RuntimeError("Triton is not installed: pip install triton, or check is_available first")
    return kernels, kernels.INTERPRETED


@functools.cache
def _works(index: int) -> bool:
    """Tells whether a trial on this GPU gives the right numbers; Triton also needs a C compiler and a recent driver."""
    device = torch.device("cuda", index)
    problem = _trial_problem(index)
    if problem:
        warnings.warn(f"Triton kernels are not used on {device}, PyTorch is used instead: {problem}", stacklevel=3)
    return problem is None


# The trial's program, and the seconds it may take: compiling takes a few, a kernel that hangs takes for ever.
_TRIAL = "import sys, torch; from sparse_lora import kernels; kernels.run_trial(torch.device('cuda', int(sys.argv[1])))"
_TRIAL_SECONDS = 300


def _trial_problem(index: int) -> str | None:
    """Runs the trial on GPU `index` in a process of its own; returns why it failed, or None.

    An illegal memory access makes the GPU unusable for the process in which it happens.
    """
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        trial = subprocess.run(
            [sys.executable, "-c", _TRIAL, str(index)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"a trial did not finish within {_TRIAL_SECONDS} s"
    except OSError as error:
        return f"a trial could not be started: {error}"
    if trial.returncode == 0:
        return None
    return (trial.stderr.strip().splitlines() or [f"a trial ended with exit code {trial.returncode}"])[-1][:200]


def run_trial(device: torch.device) -> None:
    """Runs both kernels on small matrices; exits with one line and code 1 if they fail or give wrong numbers."""
    try:
        problem = None if _trial_succeeds(device) else "a trial gave wrong numbers"
    # Compilers, assemblers and drivers may raise anything.
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    sys.exit(problem)


def _trial_succeeds(device: torch.device) -> bool:
    """Runs both kernels on integers that bfloat16 represents exactly: 3 x 5 tiles, every third entry in S."""
    with torch.no_grad():
        out_features, in_features, rank = 160, 290, 16
        numbers = torch.arange(out_features * in_features, dtype=torch.int32, device=device)
        matrix = (numbers % 3 - 1).view(out_features, in_features).to(torch.bfloat16)
        lora_A, scaled_B, positions = matrix[:rank], matrix[:, :rank].contiguous(), numbers[::3].contiguous()
        values = (positions % 7).to(torch.bfloat16)
        expected = scaled_B @ lora_A
        gathered = gather_gradient(scaled_B.t().contiguous(), lora_A, positions)
        if not torch.equal(gathered, expected.view(-1)[positions]):
            return False
        expected.view(-1)[positions] += values
        return torch.equal(build_weight(lora_A, scaled_B, values, positions, tile=SMALL_TILE), expected)


def _check(tensors: dict[str, Tensor], positions: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, but the kernels support float32, bfloat16 and float16 only")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} requires a gradient, which the kernels do not compute: call them under torch.no_grad()")
        if tensor.device != positions.device:
            raise ValueError(f"{name} is on {tensor.device} and positions on {positions.device}: move one of them")
    if positions.dtype not in (torch.int32, torch.int64) or not positions.is_contiguous():
        raise ValueError(f"positions are {_describe(positions)}: they must be contiguous, int32 or int64")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _block_starts(positions: Tensor, out_features: int, in_features: int, width: int) -> Tensor:
    """Returns the number of positions before each block of `width` columns of each row, (O * blocks + 1,) int32."""
    kernels, _ = _loaded_kernels()
    num_blocks, size = _cdiv(in_features, width), 256
    kind = torch.int32 if positions.numel() < 2**31 else torch.int64
    starts = torch.empty(out_features * num_blocks + 1, dtype=kind, device=positions.device)
    kernels.block_starts[(_cdiv(starts.numel(), size),)](
        *(positions, starts, positions.numel(), out_features, in_features, num_blocks), WIDTH=width, SIZE=size
    )
    return starts


def _with_wide_rows(matrix: Tensor) -> Tensor:
    """Returns the matrix with rows that start at multiples of 16 entries; copies it if necessary.

    Otherwise a GPU loads unaligned rows entry by entry.
    """
    num_columns = matrix.shape[1]
    stride = _cdiv(num_columns, 16) * 16
    if matrix.stride() == (stride, 1) and matrix.data_ptr() % 16 == 0:
        return matrix
    return F.pad(matrix, (0, stride - num_columns))[:, :num_columns]


def _exact(tensor: Tensor) -> Tensor:
    """Converts bfloat16 to float32 for the interpreter, whose bfloat16 products and roundings are wrong."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _tile_for(out_features: int, in_features: int, device: torch.device) -> Tile:
    """Returns large tiles, unless they leave more than half of the processors idle."""
    return LARGE_TILE if 2 * _num_tiles(out_features, in_features, LARGE_TILE) > _num_processors(device) else SMALL_TILE


def _for_dtype(tile: Tile, dtype: torch.dtype) -> Tile:
    """Halves the depth for four-byte entries, so that they take the same shared memory."""
    return tile._replace(depth=max(16, tile.depth // 2)) if dtype == torch.float32 else tile


def _splits_for(num_tiles: int, num_rows: int, num_processors: int) -> int:
    """Returns the number of row splits with the shortest total time, if each processor computes one tile at a time."""
    most = min(_MOST_SPLITS, max(1, num_rows // _ROWS_PER_SPLIT))
    return min(range(1, most + 1), key=lambda splits: (_cdiv(num_tiles * splits, num_processors) / splits, splits))


def _tf32_allowed() -> bool:
    # Reading allow_tf32 instead would raise after fp32_precision was set.
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _num_tiles(out_features: int, in_features: int, tile: Tile) -> int:
    return _cdiv(out_features, tile.rows) * _cdiv(in_features, tile.columns)


def _constants(tile: Tile, width: int, dtype: torch.dtype) -> dict[str, int | str]:
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": _GROUP,
        "WIDTH": width,
        "PRECISION": "tf32" if dtype == torch.float32 and _tf32_allowed() else "ieee",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Selects the tensors' GPU, because Triton starts kernels on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)
