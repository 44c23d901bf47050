"""Exports a trained model: a dense LLaMA for transformers, or the factors themselves.

command.py     python -m peft_pretraining export
write.py       checkpoint -> folder, one part of the model at a time
read.py        folder -> model and tokenizer
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
    """Model, prepared for inference, and transformers' tokenizer of what `export --keep_factors` wrote.

    Args:
        dtype: of the parameters; as exported by default.

    Raises:
        ExportError: no such export, or files that are missing, damaged or do not fit each other.
    """
    from transformers import AutoTokenizer

    from peft_pretraining.export.read import load_export
    from sparse_lora import prepare_for_inference

    model, config = load_export(Path(folder), device, dtype)
    if config is None:
        from peft_pretraining.export.shards import ExportError

        raise ExportError(f"{folder}: a dense export; AutoModelForCausalLM.from_pretrained loads it")
    prepare_for_inference(model)
    return model, AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
