"""The pretrained model as a sequence classifier with adapters, and its tokenizer: loading, counting, saving."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_pretraining.checkpoint.step_folder import is_checkpoint, list_checkpoints
from peft_pretraining.commands.finetune.adapter import ADAPTER_FILE, save_adapter
from peft_pretraining.commands.finetune.examples import Dataset
from peft_pretraining.commands.finetune.tasks import Task
from peft_pretraining.config.files import beginning, lfs_problem
from peft_pretraining.data import TokenizerError, first_line
from peft_pretraining.data.tokenizer import hub_problem, write_tokenizer
from peft_pretraining.distributed.device import pick_device
from peft_pretraining.distributed.world import World
from peft_pretraining.export.shards import FACTORS_CONFIG
from peft_pretraining.model.llama import both_spellings
from sparse_lora import SLTrainConfig, merge, reparameterize
from sparse_lora.adapted import adapter_parameters, freeze_but
from sparse_lora.reparameterize import ALL_LINEARS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONGEST = 512


@dataclass
class Tuned:
    """A classifier on its device, with its tokenizer. config: of the adapters, None without adapters. head: names of the
    classifier's modules. max_length: tokens per example."""

    model: PreTrainedModel
    tokenizer: Any
    config: SLTrainConfig | None
    head: tuple[str, ...]
    max_length: int

    def parameters(self) -> dict[str, int]:
        """Parameter counts: total, trained, in adapters, in the head."""
        head = [p for name in self.head for p in self.model.get_submodule(name).parameters()]
        return {
            "total": sum(p.numel() for p in self.model.parameters()),
            "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "adapter": sum(adapter_parameters(self.model).values()),
            "head": sum(p.numel() for p in head),
        }


def build(args: argparse.Namespace, task: Task) -> Tuned:
    """Loads the pretrained model with a new head for the task, and adds adapters to every linear outside the head.

    Raises:
        ValueError: model or tokenizer cannot be loaded, the model has no linear to adapt, or settings do not fit the model.
    """
    if (kind := _unreadable_kind(Path(args.model))) is not None:
        raise ValueError(f"--model {args.model}: is {kind}; give a folder that `export` writes without --keep_factors")
    if not Path(args.model).is_dir() and (args.model.startswith(("/", ".", "~")) or args.model.count("/") > 1):
        raise ValueError(f"--model {args.model}: no such folder, and not a name on the hub (OWNER/NAME)")
    local = Path(args.model).is_dir() or hub_problem() is not None
    tokenizer = _load_tokenizer(args.model, local)
    torch.manual_seed(args.seed)
    model, head = _load_model(args.model, task, local)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = None
    if args.head_only:
        freeze_but(model, head)
    else:
        _refuse_rank(args.rank, model.base_model)
        config = SLTrainConfig(
            rank=args.rank,
            sparsity=args.sp_ratio,
            alpha=args.lora_alpha,
            support=args.support,
            target_modules=ALL_LINEARS,
            base=args.base,
            trained_modules=head,
            seed=args.seed,
        )
        reparameterize(model, config)
    longest = _positions(model, tokenizer)
    if args.max_length is not None and args.max_length > longest:
        raise ValueError(f"--max_length {args.max_length}: the model has positions for {longest} tokens only")
    torch.nn.Module.to(model, pick_device(args.device, World()))
    return Tuned(model, tokenizer, config, head, args.max_length or min(_LONGEST, longest))


def _unreadable_kind(folder: Path) -> str | None:
    """Names the kind of a folder that this project writes and transformers cannot read; None for other folders."""
    if (folder / FACTORS_CONFIG).exists():
        return "an export with its factors kept"
    return "a run, or a checkpoint of one" if is_checkpoint(folder) or list_checkpoints(folder) else None


def _refuse_rank(rank: int, model: torch.nn.Module) -> None:
    """Raises ValueError if the rank exceeds the largest possible rank of every linear."""
    most = max((min(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)), default=rank)
    if rank > most:
        raise ValueError(f"--rank {rank}: no linear of the model has a rank above {most}; the paper uses 8")


