"""The model with its adapters, the epochs over the examples, the figures after each."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_pretraining.checkpoint.step_folder import is_checkpoint, list_checkpoints
from peft_pretraining.commands.finetune.adapter import ADAPTER_FILE, save_adapter
from peft_pretraining.commands.finetune.examples import Dataset, Examples
from peft_pretraining.commands.finetune.metrics import METRICS
from peft_pretraining.commands.finetune.tasks import Task
from peft_pretraining.data.errors import TokenizerError, first_line
from peft_pretraining.data.tokenizer import hub_problem
from peft_pretraining.distributed.device import pick_device
from peft_pretraining.distributed.world import World
from peft_pretraining.export.shards import FACTORS_CONFIG
from peft_pretraining.plan.schedule import lr_at
from sparse_lora import SLTrainConfig, adapter_parameters, generator_for, merge, reparameterize
from sparse_lora.reparameterize import ALL_LINEARS, freeze_but

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARMUP_SHARE = 0.06  # of all updates, as RoBERTa's authors had it on GLUE (arXiv 1907.11692, appendix C)
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


@dataclass(frozen=True)
class _Encoded:
    """inputs: of the tokenizer, not yet padded. labels: (n,)."""

    inputs: list[dict[str, Any]]
    labels: Tensor


def _encode(tuned: Tuned, examples: Examples, split: str) -> _Encoded:
    """Raises ValueError where a text has no tokens: not every tokenizer puts one before or after it."""
    found = tuned.tokenizer(*examples.columns, truncation=True, max_length=tuned.max_length)
    empty = next((row for row, ids in enumerate(found["input_ids"], 1) if not ids), None)
    if empty is not None:
        raise ValueError(f"{split} examples, row {empty}: its text has no tokens; remove the row")
    inputs = [{key: found[key][row] for key in found} for row in range(len(examples))]
    dtype = torch.float32 if tuned.model.config.problem_type == "regression" else torch.int64
    return _Encoded(inputs, torch.tensor(examples.labels, dtype=dtype))


def _batches(tuned: Tuned, data: _Encoded, order: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    """Inputs and labels on the model's device, padded to the longest of the batch."""
    for rows in order.split(size):
        batch = tuned.tokenizer.pad([data.inputs[row] for row in rows.tolist()], return_tensors="pt")
        batch["labels"] = data.labels[rows]
        yield {key: tensor.to(tuned.model.device) for key, tensor in batch.items()}


def fine_tune(
    tuned: Tuned, data: Dataset, args: argparse.Namespace, say: Callable[[str], object] | None = None
) -> dict[str, Any]:
    """Train the parameters that require a gradient; figures of every epoch and all settings, as JSON has them.

    Args:
        args: the command's. say: gets a line after each epoch.

    Raises:
        ValueError: a text without tokens, or the loss is not finite any more.
    """
    train = _encode(tuned, data.train, "train")
    validation = {split: _encode(tuned, examples, split) for split, examples in data.validation.items()}
    trained = [parameter for parameter in tuned.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    total = math.ceil(len(data.train) / args.batch_size) * args.epochs
    warmup = min(total, int(_WARMUP_SHARE * total) if args.warmup_steps is None else args.warmup_steps)
    schedule = {"scheduler": args.scheduler, "num_training_steps": total, "warmup_steps": warmup, "min_lr_ratio": 0.0}
    rates = (lr_at(step, lr=args.lr, **schedule) for step in range(total))
    epochs: list[dict[str, Any]] = []
    with _progress_bar(total) as bar:
        for epoch in range(1, args.epochs + 1):
            order = torch.randperm(len(data.train), generator=generator_for(args.seed, f"finetune/epoch/{epoch}"))
            tuned.model.train()
            losses = []
            for batch in _batches(tuned, train, order, args.batch_size):
                losses.append(_update(tuned.model, batch, optimizer, next(rates), args))
                bar.update()
            loss = torch.stack(losses).double().mean().item()
            if not math.isfinite(loss):
                raise ValueError(f"epoch {epoch}: the loss is {loss}; lower --lr {args.lr} or --lora_alpha")
            epochs.append({"epoch": epoch, "loss": loss, **_evaluate(tuned, data.task, validation, args)})
            if say is not None:
                say(", ".join(f"{name} {value:.4g}" for name, value in epochs[-1].items()))
    metric = list(epochs[0])[2]
    best = max(epochs, key=lambda row: float(row[metric]))
    if say is not None:
        say(f"best {metric} {best[metric]:.4g} (epoch {best['epoch']}), last {epochs[-1][metric]:.4g}")
    return {
        "metric": metric,
        "best": best,
        "last": epochs[-1],
        "epochs": epochs,
        "parameters": tuned.parameters(),
        "examples": {name: len(examples) for name, examples in {"train": data.train, **data.validation}.items()},
        "updates": total,
        "settings": _settings(args),
    }


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, but for where."""
    left_out = ("command", "json", "out", "device")
    given = {name: value for name, value in vars(args).items() if name not in left_out}
    return json.loads(json.dumps(given, default=str))  # type: ignore[no-any-return]


def _update(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    lr: float,
    args: argparse.Namespace,
) -> Tensor:
    """One step of the optimizer; the batch's mean loss before it."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        loss: Tensor = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
        if args.grad_clipping:
            torch.nn.utils.clip_grad_norm_(group["params"], args.grad_clipping)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def _evaluate(tuned: Tuned, task: Task, validation: dict[str, _Encoded], args: argparse.Namespace) -> dict[str, float]:
    """The task's metrics, by name; of several splits with what tells them apart, as accuracy_matched."""
    tuned.model.eval()
    figures = {}
    for split, data in validation.items():
        found = []
        for batch in _batches(tuned, data, torch.arange(len(data.labels)), args.batch_size):
            labels = batch.pop("labels")
            with torch.autocast(tuned.model.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                logits = tuned.model(**batch).logits.float().cpu()
            found.append(logits.argmax(1) if task.labels else logits.view(len(labels)))
        predicted = torch.cat(found)
        for name in task.metrics:
            figures[name + split.removeprefix("validation")] = METRICS[name](predicted, data.labels)
    return figures


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


def _progress_bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="update", disable=not sys.stderr.isatty(), smoothing=0.05)
