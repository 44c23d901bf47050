"""Fine-tuning by transformers' Trainer: settings, checkpoints, figures after each epoch."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import WandbCallback
from transformers.trainer_utils import get_last_checkpoint

from peft_pretraining.commands.finetune.examples import Dataset, Examples
from peft_pretraining.commands.finetune.metrics import METRICS
from peft_pretraining.commands.finetune.model import Tuned
from peft_pretraining.commands.finetune.tasks import Task
from peft_pretraining.data.files import size_and_ends
from peft_pretraining.distributed.world import World
from peft_pretraining.optim.updates import clip_, gradient_norms, l2_norm
from peft_pretraining.record.wandb_run import start_wandb

# Share of all updates, as RoBERTa's authors had it on GLUE (arXiv 1907.11692, appendix C).
_WARMUP_SHARE = 0.06


def encode(tuned: Tuned, examples: Examples, split: str) -> list[dict[str, Any]]:
    """Token ids and label of each example, not yet padded. Raises ValueError for a text without a single token."""
    columns = tuned.tokenizer(*examples.columns, truncation=True, max_length=tuned.max_length)
    empty = next((row for row, ids in enumerate(columns["input_ids"], 1) if not ids), None)
    # Not every tokenizer puts a special token before or after the text.
    if empty is not None:
        raise ValueError(f"{split} examples, row {empty}: its text has no tokens; remove the row")
    return [{**{key: columns[key][row] for key in columns}, "label": label} for row, label in enumerate(examples.labels)]


def fine_tune(
    tuned: Tuned, data: Dataset, args: argparse.Namespace, folder: Path, say: Callable[[str], object] | None = None
) -> dict[str, Any]:
    """Trains the parameters that require a gradient; returns the figures of every epoch and all settings for results.json.

    Args:
        args: the command's flags.
        folder: for files that wandb keeps.
        say: is called with one line after each epoch.

    Raises:
        ValueError: a text has no tokens, the loss is not finite, or --checkpoints belongs to another run.
        OSError: a checkpoint cannot be read or written.
    """
    splits = {name: len(examples) for name, examples in {"train": data.train, **data.validation}.items()}
    trainer = make_trainer(tuned, data, args, folder, say)
    newest = None if args.checkpoints is None else newest_checkpoint(args.checkpoints, _settings(args), data, args.model)
    with _recorded_by_wandb(args, folder) as recorded:
        # Without a run of ours the callback would start one by itself, with other settings.
        if not recorded:
            trainer.remove_callback(WandbCallback)
        try:
            trainer.train(resume_from_checkpoint=newest)
        except SafetensorError as error:
            # Safetensors raises it when the disk is full.
            raise OSError(f"--checkpoints {args.checkpoints}: cannot be read or written ({error})") from error
    epochs = epoch_rows(trainer.state.log_history)
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
        "examples": splits,
        "updates": trainer.state.max_steps,
        "settings": _settings(args),
    }


def make_trainer(
    tuned: Tuned, data: Dataset, args: argparse.Namespace, folder: Path, say: Callable[[str], object] | None
) -> Trainer:
    """Trainer with the command's settings; evaluates, and with --checkpoints saves, after each epoch."""
    device = tuned.model.device
    updates = math.ceil(len(data.train) / args.batch_size) * args.epochs
    if args.warmup_steps is not None and args.warmup_steps > updates:
        raise ValueError(
            f"--warmup_steps {args.warmup_steps}: the run has {updates} updates ({len(data.train)} examples, --batch_size "
            f"{args.batch_size}, --epochs {args.epochs}) and would end before --lr is reached; use at most {updates}"
        )
    settings = TrainingArguments(
        output_dir=str(args.checkpoints or folder),
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        lr_scheduler_type=args.scheduler,
        warmup_steps=int(_WARMUP_SHARE * updates) if args.warmup_steps is None else args.warmup_steps,
        max_grad_norm=args.grad_clipping,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        # Numpy's seeds have at most 32 bits.
        seed=args.seed % 2**32,
        bf16=args.dtype == "bfloat16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        eval_strategy="epoch",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_strategy="no" if args.checkpoints is None else "epoch",
        save_total_limit=1,
        report_to="none" if args.wandb == "disabled" else "wandb",
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
    )
    _use_one_device(settings, device)
    trainer = Trainer(
        model=tuned.model,
        args=settings,
        data_collator=DataCollatorWithPadding(tuned.tokenizer),
        train_dataset=encode(tuned, data.train, "train"),
        eval_dataset={name: encode(tuned, examples, name) for name, examples in data.validation.items()},
        compute_metrics=functools.partial(_metrics, data.task),
        callbacks=[_EpochLines(args, len(data.validation) * len(data.task.metrics), say)],
    )
    trainer.accelerator.clip_grad_norm_ = _clip
    # Both print every log to standard output.
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if not settings.disable_tqdm:
        trainer.add_callback(_ProgressBar)
    return trainer


