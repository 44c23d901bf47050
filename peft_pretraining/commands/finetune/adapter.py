"""What fine-tuning adds to a frozen model, as one safetensors file: adapters, classifier, supports, and how they are made."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from torch import nn

from sparse_lora import SLTrainConfig, adapter_state, reparameterize

ADAPTER_FILE = "sltrain_adapter.safetensors"
_CONFIG_KEY = "sltrain_config"


def save_adapter(model: nn.Module, config: SLTrainConfig, path: Path) -> None:
    """model: reparameterised with `config`, whose base is frozen. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(model).items()}
    try:
        save_file(state, path, metadata={_CONFIG_KEY: json.dumps(asdict(config))})
    except SafetensorError as error:  # its own class for a disk that is full
        raise OSError(f"{path}: cannot be written ({error})") from None


def load_adapter(model: nn.Module, path: str | Path) -> SLTrainConfig:
    """Put an adapter onto the pretrained model that it was trained on, in place; `sparse_lora.merge` then makes it dense.

    Args:
        model: of the same class and with as many labels.

    Returns:
        How the adapters are made.

    Raises:
        ValueError: the file is no adapter, or one for another model.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            config = SLTrainConfig(**json.loads((file.metadata() or {})[_CONFIG_KEY]))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: holds no adapter ({error})") from None
    reparameterize(model, config)
    wrong = set(state) ^ set(adapter_state(model))
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: is for another model ({error})") from None
    if wrong:
        raise ValueError(f"{path}: is for another model ({', '.join(sorted(wrong)[:3])} are in one of both only)")
    return config
