"""Loads a model for inference from a run, a checkpoint, an export, or a LLaMA in transformers' layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_pretraining.checkpoint import step_folder as checkpoint
from peft_pretraining.checkpoint.step_folder import CheckpointError, is_checkpoint, list_checkpoints
from peft_pretraining.config.arguments import DTYPES, Arguments, arguments_of_record
from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.data.source import READING_RULES, recorded_rules
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer
from peft_pretraining.distributed.device import torch_dtype
from peft_pretraining.methods import METHODS
from peft_pretraining.model.llama import build_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, its tokenizer, and the arguments of its run.

    tokenizer: None if the folder has none. args: None for an export, which does not record them. rules: for files and splits.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer | None
    args: Arguments | None
    rules: int = READING_RULES

    @property
    def dtype(self) -> str:
        """Name of the parameters' dtype, as in torch."""
        return str(self.model.dtype).removeprefix("torch.")


def load_for_inference(path: Path, device: torch.device, dtype: str | None = None) -> Loaded:
    """Loads a run, checkpoint, export or LLaMA for inference. dtype: of the parameters (default: as stored).

    Raises:
        CheckpointError, ExportError: the path holds no model, or files are damaged.
        TokenizerError: the tokenizer beside the model cannot be read.
    """
    from peft_pretraining.export.read import load_export

    if holds_export(path):
        model, _ = load_export(path, device, None if dtype is None else torch_dtype(dtype))
        has_tokenizer = any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
        return Loaded(model, load_tokenizer(str(path)) if has_tokenizer else None, None)
    model, tokenizer, record = load_model(path, device)
    if dtype is not None:
        torch.nn.Module.to(model, torch_dtype(dtype))
    return Loaded(model, tokenizer, arguments_of_record(record["arguments"]), recorded_rules(record))


def holds_export(path: Path) -> bool:
    """Whether the path is an export (or a LLaMA in transformers' layout) rather than a run or checkpoint.

    Raises CheckpointError for anything else.
    """
    from peft_pretraining.export.read import is_export

    if is_export(path):
        return True
    if not is_checkpoint(path) and not list_checkpoints(path):
        raise CheckpointError(
            f"{path}: holds no model; name a checkpoint (step_XXXXXXXX), a run with one, or an export (model.safetensors)"
        )
    return False


def checkpoint_record(folder: Path) -> tuple[Arguments, dict[str, Any]]:
    """The arguments in a checkpoint's run.json, and its whole content. Raises CheckpointError."""
    run = checkpoint.read_json(folder / "run.json")
    try:
        args = arguments_of_record(run["arguments"])
        supported = run["plan"]["dtype"] in DTYPES.values() and args.peft_model in METHODS
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{folder / 'run.json'}: not the record of a run ({error!r})") from None
    if not supported:
        raise checkpoint.CheckpointError(
            f"{folder / 'run.json'}: method or dtype is unknown to this version; load it with the version that wrote it"
        )
    return args, run


def load_parameters(folder: Path, args: Arguments, tensors: dict[str, torch.Tensor]) -> None:
    """Fills a model's tensors, in place, from a checkpoint, whose parameters may be stored in int8. Raises CheckpointError."""
    if args.weight_dtype is None:
        checkpoint.load_tensors(folder, tensors)
        return
    from peft_pretraining.model.int8 import load_dequantised

    load_dequantised(folder, tensors)


def load_model(path: Path, device: torch.device) -> tuple[LlamaForCausalLM, Tokenizer, dict[str, Any]]:
    """Loads model, tokenizer and run.json of a checkpoint, or of a run's newest checkpoint, in the run's dtype.

    Raises:
        CheckpointError: the path is not a checkpoint, or the checkpoint is damaged.
    """
    folder = checkpoint.resolve(path)
    args, run = checkpoint_record(folder)
    try:
        model = build_model(
            load_model_config(folder / "config.json"),
            dtype=torch_dtype(run["plan"]["dtype"]),
            device=device,
            seed=args.seed,
            reparameterize=lambda model: METHODS[args.peft_model].apply(model, args),
        )
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        # No run could have started with such values.
        raise checkpoint.CheckpointError(f"{folder}: no model can be built from its records ({error})") from None
    load_parameters(folder, args, {f"model/{name}": tensor for name, tensor in model.state_dict().items()})
    return model.eval(), load_tokenizer(str(folder / "tokenizer")), run
