"""Loads a model for inference from an export, or from any LLaMA in transformers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peft_pretraining.config.model_config import ModelConfigError, load_model_config
from peft_pretraining.export.shards import FACTORS_CONFIG, INDEX, LLAMA_CONFIG, SINGLE, ExportError, read_tensors
from peft_pretraining.model.llama import materialize, meta_model
from sparse_lora import SLTrainConfig, reparameterize

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def is_export(folder: Path) -> bool:
    """Whether a folder holds the files of an export, factored or dense."""
    return (folder / FACTORS_CONFIG).exists() or any((folder / name).exists() for name in (SINGLE, INDEX))


def load_export(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LlamaForCausalLM, SLTrainConfig | None]:
    """Loads the model, in eval mode with a key-value cache, and the configuration of its linears (None for a dense model).

    dtype: dtype of the parameters (default: as exported).

    Raises:
        ExportError: a file is missing or damaged, or the files contradict each other.
    """
    factored = (folder / FACTORS_CONFIG).exists()
    config_file = folder / (LLAMA_CONFIG if factored else "config.json")
    try:
        cfg = load_model_config(config_file)
        stored = json.loads(config_file.read_text(encoding="utf-8-sig"))
        name = str(stored.get("dtype") or stored.get("torch_dtype") or "float32")
        factors = None
        if factored:
            values = json.loads((folder / FACTORS_CONFIG).read_text(encoding="utf-8-sig"))
            factors = SLTrainConfig(**values | {"target_modules": tuple(values["target_modules"])})
        dtype = dtype or getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {name!r} is not a dtype of torch")
    except (ModelConfigError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{folder}: its configuration cannot be used ({error})") from None
    model = meta_model(cfg, dtype, None if factors is None else lambda model: reparameterize(model, factors))
    materialize(model, device)
    tensors = model.state_dict()
    if cfg.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    read_tensors(folder, tensors)
    model.config.use_cache = True
    return model.eval(), factors
