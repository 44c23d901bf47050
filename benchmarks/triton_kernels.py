"""Times the Triton kernels against plain PyTorch, per linear.

`python benchmarks/triton_kernels.py [350m 1b 7b] [--out FILE.json]`
Requires a GPU that supports the kernels; without one the exit code is 2. In bfloat16, the ways of computing a result are timed in
turns, round after round, in one process; the output is medians and quartiles in milliseconds. Results and ways:

weight      kernel        build_weight: W = B A + S in one kernel
            added         B A, then S is added at its positions (atomic additions)
            scattered     S is written into a zero matrix at its positions, then B A is added
gradients   kernel        gradients of A and B from factored products, gradient of the values by gather_gradient
            dense         dW = G^T x once, and all three gradients from it
values      kernel        gather_gradient only
            dense         dW = G^T x and the selection of its entries only

Positions are decoded before all of them; their time is "decoding". Each call is timed on the device, with a cold cache. Before
timing, the ways' results are compared; the exit code is 1 if they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu.timing import device_seconds
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.run.folder import versions
from sparse_lora import kernels
from sparse_lora.kernels import LARGE_TILE, SMALL_TILE, Tile
from sparse_lora.uniform import UniformSupport, decode, sample_positions

ROOT = Path(__file__).resolve().parent.parent
# size: (rank, delta)
SIZES = {"60m": (128, 0.03), "130m": (256, 0.03), "350m": (256, 0.03), "1b": (512, 0.03), "7b": (1024, 0.05)}
# Tiles that --tiles adds to the program's two.
OTHER_TILES = [Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 4, 4), Tile(128, 256, 64, 8, 3), Tile(128, 64, 64, 4, 4)]
# Largest permitted difference between two ways, relative to the norm: rounding dW to bfloat16 changes each entry by at most 2^-9
# of its size, and the factored products are rounded twice.
LARGEST_DIFFERENCE = 2.0**-6

Ways = dict[str, Callable[[], tuple[Tensor, ...]]]


class Case(NamedTuple):
    """A linear's shape (out, in), its rank and density, and the number of rows of x."""

    out_features: int
    in_features: int
    rank: int
    sparsity: float
    num_rows: int


class WaysDiffer(Exception):
    """Raised when two ways of computing a result differ by more than rounding."""


def cases(size: str, rows: list[int]) -> list[Case]:
    """Returns a case for each distinct linear of a model and each number of rows."""
    model, (rank, sparsity) = load_model_config(ROOT / "configs" / f"llama_{size}.json"), SIZES[size]
    hidden, wide = model.hidden_size, model.intermediate_size
    shapes = ((hidden, hidden), (wide, hidden), (hidden, wide))
    return [Case(*shape, rank, sparsity, num_rows) for num_rows in rows for shape in shapes]


def decoder(case: Case, device: torch.device) -> Callable[[], Tensor]:
    """Returns a function that decodes a support's stored positions, which every way needs first unless they are kept."""
    nnz = int(case.sparsity * case.out_features * case.in_features)
    support = UniformSupport(case.out_features, case.in_features, nnz)
    support.draw_(torch.Generator().manual_seed(0))
    code, numel = support.code.to(device), support.numel
    return lambda: decode(code, nnz, numel)


def ways_of(case: Case, device: torch.device, tiles: list[Tile]) -> dict[str, Ways]:
    """Returns for each result (weight, gradients, values) the ways of computing it, on random numbers."""
    out_features, in_features, rank, sparsity, num_rows = case
    generator = torch.Generator().manual_seed(0)
    numel = out_features * in_features
    positions = sample_positions(int(sparsity * numel), numel, generator).to(device)
    if numel <= 2**31:
        positions = positions.to(torch.int32)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    A, B, values = random(rank, in_features), random(out_features, rank), random(positions.numel())
    G, x = random(num_rows, out_features), random(num_rows, in_features)

    def added() -> tuple[Tensor]:
        weight = B @ A
        weight.view(-1).index_add_(0, positions, values)
        return (weight,)

    def scattered() -> tuple[Tensor]:
        sparse = torch.zeros(out_features, in_features, dtype=values.dtype, device=device)
        sparse.view(-1).scatter_(0, positions.long(), values)
        return (sparse.addmm_(B, A),)

    def dense_values() -> tuple[Tensor]:
        return ((G.t() @ x).view(-1).index_select(0, positions),)

    def dense() -> tuple[Tensor, ...]:
        grad_W = G.t() @ x
        return B.t() @ grad_W, grad_W @ A.t(), grad_W.view(-1).index_select(0, positions)

    def factored() -> tuple[Tensor, ...]:
        return (G @ B).t() @ x, G.t() @ (x @ A.t()), kernels.gather_gradient(G, x, positions)

    def built(tile: Tile | None = None) -> tuple[Tensor]:
        return (kernels.build_weight(A, B, values, positions, tile=tile),)

    def gathered(tile: Tile | None = None) -> tuple[Tensor]:
        return (kernels.gather_gradient(G, x, positions, tile=tile),)

    weight: Ways = {"kernel": built, "added": added, "scattered": scattered}
    alone: Ways = {"kernel": gathered, "dense": dense_values}
    for tile in tiles:
        name = "kernel {}x{}x{}, {} warps, {} stages".format(*tile)
        weight[name], alone[name] = partial(built, tile), partial(gathered, tile)
    return {"weight": weight, "gradients": {"kernel": factored, "dense": dense}, "values": alone}


