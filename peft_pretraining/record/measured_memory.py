"""Measures the memory of a run's tensors by class, to compare with the prediction of the memory account."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from peft_pretraining.distributed.parallel import local
from peft_pretraining.optim.updates import HasState
from sparse_lora import Support


def measured_bytes(model: nn.Module, optimizer: HasState) -> dict[str, int]:
    """Returns bytes of parameters, support, currently allocated gradients and optimizer states.

    Shared storage is counted once. Of sharded parameters this process's parts are counted.
    """
    parameters = [local(parameter.detach()) for parameter in model.parameters()]
    gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    supports = [buffer for module in model.modules() if isinstance(module, Support) for buffer in module.buffers()]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "parameters": _storage_bytes(parameters),
        "support": _storage_bytes(supports),
        "gradients": _storage_bytes(gradients),
        "optimizer": _storage_bytes(value for value in states if isinstance(value, torch.Tensor)),
    }


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    parts = [local(tensor) for tensor in tensors]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts if part.numel()}
    return sum(storages.values())


def comparison(predicted: Mapping[str, int], measured: Mapping[str, int], peak: int, device_type: str) -> dict[str, int]:
    """Returns predicted and measured bytes under the record's keys memory_<class>_predicted and memory_<class>_measured.

    On a GPU the measured peak is torch's allocations only, so the CUDA context ("runtime") is subtracted from the prediction.
    """
    row: dict[str, int] = {}
    for name in ("parameters", "support", "optimizer"):
        row |= {f"memory_{name}_predicted": predicted[name], f"memory_{name}_measured": measured[name]}
    not_measured = predicted["runtime"] if device_type == "cuda" else 0
    return row | {"memory_peak_predicted": predicted["peak"] - not_measured, "memory_peak_measured": peak}
