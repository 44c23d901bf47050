"""Saves and loads what fine-tuning trains beside a frozen model: adapters, classifier and supports in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from torch import nn

from peft_pretraining.config.files import lfs_reason
from sparse_lora import SLTrainConfig, reparameterize
from sparse_lora.adapted import adapter_state

ADAPTER_FILE = "sltrain_adapter.safetensors"
_CONFIG_KEY = "sltrain_config"


def save_adapter(model: nn.Module, config: SLTrainConfig, path: Path) -> None:
    """Writes the adapter file of a model that was reparameterised with `config`, whose base is frozen. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(model).items()}
    try:
        save_file(state, path, metadata={_CONFIG_KEY: json.dumps(asdict(config))})
    except SafetensorError as error:
        # Safetensors raises it when the disk is full.
        raise OSError(f"{path}: cannot be written ({error})") from None


def load_adapter(model: nn.Module, path: str | Path) -> SLTrainConfig:
    """Adds an adapter, in place, to the pretrained model that it was trained on; `sparse_lora.merge` then makes the model dense.

    Args:
        model: has the same class and number of labels as the model that was trained.

    Returns:
        The configuration of the adapters.

    Raises:
        ValueError: the file is not an adapter, or belongs to another model.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            config = SLTrainConfig(**json.loads((file.metadata() or {})[_CONFIG_KEY]))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {lfs_reason(path, f'not an adapter file ({error})')}") from None
    reparameterize(model, config)
    differing = set(state) ^ set(adapter_state(model))
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: belongs to another model ({error})") from None
    if differing:
        names = ", ".join(sorted(differing)[:3])
        raise ValueError(f"{path}: belongs to another model (tensors in only one of the two: {names})")
    return config
