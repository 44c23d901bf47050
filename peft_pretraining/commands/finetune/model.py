"""The pretrained model as a sequence classifier with adapters, and its tokenizer: loading, counting, saving."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_pretraining.checkpoint.step_folder import is_checkpoint, list_checkpoints
from peft_pretraining.commands.finetune.adapter import ADAPTER_FILE, save_adapter
from peft_pretraining.commands.finetune.examples import Dataset
from peft_pretraining.commands.finetune.tasks import Task
from peft_pretraining.data.errors import TokenizerError, first_line
from peft_pretraining.data.tokenizer import hub_problem
from peft_pretraining.distributed.device import pick_device
from peft_pretraining.distributed.world import World
from peft_pretraining.export.shards import FACTORS_CONFIG
from sparse_lora import SLTrainConfig, adapter_parameters, merge, reparameterize
from sparse_lora.reparameterize import ALL_LINEARS, freeze_but

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONGEST = 512


@dataclass
class Tuned:
    """A classifier on its device, with adapters by `config`, or without, and its tokenizer. head: names of its modules.
    max_length: tokens of an example."""

    model: PreTrainedModel
    tokenizer: Any
    config: SLTrainConfig | None
    head: tuple[str, ...]
    max_length: int

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: of all, of those that train, of adapters, of the head."""
        head = [p for name in self.head for p in self.model.get_submodule(name).parameters()]
        return {
            "total": sum(p.numel() for p in self.model.parameters()),
            "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "adapter": sum(adapter_parameters(self.model).values()),
            "head": sum(p.numel() for p in head),
        }


def build(args: argparse.Namespace, task: Task) -> Tuned:
    """The pretrained model with a new head for the task, and adapters in every linear but the head's.

    Raises:
        ValueError: model or tokenizer cannot be loaded, there is no linear to adapt, or settings do not fit the model.
    """
    if (form := _other_form(Path(args.model))) is not None:
        raise ValueError(f"--model {args.model}: is {form}; give what `export` writes without --keep_factors")
    if not Path(args.model).is_dir() and (args.model.startswith(("/", ".", "~")) or args.model.count("/") > 1):
        raise ValueError(f"--model {args.model}: no such folder, and no name on the hub, which is OWNER/NAME")
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
        raise ValueError(f"--max_length {args.max_length}: the model has positions for {longest} tokens")
    torch.nn.Module.to(model, pick_device(args.device, World()))
    return Tuned(model, tokenizer, config, head, args.max_length or min(_LONGEST, longest))


def _other_form(folder: Path) -> str | None:
    """What a folder of ours is that transformers does not read, if it is such."""
    if (folder / FACTORS_CONFIG).exists():
        return "an export with its factors kept"
    return "a run, or a checkpoint of one" if is_checkpoint(folder) or list_checkpoints(folder) else None


def _refuse_rank(rank: int, model: torch.nn.Module) -> None:
    """Raises ValueError where B A would be larger than what it is added to, in every linear."""
    most = max((min(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)), default=rank)
    if rank > most:
        raise ValueError(f"--rank {rank}: no linear of the model has a rank above {most}; the paper's is 8")


def _load_model(name: str, task: Task, local: bool) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and the modules that are new or for the task alone: what lies beside the pretrained model in the classifier.

    local: ask no hub.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    labels = dict(enumerate(task.labels or ("score",)))
    logging.set_verbosity_error()  # of missing weights we say ourselves what matters
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=task.num_outputs,
            id2label=labels,
            label2id={label: number for number, label in labels.items()},
            problem_type="single_label_classification" if task.labels else "regression",
            ignore_mismatched_sizes=True,  # a head for another task
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=local,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a damaged file or a server makes a parser raise
        raise ValueError(
            f"--model {name}: no sequence classifier can be made of it ({first_line(error)}); give a folder that "
            "save_pretrained or `export` wrote, or a model's name on the hub"
        ) from error
    head = [child for child, module in model.named_children() if module is not model.base_model and list(module.parameters())]
    absent = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    # What was pretrained as a language model has no pooler, which then begins as the classifier does.
    head += sorted({key.partition(".pooler.")[0] + ".pooler" for key in absent if ".pooler." in key})
    lost = sorted(key for key in absent if not key.startswith(tuple(f"{module}." for module in head)))
    if lost:
        raise ValueError(f"--model {name}: {len(lost)} of its weights are missing or of another shape, such as {lost[0]}")
    return model, tuple(head)


def _load_tokenizer(name: str, local: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
    except Exception as error:
        raise TokenizerError(
            f"--model {name}: its tokenizer cannot be loaded ({first_line(error)}); it must lie beside the model"
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise TokenizerError(f"--model {name}: its tokenizer has neither a padding nor an end token: set pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _positions(model: PreTrainedModel, tokenizer: Any) -> int:
    """Tokens that an example may have."""
    positions = int(getattr(model.config, "max_position_embeddings", _LONGEST))
    for name, module in model.named_modules():
        # RoBERTa and its kin number positions from behind that of padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= int(module.padding_idx) + 1
    return min(positions, int(tokenizer.model_max_length))


def describe(tuned: Tuned, data: Dataset) -> str:
    """A line about the model and one about the data."""
    numbers = tuned.parameters()
    kind = "no adapters" if tuned.config is None else f"{numbers['adapter']:,} in adapters"
    splits = ", ".join(f"{name} {len(examples):,}" for name, examples in {"train": data.train, **data.validation}.items())
    return (
        f"parameters: {numbers['total']:,}, trained {numbers['trained']:,} ({kind}, {numbers['head']:,} in the classifier)\n"
        f"examples: {splits}; cut at {tuned.max_length} tokens"
    )


def save(tuned: Tuned, folder: Path, *, keep_adapter: bool) -> None:
    """Write the dense model and the tokenizer as transformers load them; the model is merged from then on. Raises OSError."""
    if keep_adapter and tuned.config is not None:
        save_adapter(tuned.model, tuned.config, folder / ADAPTER_FILE)
    merge(tuned.model)
    try:
        tuned.model.save_pretrained(folder)
        tuned.tokenizer.save_pretrained(folder)
    except Exception as error:  # safetensors and tokenizers have classes of their own for a disk that is full
        raise OSError(f"{folder}: cannot be written ({first_line(error)})") from error
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # they are made for their owner alone
