"""`python -m peft_pretraining finetune`: fine-tunes a pretrained model on a GLUE task or on files in the same format."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from peft_pretraining.checkpoint.new_folder import folder_problem, new_folder
from peft_pretraining.commands.finetune.tasks import TASKS
from peft_pretraining.config.files import expanded
from peft_pretraining.config.supports import SUPPORTS
from peft_pretraining.distributed.world import World

HELP = "fine-tune a sequence classifier, its linears W0 + (alpha/r) B A + S, on a GLUE task or on files in that format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    _add_task(parser)
    _add_adapters(parser)
    _add_training(parser)
    _add_output(parser)


def _add_task(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="pretrained model with its tokenizer: a folder, or a name on the hub")
    add("--out", type=Path, required=True, help="new folder for the merged model, its tokenizer and results.json")
    add(
        "--task",
        choices=TASKS,
        help="GLUE task, from the hub unless files are given (default: taken from the files' columns)",
    )
    add("--train_file", type=Path, help="examples: .json, .jsonl, .csv, .tsv or .parquet, in GLUE's columns")
    add(
        "--validation_file",
        type=Path,
        nargs="+",
        help="validation examples; two files for mnli, matched and mismatched",
    )


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--base",
        choices=("frozen", "trained"),
        default="frozen",
        help="whether the pretrained weights train too (default: %(default)s)",
    )
    add("--head_only", action="store_true", help="no adapters: train the classifier alone on the frozen model")
    add("--rank", type=int, default=8, help="rank r of B A (default: %(default)s)")
    add(
        "--sp_ratio",
        type=float,
        default=0.005,
        help="delta: share of a weight's entries that are nonzero in S (default: %(default)s)",
    )
    add("--lora_alpha", type=float, default=64.0, help="B A is scaled by alpha / rank (default: %(default)s)")
    add(
        "--support",
        choices=(*SUPPORTS, "largest"),
        default="uniform",
        help="entries of S: uniform at random | 1/sp_ratio dense blocks | the largest magnitudes of W0 (default: %(default)s)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--lr", type=float, default=3e-5, help="peak learning rate of AdamW (default: %(default)s)")
    add(
        "--weight_decay",
        type=float,
        default=0.0,
        help="of AdamW, except for biases and norms (default: %(default)s)",
    )
    add(
        "--scheduler",
        choices=("linear", "cosine"),
        default="linear",
        help="decay of the rate to 0 after the warm-up (default: %(default)s)",
    )
    add("--warmup_steps", type=int, help="warm-up updates (default: 6 %% of all updates)")
    add("--grad_clipping", type=float, default=1.0, help="largest gradient norm; 0 turns clipping off (default: %(default)s)")
    add("--epochs", type=int, default=3, help="passes over the training examples (default: %(default)s)")
    add("--batch_size", type=int, default=16, help="examples per update (default: %(default)s)")
    add(
        "--max_length",
        type=int,
        help="tokens per example; longer ones are cut (default: the model's positions, at most 512)",
    )
    add("--seed", type=int, default=1234, help="seed of classifier, adapters, data order and dropout (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of matrix products (default: %(default)s)")
    add("--device", default="auto", help="auto | cpu | cuda (default: %(default)s)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--keep_adapter", action="store_true", help="also write the trained parameters as one small file, for load_adapter")
    add(
        "--checkpoints",
        type=Path,
        help="folder for a checkpoint after each epoch; the same command continues from the newest (default: none)",
    )
    add(
        "--wandb",
        choices=("online", "offline", "disabled"),
        default="disabled",
        help="where wandb records the figures (default: %(default)s)",
    )
    add("--json", action="store_true", help="print the content of results.json")


def run(args: argparse.Namespace) -> int:
    """Trains, evaluates after each epoch and writes the folder. Raises ValueError or OSError, naming all refused values."""
    args.model = expanded(args.model)
    refused = problems(args)
    if refused:
        raise ValueError("\n  ".join(refused))
    if (processes := World.from_environment().size) > 1:
        raise ValueError(f"WORLD_SIZE={processes} in the environment: fine-tuning runs in one process; start it without torchrun")
    from peft_pretraining.commands.finetune.examples import load_files, load_glue
    from peft_pretraining.commands.finetune.model import build, describe, save

    data = load_files(args.task, args.train_file, args.validation_file) if args.train_file else load_glue(args.task)
    tuned = build(args, data.task)
    if not args.json:
        print(describe(tuned, data))
    with new_folder(args.out) as partial:
        # Imported here because it loads Trainer, which takes seconds.
        from peft_pretraining.commands.finetune.trainer import fine_tune

        record = fine_tune(tuned, data, args, partial, None if args.json else print)
        (partial / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        save(tuned, partial, keep_adapter=args.keep_adapter)
    print(json.dumps(record) if args.json else f"{args.out}: merged model, tokenizer, results.json")
    return 0


def problems(args: argparse.Namespace) -> list[str]:
    """One line for each flag value that cannot work; loads nothing."""
    lines = []
    if (args.train_file is None) != (args.validation_file is None):
        lines.append("--train_file and --validation_file: only one is given; give both, or --task alone")
    if args.task is None and args.train_file is None:
        lines.append(f"nothing to train on: give --task {' | '.join(TASKS)}, or --train_file and --validation_file")
    if (problem := folder_problem(args.out)) is not None:
        lines.append(problem)
    for name, least in (("rank", 1), ("epochs", 1), ("batch_size", 1), ("max_length", 2), ("warmup_steps", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            lines.append(f"--{name} {value}: must be at least {least}")
    for name in ("lr", "lora_alpha"):
        if not 0 < getattr(args, name) < math.inf:
            lines.append(f"--{name} {getattr(args, name)}: must be above 0")
    for name in ("weight_decay", "grad_clipping"):
        if not 0 <= getattr(args, name) < math.inf:
            lines.append(f"--{name} {getattr(args, name)}: must be at least 0")
    if args.checkpoints is not None and args.checkpoints.resolve().is_relative_to(args.out.resolve()):
        lines.append(f"--checkpoints {args.checkpoints}: lies inside --out, which is written at the end; name another folder")
    if not 0 <= args.sp_ratio <= 1:
        lines.append(f"--sp_ratio {args.sp_ratio}: must be between 0 (low-rank alone) and 1")
    if not -(2**63) <= args.seed < 2**63:
        lines.append(f"--seed {args.seed}: must fit 64 bits")
    if args.keep_adapter and (args.head_only or args.base == "trained"):
        lines.append("--keep_adapter: needs adapters on a frozen base; leave it out, or leave out --head_only and --base trained")
    return lines
