"""Converts the quantised first and second moments in optimizer states to plain numbers and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peft_pretraining.config.optimizers import BNB_BLOCK_ELEMENTS, BNB_CODEBOOK_ENTRIES


def plain_moments(state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns [first, second] moment of one parameter's optimizer state, each flat; quantised moments become float32.

    Raises KeyError, ValueError or RuntimeError if the state's tensors do not fit together.
    """
    return [_dequantised(state, number) for number in (1, 2)]


def set_moments_(state: Mapping[str, torch.Tensor], moments: list[torch.Tensor]) -> None:
    """Writes flat moments into a state that the optimizer has created, quantising them if its layout does."""
    for number, values in zip((1, 2), moments, strict=True):
        _quantise_(state, number, values)


def _dequantised(state: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
    if f"state{number}" not in state:
        rest = state[f"moment{number}"].flatten()
        return torch.cat([_torchao(state, number).dequantize().float(), rest]) if f"codes{number}" in state else rest
    values = state[f"state{number}"].flatten()
    if values.dtype != torch.uint8:
        return values
    import bitsandbytes.functional as kernels

    scales, codes = state[f"absmax{number}"], state[f"qmap{number}"]
    if scales.numel() != -(-values.numel() // BNB_BLOCK_ELEMENTS) or codes.numel() != BNB_CODEBOOK_ENTRIES:
        raise ValueError(f"{values.numel()} codes do not fit {scales.numel()} scales and a code book of {codes.numel()} entries")
    plain: torch.Tensor = kernels.dequantize_blockwise(values, absmax=scales, code=codes, blocksize=BNB_BLOCK_ELEMENTS)
    return plain


def _quantise_(state: Mapping[str, torch.Tensor], number: int, values: torch.Tensor) -> None:
    if f"state{number}" not in state:
        rest = state[f"moment{number}"].view(-1)
        quantised = values.numel() - rest.numel()
        if quantised:
            _torchao(state, number).copy_(values[:quantised])
        rest.copy_(values[quantised:])
        return
    target = state[f"state{number}"].view(-1)
    if target.dtype != torch.uint8:
        target.copy_(values)
        return
    import bitsandbytes.functional as kernels

    codes, scales = kernels.quantize_blockwise(values.contiguous(), code=state[f"qmap{number}"], blocksize=BNB_BLOCK_ELEMENTS)
    target.copy_(codes.view(-1))
    state[f"absmax{number}"].copy_(scales.absmax)


def _torchao(state: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
    """Returns the quantised elements of a moment as torchao's tensor class; shares storage with the state."""
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    codes, scale, qmap = (state[f"{part}{number}"] for part in ("codes", "scale", "qmap"))
    moment: torch.Tensor
    if qmap.numel() == 256:
        moment = OptimState8bit(codes, scale, qmap, number == 1, dtype=torch.float32)
    else:
        moment = OptimState4bit(codes, scale, qmap, number == 1, (2 * codes.numel(),), dtype=torch.float32)
    return moment