def _load_model(name: str, task: Task, local: bool) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and the names of its modules that are new or specific to the task: those outside the pretrained model.

    local: do not ask the hub.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    labels = dict(enumerate(task.labels or ("score",)))
    # Missing weights are checked below.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=task.num_outputs,
            id2label=labels,
            label2id={label: number for number, label in labels.items()},
            problem_type="single_label_classification" if task.labels else "regression",
            # The checkpoint may have a head for another task.
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=local,
            output_loading_info=True,
        )
    except Exception as error:
        # Parsers raise many types for damaged files.
        _refuse_pointers(name)
        raise ValueError(
            f"--model {name}: cannot be loaded as a sequence classifier ({first_line(error)}); give a folder that "
            "save_pretrained or `export` wrote, or a model's name on the hub"
        ) from error
    head = [child for child, module in model.named_children() if module is not model.base_model and list(module.parameters())]
    absent = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    # Language models have no pooler: a new one is drawn, and trains with the classifier.
    head += sorted({key.partition(".pooler.")[0] + ".pooler" for key in absent if ".pooler." in key})
    missing = sorted(key for key in absent if not key.startswith(tuple(f"{module}." for module in head)))
    if missing:
        raise ValueError(f"--model {name}: {len(missing)} of its weights are missing or have another shape, such as {missing[0]}")
    return model, tuple(head)


def _refuse_pointers(name: str) -> None:
    """Raises ValueError if the model is a folder and one of its files is a git-lfs pointer."""
    for file in sorted(Path(name).glob("*")):
        if (problem := lfs_problem(beginning(file))) is not None:
            raise ValueError(f"--model {name}: {file.name} {problem}")


def _load_tokenizer(name: str, local: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
    except Exception as error:
        _refuse_pointers(name)
        raise TokenizerError(
            f"--model {name}: its tokenizer cannot be loaded ({first_line(error)}); put it into the model's folder"
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise TokenizerError(f"--model {name}: its tokenizer has neither a padding nor an end token; set pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _positions(model: PreTrainedModel, tokenizer: Any) -> int:
    """Largest number of tokens per example."""
    positions = int(getattr(model.config, "max_position_embeddings", _LONGEST))
    for name, module in model.named_modules():
        # RoBERTa and related models number positions from padding_idx + 1.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= int(module.padding_idx) + 1
    return min(positions, int(tokenizer.model_max_length))


def describe(tuned: Tuned, data: Dataset) -> str:
    """One line about the model's parameters and one about the data."""
    numbers = tuned.parameters()
    kind = "no adapters" if tuned.config is None else f"{numbers['adapter']:,} in adapters"
    splits = ", ".join(f"{name} {len(examples):,}" for name, examples in {"train": data.train, **data.validation}.items())
    return (
        f"parameters: {numbers['total']:,}, trained {numbers['trained']:,} ({kind}, {numbers['head']:,} in the classifier)\n"
        f"examples: {splits}; cut at {tuned.max_length} tokens"
    )


def save(tuned: Tuned, folder: Path, *, keep_adapter: bool) -> None:
    """Merges the adapters into the model, in place, and writes model and tokenizer in transformers' format. Raises OSError."""
    if keep_adapter and tuned.config is not None:
        save_adapter(tuned.model, tuned.config, folder / ADAPTER_FILE)
    merge(tuned.model)
    try:
        tuned.model.save_pretrained(folder)
        content = both_spellings(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_tokenizer(tuned.tokenizer, folder)
    except Exception as error:
        # Safetensors and tokenizers raise their own classes when the disk is full.
        raise OSError(f"{folder}: cannot be written ({first_line(error)})") from error
    for file in folder.glob("*.safetensors"):
        # Safetensors creates files that only their owner can read.
        file.chmod(0o644)
