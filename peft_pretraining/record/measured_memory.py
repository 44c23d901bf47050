"""What a run's tensors really take, by class: the measured side of the memory account."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from peft_pretraining.distributed.parallel import local
from peft_pretraining.optim import HasState
from sparse_lora import Support


def measured_bytes(model: nn.Module, optimizer: HasState) -> dict[str, int]:
    """Bytes of parameters, support, gradients (those alive now) and optimizer states; shared storage counts once.

    Of what FSDP2 shards, this process's parts.
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
    here = [local(tensor) for tensor in tensors]  # of sharded tensors this process's parts
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in here if t.numel()}
    return sum(storages.values())


def comparison(predicted: Mapping[str, int], measured: Mapping[str, int], peak: int, device_type: str) -> dict[str, int]:
    """Predicted beside measured bytes as keys of the record: memory_<class>_predicted, memory_<class>_measured.

    A GPU's peak is what torch has allocated, without the CUDA context that the account counts as "runtime".
    """
    row: dict[str, int] = {}
    for name in ("parameters", "support", "optimizer"):
        row |= {f"memory_{name}_predicted": predicted[name], f"memory_{name}_measured": measured[name]}
    outside = predicted["runtime"] if device_type == "cuda" else 0
    return row | {"memory_peak_predicted": predicted["peak"] - outside, "memory_peak_measured": peak}