def _clip(parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Clips gradients by their global L2 norm as pretraining does; replaces the library's norm, which is inexact on a CPU."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # A non-finite loss has no backward pass, and so no gradients.
    total = l2_norm(gradient_norms(gradients, World())) if gradients else torch.zeros(())
    clip_(gradients, total, max_norm)
    return total


def _use_one_device(settings: TrainingArguments, device: torch.device) -> None:
    """Makes Trainer use `device` alone; by itself it splits each batch over all GPUs, beginning at the first."""
    settings.__dict__["_setup_devices"] = settings.distributed_state.device = device
    settings._n_gpu = int(device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _metrics(task: Task, prediction: EvalPrediction) -> dict[str, float]:
    """The task's metrics by name, from the logits of a validation split."""
    logits, labels = torch.as_tensor(prediction.predictions).float(), torch.as_tensor(prediction.label_ids)
    predicted = logits.argmax(1) if task.labels else logits.view(len(labels))
    return {name: METRICS[name](predicted, labels) for name in task.metrics}


def epoch_rows(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per epoch from Trainer's log: epoch, mean training loss, metrics as accuracy, or accuracy_matched of one split."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in log:
        epoch = round(entry["epoch"])
        if "loss" in entry:
            rows[epoch] = {"epoch": epoch, "loss": entry["loss"]}
        for key, value in entry.items():
            split, _, name = key.removeprefix("eval_validation").rpartition("_")
            if key.startswith("eval_validation") and name in METRICS:
                rows[epoch][name + split] = value
    return list(rows.values())


class _EpochLines(TrainerCallback):
    """Refuses a loss that is not finite and hands over one line for each epoch."""

    def __init__(self, args: argparse.Namespace, num_metrics: int, say: Callable[[str], object] | None):
        self._args, self._num_metrics, self._say = args, num_metrics, say

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            flags = f"--lr {self._args.lr} or --lora_alpha"
            raise ValueError(f"epoch {round(state.epoch)}: the loss is {logs['loss']}; lower {flags}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        row = epoch_rows(state.log_history)[-1]
        # True at the last of the epoch's validation splits.
        if self._say is not None and len(row) == 2 + self._num_metrics:
            self._say(", ".join(f"{name} {value:.4g}" for name, value in row.items()))


class _ProgressBar(ProgressCallback):
    """Trainer's progress bar without the lines that it prints to standard output."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass


def _digest(folder: Path) -> str:
    """A digest of the names, sizes, and first and last 4 kB of a model's files; of no files for a name on the hub."""
    digest = hashlib.sha256()
    kinds = (".json", ".safetensors", ".model", ".bin", ".pt")
    for path in sorted(path for path in folder.rglob("*") if path.suffix in kinds and path.is_file()):
        digest.update(repr((str(path.relative_to(folder)), *size_and_ends(path))).encode())
    return digest.hexdigest()


def newest_checkpoint(folder: Path, settings: Mapping[str, Any], data: Dataset, model: str) -> str | None:
    """The newest complete checkpoint under --checkpoints, or None in a new folder, which is made.

    model: the model that is fine-tuned; a folder is compared by its files, not only by its name.

    Raises:
        ValueError: the folder belongs to a run with other settings or examples.
        OSError: the folder cannot be made or read.
    """
    examples = hashlib.sha256(repr((data.train, data.validation)).encode()).hexdigest()
    wanted = {**settings, "examples": examples, "model files": _digest(Path(model))}
    record = folder / "finetune.json"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = list(folder.glob("checkpoint-*"))
    try:
        written = dict(json.loads(record.read_text(encoding="utf-8"))) if record.exists() else {}
    except (ValueError, TypeError):
        raise ValueError(f"{record}: not the settings of a run (damaged); name another folder for --checkpoints") from None
    written.setdefault("model files", wanted["model files"])  # not recorded by earlier versions
    differing = [name for name, value in wanted.items() if written.get(name) != value]
    if checkpoints and differing:
        raise ValueError(
            f"--checkpoints {folder}: holds checkpoints of another run (differing: {', '.join(differing)}); "
            "repeat that run's flags, or name another folder"
        )
    record.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    for path in checkpoints:
        # This file is written last.
        if not (path / "trainer_state.json").exists():
            shutil.rmtree(path)
    newest: str | None = get_last_checkpoint(str(folder))
    return newest


@contextlib.contextmanager
def _recorded_by_wandb(args: argparse.Namespace, folder: Path) -> Iterator[bool]:
    """Starts the wandb run that --wandb asks for, to which Trainer's callback reports, and ends it; yields whether there is one.

    Without a network it records offline.
    """
    name = os.environ.get("WANDB_NAME") or args.out.name
    settings = {"mode": args.wandb, "id": None, "name": name, "tags": None, "config": _settings(args), "place": args.out}
    run = start_wandb(folder, settings)
    try:
        yield run is not None
    finally:
        if run is not None:
            run.finish()


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that define the result: all but those that say where to compute, write or report."""
    left_out = ("command", "json", "out", "device", "checkpoints", "wandb")
    given = {name: value for name, value in vars(args).items() if name not in left_out}
    return json.loads(json.dumps(given, default=str))  # type: ignore[no-any-return]
