"""A model for inference from whatever holds one: a run, a checkpoint, an export, or a LLaMA in transformers' layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peft_pretraining.checkpoint.step_folder import CheckpointError, is_checkpoint, list_checkpoints
from peft_pretraining.config.arguments import Arguments, arguments_of_record
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer
from peft_pretraining.run.build import DTYPES, load_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, its tokenizer, and the arguments of its run where they are known.

    tokenizer: None where none lies beside the model.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer | None
    args: Arguments | None

    @property
    def dtype(self) -> str:
        """Of the parameters, by torch's name."""
        return str(self.model.dtype).removeprefix("torch.")


def load_for_inference(path: Path, device: torch.device, dtype: str | None = None) -> Loaded:
    """dtype: of the parameters; as stored by default.

    Raises:
        CheckpointError, ExportError: nothing that can be loaded, or files that are damaged.
        TokenizerError: the one beside the model cannot be read.
    """
    from peft_pretraining.export.read import load_export

    if holds_export(path):
        model, _ = load_export(path, device, None if dtype is None else DTYPES[dtype])
        beside = any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
        return Loaded(model, load_tokenizer(str(path)) if beside else None, None)
    model, tokenizer, record = load_model(path, device)
    if dtype is not None:
        torch.nn.Module.to(model, DTYPES[dtype])
    return Loaded(model, tokenizer, arguments_of_record(record["arguments"]))


def holds_export(path: Path) -> bool:
    """True: an export, or a LLaMA in transformers' layout. False: a run or a checkpoint. Raises CheckpointError: neither."""
    from peft_pretraining.export.read import is_export

    if is_export(path):
        return True
    if not is_checkpoint(path) and not list_checkpoints(path):
        raise CheckpointError(
            f"{path} holds no model: no checkpoint (step_XXXXXXXX), no run with one, and no export (model.safetensors)"
        )
    return False
