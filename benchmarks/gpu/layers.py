"""Section layers: single linears of every shape, support and path: pipelined and replayed times, launches, decoding.

The constants of `sparse_lora.functional.multiplications` come from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from layer import GPU_TOKENS, Passes, Shape, measure, shapes_of, variants

from gpu.record import Options, Record
from gpu.timing import device_seconds, kernels_of, repeats_for, replayed_seconds
from sparse_lora import SparseLowRankLinear

CONFIGS = ("350m", "1b", "60m", "7b")


def run(record: Record, options: Options) -> None:
    """Measures the section's steps."""
    device = torch.device(options.device)
    if options.tiny:
        shapes = {"tiny": [Shape(48, 32, 7, 4, 0.1, 24)]}
    else:
        shapes = {config: shapes_of(config, GPU_TOKENS) for config in CONFIGS}
    for config, of_config in shapes.items():
        for shape in of_config:
            name = f"{config} {shape.out_features} x {shape.in_features}"
            record.step(name, lambda s=shape: linear(s, device, options.tiny))


def linear(shape: Shape, device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Measures one shape; yields the row of benchmarks/layer.py, replayed times, launches, and times of building W."""
    steps, seconds = variants(shape, torch.bfloat16, device), 0.0 if tiny else 0.05
    yield measure(shape, steps, device, 2 if tiny else 3, seconds)
    yield {"launches": {_label(name): launches(step, device) for name, step in steps.items()}}
    built = {support: step.layer for (support, path), step in steps.items() if path == "materialised"}
    yield {"weights": {s: parts_of_weight(layer, device) for s, layer in built.items() if isinstance(layer, SparseLowRankLinear)}}
    yield {"replayed_seconds": {_label(name): _replayed(step, device, seconds) for name, step in steps.items()}}


def _label(name: tuple[str, str]) -> str:
    return " ".join(filter(None, name))


def _replayed(step: Passes, device: torch.device, seconds: float) -> float | str:
    """Returns the seconds of a replay, or why the passes cannot be recorded as a graph."""
    try:
        return replayed_seconds(step, device, repeats_for(step, device, seconds))
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]


def launches(step: Passes, device: torch.device) -> dict[str, int]:
    """Returns the numbers of kernels of the forward and of the backward pass, and of the host's waits in both."""
    step()
    forward, both = kernels_of(lambda: step.layer(step.x), device), kernels_of(step, device)
    return {"forward": forward.count, "backward": both.count - forward.count, "waits": both.waits}


@torch.no_grad()
def parts_of_weight(layer: SparseLowRankLinear, device: torch.device) -> dict[str, float]:
    """Returns the seconds of decoding the support's positions and of building W, each with a cold cache."""
    support = layer.support
    row = {"build_seconds": device_seconds(layer.dense_weight, device)}
    if support is not None and support.code is not None:
        row["decode_seconds"] = device_seconds(lambda: support.flat_indices(), device)
    return row
