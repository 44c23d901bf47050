"""Writes a checkpoint's model as an export, layer by layer: at most one decoder layer and one shard are in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_pretraining.checkpoint import step_folder as checkpoint
from peft_pretraining.checkpoint.new_folder import folder_problem, new_folder
from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer
from peft_pretraining.distributed.device import torch_dtype
from peft_pretraining.export.card import model_card
from peft_pretraining.export.load import checkpoint_record, load_parameters
from peft_pretraining.export.sentencepiece_file import write_sentencepiece
from peft_pretraining.export.shards import FACTORS_CONFIG, LLAMA_CONFIG, ExportError, ShardWriter
from peft_pretraining.methods import METHODS
from peft_pretraining.model.llama import both_spellings, meta_model
from sparse_lora import SLTrainConfig, merge
from sparse_lora.reparameterize import DEFAULT_TARGETS

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_pretraining.config.arguments import Arguments

_SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Exported:
    """A finished export. num_bytes: size of all tensors."""

    folder: Path
    num_bytes: int
    dtype: str


def export(
    path: Path,
    out: Path,
    *,
    keep_factors: bool = False,
    dtype: str | None = None,
    name: str | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> Exported:
    """Writes the checkpoint's model to the folder `out`, which is created only when complete.

    Args:
        path: a checkpoint, or a run's folder, whose newest undamaged checkpoint is used.
        keep_factors: write B, A, the sparse values and the support instead of dense weights.
        dtype: dtype of the weights (default: the run's). Weights are merged in the wider of the two dtypes.
        name: the model's name in its README.md (default: the folder's).
        shard_bytes: largest size of a file.

    Raises:
        CheckpointError: the folder is not a checkpoint, or is damaged.
        ExportError: `out` is not empty, or the method has no factors to keep or no dense weights to write.
        OSError: the disk is full, or a file cannot be written.
    """
    folder = checkpoint.resolve(path)
    args, record = checkpoint_record(folder)
    method = METHODS[args.peft_model]
    if keep_factors and not method.factored:
        raise ExportError(f"{folder}: --peft_model {args.peft_model} has no factors to keep; leave --keep_factors out")
    if not method.mergeable:
        raise ExportError(
            f"{folder}: --peft_model {args.peft_model} has linears without an equal dense weight, so it cannot be exported"
        )
    if (problem := folder_problem(out)) is not None:
        raise ExportError(problem)
    model = meta_model(
        load_model_config(folder / "config.json"),
        torch_dtype(record["plan"]["dtype"]),
        lambda model: method.apply(model, args),
    )
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    dtype = dtype or record["plan"]["dtype"]
    _check_room(out, record, dtype, keep_factors)
    with new_folder(out) as partial:
        exported = _write(partial, folder, model, args, tokenizer, dtype, keep_factors, shard_bytes)
        text = model_card(record, folder, name or out.name, factored=keep_factors, dtype=dtype)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return Exported(out, exported.num_bytes, dtype)


def _check_room(out: Path, record: dict[str, Any], dtype: str, keep_factors: bool) -> None:
    """Raises OSError if the disk has too little free space."""
    plan = record["plan"]
    numel = plan["parameters"]["total"] if keep_factors else plan["full_rank_parameters"]
    needed = torch_dtype(dtype).itemsize * numel + (plan["bytes"]["support"] if keep_factors else 0)
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"--out {out}: needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free; choose another disk"
        )


def _write(
    out: Path,
    folder: Path,
    model: LlamaForCausalLM,
    args: Arguments,
    tokenizer: Tokenizer,
    dtype: str,
    keep_factors: bool,
    shard_bytes: int,
) -> ShardWriter:
    writer = ShardWriter(out, shard_bytes)
    for prefix, part in parts_of(model):
        part.to_empty(device="cpu")
        tensors = part.state_dict()
        load_parameters(folder, args, {f"model/{prefix}.{name}": tensor for name, tensor in tensors.items()})
        if torch_dtype(dtype).itemsize > next(part.parameters()).element_size():
            part.to(torch_dtype(dtype))
        if not keep_factors:
            merge(part)
        for name, tensor in part.to(torch_dtype(dtype)).state_dict().items():
            writer.add(f"{prefix}.{name}", tensor)
        part.to("meta")
    writer.close()
    content = both_spellings(_config(model, tokenizer, torch_dtype(dtype)).to_diff_dict())
    config_file = out / (LLAMA_CONFIG if keep_factors else "config.json")
    config_file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if keep_factors:
        (out / FACTORS_CONFIG).write_text(json.dumps(_factors(args), indent=1) + "\n", encoding="utf-8")
    _generation_config(tokenizer).save_pretrained(out)
    tokenizer.save_for_inference(out, model.config.max_position_embeddings)
    write_sentencepiece(tokenizer, out)
    return writer


def parts_of(model: LlamaForCausalLM) -> Iterator[tuple[str, nn.Module]]:
    """Yields the model's parts: embedding, decoder layers, last norm, and the head unless it is tied to the embedding."""
    yield "model.embed_tokens", model.model.embed_tokens
    for number, layer in enumerate(model.model.layers):
        yield f"model.layers.{number}", layer
    yield "model.norm", model.model.norm
    if not model.config.tie_word_embeddings:
        yield "lm_head", model.lm_head


def _config(model: LlamaForCausalLM, tokenizer: Tokenizer, dtype: torch.dtype) -> LlamaConfig:
    """The model's configuration with the token ids of training: documents end with eos and have no bos."""
    config = model.config
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_id, tokenizer.pad_id, None
    config.use_cache, config.dtype = True, dtype
    config.architectures = ["LlamaForCausalLM"]
    return config


def _generation_config(tokenizer: Tokenizer) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, use_cache=True)


def _factors(args: Arguments) -> dict[str, Any]:
    config = SLTrainConfig(
        rank=args.rank,
        sparsity=args.sp_ratio if METHODS[args.peft_model].sparse else 0.0,
        alpha=args.lora_alpha,
        support=args.support,
        target_modules=DEFAULT_TARGETS,
        trainable_scaling=args.train_scaling,
        seed=args.seed,
    )
    return asdict(config)
