"""Section ceilings: what the card can do at most: copies, products, and the memory-bound steps of blocks, alone.

Shapes: T rows, k blocks. Operands are spread over more memory than the cache holds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.record import Options, Record
from gpu.timing import cache_bytes, pipelined_seconds, repeats_for, replayed_seconds

Operands = tuple[Tensor, ...]
Measure = Callable[..., Iterator[dict[str, Any]]]


def run(record: Record, options: Options) -> None:
    """Measures the section's steps."""
    device, tiny = torch.device(options.device), options.tiny
    seconds = 0.0 if tiny else 0.2
    measure = partial(measured, device=device, seconds=seconds)
    elements = 2**12 if tiny else 2**29
    record.step("copy", lambda: measure(lambda: (_empty(device, elements), _empty(device, elements)), _copy, 4 * elements))
    size = 64 if tiny else 8192
    square = partial(_random, device, (size, size))
    record.step(f"product {size}^3", lambda: measure(lambda: (square(), square()), torch.matmul, 0, 2 * size**3))
    T, width, outputs = (96, 64, 165) if tiny else (16384, 1024, 2736)
    for k, granule in ((33, 1), (32, 1), (20, 1), (32, 8), (32, 16)):
        name = f"outputs by block, k {k}, granules of {granule}"
        record.step(name, partial(_ordering, measure, device, T, max(1, outputs // (k * granule)), k, granule))
    for wide in (55, 56) if tiny else (5461, 5504):
        _wide_products(record, measure, device, T, 32 if tiny else 2048, wide)
    for rank in (8, 16) if tiny else (128, 256, 512):
        operands = partial(_operands, device, (T, width), (width, rank))
        record.step(f"thin product, {T} x {width} x {rank}", partial(measure, operands, torch.matmul, 0, 2 * T * width * rank))
    for k, rows, columns in ((33, 5, 2), (32, 5, 2)) if tiny else ((33, 82, 31), (32, 85, 32), (32, 88, 32), (20, 136, 51)):
        operands = partial(_operands, device, (k, T, columns), (k, columns, rows))
        flops, moved = 2 * k * T * rows * columns, 2 * k * T * (rows + columns)
        record.step(f"{k} products, {T} x {columns} x {rows}", partial(measure, operands, torch.bmm, moved, flops))


def measured(
    make: Callable[[], Operands],
    step: Callable[..., object],
    num_bytes: int,
    flops: int = 0,
    *,
    device: torch.device,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Yields the seconds of a step, as called and as a replayed graph, and its bytes and operations per second.

    make: returns the step's operands; called until they fill the cache several times.
    """
    first = make()
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    turns = [first, *(make() for _ in range(min(15, cache_bytes(device) // size)))]
    following = itertools.cycle(turns)

    def one() -> None:
        step(*next(following))

    def all_turns() -> None:
        for operands in turns:
            step(*operands)

    repeats = repeats_for(one, device, seconds)
    called = statistics.median(pipelined_seconds(one, device, repeats) for _ in range(3))
    yield {"seconds": called, "repeats": repeats, "operands": len(turns)}
    replayed = replayed_seconds(all_turns, device, max(1, repeats // len(turns))) / len(turns)
    yield {"seconds_replayed": replayed}
    yield {"bytes_per_second": num_bytes / replayed} if num_bytes else {}
    yield {"flops_per_second": flops / replayed} if flops else {}


def _ordering(measure: Measure, device: torch.device, T: int, rounds: int, k: int, granule: int) -> Any:
    """Measures the copy that makes each block's outputs neighbours, if a block owns `granule` of k * granule in a row."""
    operands = partial(_operands, device, (T, rounds * k * granule))

    def order(matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, (rounds, k, granule)).transpose(1, 2).contiguous()

    return measure(operands, order, 4 * T * rounds * k * granule)


def _wide_products(record: Record, measure: Measure, device: torch.device, T: int, width: int, outputs: int) -> None:
    """Measures forward product, input's and weight's gradient of a dense weight (outputs, width)."""
    flops = 2 * T * width * outputs
    steps: dict[str, tuple[tuple[int, int], tuple[int, int], Callable[[Tensor, Tensor], Tensor]]] = {
        "y": ((T, width), (outputs, width), lambda x, W: x @ W.t()),
        "dx": ((T, outputs), (outputs, width), torch.matmul),
        "dW": ((T, outputs), (T, width), lambda g, x: g.t() @ x),
    }
    for name, (left, right, step) in steps.items():
        operands = partial(_operands, device, left, right)
        record.step(f"{name} of {outputs} x {width}, {T} rows", partial(measure, operands, step, 0, flops))


def _operands(device: torch.device, *shapes: tuple[int, ...]) -> Operands:
    return tuple(_random(device, shape) for shape in shapes)


def _random(device: torch.device, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _empty(device: torch.device, elements: int) -> Tensor:
    return torch.zeros(elements, device=device, dtype=torch.bfloat16)


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)