def largest_difference(ways: Ways) -> float:
    """Returns the largest L2 distance of a way's result from the first way's, relative to its norm."""
    first, *others = (way() for way in ways.values())
    pairs = [(a, b) for other in others for a, b in zip(first, other, strict=True)]
    return max(float((a.float() - b.float()).norm() / a.float().norm().clamp(min=1e-30)) for a, b in pairs)


def quantiles(way: Callable[[], object], device: torch.device, num_rounds: int) -> dict[str, Any]:
    """Times a call `num_rounds` times; returns median and quartiles of the device's milliseconds."""
    return _summary([1e3 * device_seconds(way, device) for _ in range(num_rounds)])


def _summary(milliseconds: list[float]) -> dict[str, Any]:
    return {"median_ms": statistics.median(milliseconds), "quartiles_ms": statistics.quantiles(milliseconds, n=4)[::2]}


def measure(case: Case, device: torch.device, num_rounds: int, tiles: list[Tile]) -> dict:
    """Measures every way of a case; returns its row. Raises WaysDiffer."""
    chosen = kernels.pays_off(case.num_rows, case.in_features, case.out_features, case.rank)
    row: dict = {**case._asdict(), "pays_off": chosen, "positions": quantiles(decoder(case, device), device, num_rounds)}
    for result, ways in ways_of(case, device, tiles).items():
        difference = largest_difference(ways)
        if not difference <= LARGEST_DIFFERENCE:
            raise WaysDiffer(f"{result} of {case}: two ways differ by {difference:.2e} of the norm")
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(num_rounds):
            for name, way in ways.items():
                times[name].append(1e3 * device_seconds(way, device))
        row[result] = {name: _summary(each) for name, each in times.items()}
        row[result]["largest_difference"] = difference
    return row


def print_row(size: str, row: dict) -> None:
    """Prints a line per result: the kernel's time, and the other ways' relative to it."""
    shape = f"{size:<5}{row['out_features']:>6} x {row['in_features']:<6}{row['num_rows']:>6} rows"
    for result in ("weight", "gradients", "values"):
        timed = {name: times for name, times in row[result].items() if isinstance(times, dict)}
        kernel = timed["kernel"]["median_ms"]
        others = ", ".join(f"{name} {times['median_ms'] / kernel:.2f}" for name, times in timed.items() if name != "kernel")
        chosen = f" (pays off: {'yes' if row['pays_off'] else 'no'})" if result == "gradients" else ""
        print(f"{shape}  {result:<10}kernel {kernel:.3f} ms; times as long: {others}{chosen}", flush=True)
    print(f"{shape}  decoding  {row['positions']['median_ms']:.3f} ms", flush=True)


def main() -> int:
    """Measures and prints; returns exit code 2 without a GPU that supports the kernels, 1 if ways differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"models: {', '.join(SIZES)} (default: 350m, 1b and 7b)")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192], help="tokens (default: 2048 and 8192)")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each way (default: %(default)s)")
    parser.add_argument("--tiles", action="store_true", help="also time tiles that the program does not use")
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    own = parser.parse_args()
    unknown = [size for size in own.sizes if size not in SIZES]
    if unknown:
        parser.error(f"no such size: {', '.join(unknown)}; choose from {', '.join(SIZES)}")
    if own.rounds < 2 or min(own.rows) < 1:
        parser.error(f"--rounds {own.rounds} must be at least 2, and --rows {own.rows} at least 1")
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not kernels.is_available(device, torch.bfloat16):
        print(
            "benchmarks/triton_kernels.py needs Triton and a GPU with CUDA compute capability 8.0 or newer; found no such GPU",
            file=sys.stderr,
        )
        return 2
    rows = []
    try:
        for size in own.sizes or ["350m", "1b", "7b"]:
            for case in cases(size, own.rows):
                with torch.no_grad():
                    rows.append({"model": size, **measure(case, device, own.rounds, OTHER_TILES if own.tiles else [])})
                print_row(size, rows[-1])
    except WaysDiffer as error:
        print(error, file=sys.stderr)
        return 1
    figures = {
        "rounds": own.rounds,
        "tiles": {"large": LARGE_TILE, "small": SMALL_TILE},
        "rows": rows,
        "device": torch.cuda.get_device_name(device),
        "versions": {**versions(), "triton": metadata.version("triton")},
        "date": date.today().isoformat(),
    }
    if own.out is not None:
        own.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
