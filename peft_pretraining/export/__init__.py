"""Exports a trained model: a dense LLaMA for transformers, or the factors themselves.

write.py       checkpoint -> folder, one part of the model at a time
read.py        folder -> model
load.py        run, checkpoint or export -> model and tokenizer for inference
shards.py      safetensors files of a bounded size, and their index
card.py        README.md of a model: how it was made, what it reached, how to load it
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM


def load_factored(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LlamaForCausalLM, Any]:
    """Loads a model written by `export --keep_factors`, prepared for inference, and its tokenizer as one of transformers.

    Args:
        dtype: dtype of the parameters (default: as exported).

    Raises:
        ExportError: the folder is not such an export, or its files are missing, damaged or contradict each other.
    """
    from transformers import AutoTokenizer

    from peft_pretraining.export.read import load_export
    from sparse_lora import prepare_for_inference

    model, config = load_export(Path(folder), device, dtype)
    if config is None:
        from peft_pretraining.export.shards import ExportError

        raise ExportError(f"{folder}: a dense export; load it with AutoModelForCausalLM.from_pretrained")
    prepare_for_inference(model)
    return model, AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
