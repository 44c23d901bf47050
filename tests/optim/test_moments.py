"""Quantised moments are converted to float32, divided among other shards and quantised again."""

import pytest
import torch
from torch import nn

from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.state import plain_moments, set_moments_

# Complete blocks only; complete blocks and a rest; too small to be quantised.
SHAPES = [(64, 128), (67, 131), (9, 11)]
# The largest distance between neighbouring codes of bitsandbytes' and torchao's maps, relative to the block's largest value.
COARSEST = {"adam8bit": 0.02, "adamw4bit": 0.3}


def trained(name: str, parameter: nn.Parameter, updates: int):
    optimizer = build_optimizer(name, {"weight": parameter}, lr=1e-2, weight_decay=0.0)
    optimizer.prepare_states()
    generator = torch.Generator().manual_seed(5)
    for _ in range(updates):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer.state[parameter]


def relative_distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", COARSEST)
def test_dequantised_moments_approximate_those_of_plain_adam(name, shape):
    state = trained(name, nn.Parameter(torch.zeros(shape)), updates=1)
    generator = torch.Generator().manual_seed(5)
    gradient = torch.randn(shape, generator=generator).flatten()
    for found, expected in zip(plain_moments(state), (0.1 * gradient, 0.001 * gradient**2), strict=True):
        assert found.dtype == torch.float32
        assert relative_distance(found, expected) < COARSEST[name]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", COARSEST)
def test_moments_divided_and_quantised_again_change_by_their_rounding_only(name, shape):
    moments = plain_moments(trained(name, nn.Parameter(torch.zeros(shape)), updates=3))
    found = [[], []]
    middle = shape[0] // 2 + 3
    for rows in (range(middle), range(middle, shape[0])):
        part = [moment.view(shape)[rows.start : rows.stop].flatten() for moment in moments]
        state = trained(name, nn.Parameter(torch.zeros(len(rows), shape[1])), updates=0)
        set_moments_(state, part)
        for pieces, piece in zip(found, plain_moments(state), strict=True):
            pieces.append(piece)
    for pieces, expected in zip(found, moments, strict=True):
        assert relative_distance(torch.cat(pieces), expected) < (COARSEST[name] if expected.numel() >= 4096 else 1e-9)
