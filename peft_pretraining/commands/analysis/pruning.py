"""`python -m peft_pretraining pruning`: perplexity of a full-rank checkpoint approximated by low-rank plus sparse weights.

The rows follow the paper's table 1 (arXiv 2406.02214): the checkpoint; the best rank-r part L0 of its weights; L0 with the
residual's largest or random entries; L0 with sparse values trained on these supports.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.checkpoint.manifest import MANIFEST
from peft_pretraining.checkpoint.new_folder import inside_checkpoint, make_folder
from peft_pretraining.config.arguments import Arguments, ConfigError, arguments_of_record
from peft_pretraining.methods import METHODS
from peft_pretraining.plan.checks import value_problems

if TYPE_CHECKING:
    import torch

    from peft_pretraining.plan.plan import Plan
    from peft_pretraining.run.build import Data

HELP = "the pruning study: perplexity of a full-rank checkpoint's best low-rank part, with pruned and with trained sparse parts"
_LABELS = {
    "full": "checkpoint W",
    "low_rank": "best rank-{rank} part L0",
    "top_pruned": "L0 + largest {share} of the residual",
    "random_pruned": "L0 + random {share} of the residual",
    "top_trained": "L0 + S trained, support of the largest",
    "random_trained": "L0 + S trained, random support",
}
# Arguments that the study takes from the checkpoint's run unless a flag is given.
_DATA = (
    *("dataset", "eval_dataset", "text_field", "eval_tokens", "max_length", "packing", "document_mask"),
    *("data_lanes", "data_order"),
)
_TRAINING = ("workers", "on_bad_record", "lr", "batch_size", "seed", "stochastic_rounding")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="step_XXXXXXXX folder, or a run's folder, of a full or galore run",
    )
    parser.add_argument("--rank", type=int, required=True, help="rank r of L0, below every weight's shorter side")
    parser.add_argument("--sp_ratio", type=float, default=0.03, help="share of each weight's entries in S (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        default=1000,
        help="updates to train S; 0 leaves out the trained rows (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, help="peak learning rate of S's values (default: the run's)")
    parser.add_argument("--batch_size", type=int, help="sequences per micro-batch (default: the run's)")
    parser.add_argument("--total_batch_size", type=int, help="sequences per update (default: the run's)")
    parser.add_argument("--dataset", help="as for training, tokenised with the checkpoint's tokenizer (default: the run's)")
    parser.add_argument(
        "--eval_dataset",
        help="held-out data (default: the validation split of --dataset if that is given, else the run's)",
    )
    parser.add_argument("--eval_tokens", type=int, help="tokens to evaluate on (default: the run's)")
    parser.add_argument("--seed", type=int, help="seed of the random support and the data order (default: the run's)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file, completed row by row: repeat the command to add missing rows")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Computes missing rows and prints all rows. Raises ValueError for values that cannot work."""
    if args.steps < 0:
        raise ValueError(f"--steps {args.steps}: must be 0 or more")
    from peft_pretraining.checkpoint.step_folder import resolve
    from peft_pretraining.distributed.device import pick_device
    from peft_pretraining.distributed.world import World

    if args.out is not None and (problem := inside_checkpoint(args.out)) is not None:
        raise ValueError(problem)
    device = pick_device(args.device, World())
    figures = study(args, resolve(args.checkpoint), device)
    print(json.dumps(figures) if args.json else format_rows(figures))
    return 0


def study_arguments(args: argparse.Namespace, folder: Path, record: Mapping[str, Any]) -> Arguments:
    """The trainer's arguments for the study of a checkpoint: adam, cosine schedule, a tenth of the updates as warm-up.

    record: the checkpoint's run.json.

    Raises:
        ConfigError: values that cannot work, one line per flag.
    """
    recorded = arguments_of_record(record["arguments"])
    dense = [name for name, method in METHODS.items() if not method.replaces_linears]
    if recorded.peft_model not in dense:
        raise ConfigError(
            [
                f"--checkpoint {folder}: weights of --peft_model {recorded.peft_model} are already factored; "
                f"name a checkpoint of {' or '.join(dense)}"
            ]
        )
    values = {name: getattr(recorded, name) for name in (*_DATA, *_TRAINING)}
    values["total_batch_size"] = record["plan"].get("total_batch_size")
    if not isinstance(values["total_batch_size"], int):
        raise ConfigError([f"{folder / 'run.json'}: the plan has no total_batch_size; it was written by another version"])
    if args.dataset is not None:
        values |= {"eval_dataset": None, "data_lanes": None, "data_order": None}
    given = ("dataset", "eval_dataset", "eval_tokens", "lr", "batch_size", "total_batch_size", "seed")
    values |= {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    arguments = Arguments(
        **values,
        model_config=str(folder / "config.json"),
        tokenizer=str(folder / "tokenizer"),
        dtype=record["plan"]["dtype"],
        peft_model="sltrain",
        rank=args.rank,
        sp_ratio=args.sp_ratio,
        lora_alpha=float(max(1, args.rank)),
        num_training_steps=max(1, args.steps),
        warmup_steps=args.steps // 10,
        device=args.device,
    )
    problems = value_problems(arguments)
    if problems:
        raise ConfigError(problems)
    return arguments


def study(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    """Computes the study: {"settings", "versions", "rows"}; --out is rewritten after each row.

    Raises:
        ValueError: the checkpoint is not dense, values do not fit it, or --out holds another study.
    """
    from peft_pretraining.checkpoint.step_folder import write_json
    from peft_pretraining.commands.analysis.decompose import check_rank, target_linears
    from peft_pretraining.commands.analysis.study import ROWS, make_rows
    from peft_pretraining.data.source import READING_RULES, recorded_rules
    from peft_pretraining.distributed.world import World
    from peft_pretraining.export.load import load_model
    from peft_pretraining.model.loss import TokenLoss
    from peft_pretraining.plan.plan import make_plan
    from peft_pretraining.run.build import build_data
    from peft_pretraining.run.folder import versions

    model, _, record = load_model(folder, device)
    values = study_arguments(args, folder, record)
    check_rank(target_linears(model), values.rank)
    plan = make_plan(values, World(), values.dtype, device.type)
    data = build_data(values, plan, World(), device, READING_RULES if args.dataset else recorded_rules(record))
    settings = study_settings(values, folder, plan, data, args.steps)
    rows = rows_of(args.out, settings)
    if args.out is not None:
        make_folder(args.out.parent)
    document = {"settings": settings, "versions": versions(), "rows": rows}
    finished = {row["row"] for row in rows}
    missing = [name for name, (_, trained) in ROWS.items() if name not in finished and (args.steps or not trained)]
    module = TokenLoss(model, document_end=data.tokenizer.eos_id if values.packing and values.document_mask else None)
    try:
        for row in make_rows(missing, module, values, plan, data, device):
            rows.append(row)
            if args.out is not None:
                write_json(args.out, document)
            print(f"{label(row['row'], settings)}: perplexity {shown(row['perplexity'])}", file=sys.stderr)
    finally:
        data.loader.close()
    return document


def study_settings(args: Arguments, folder: Path, plan: Plan, data: Data, steps: int) -> dict[str, Any]:
    """All that a study's figures depend on; a checkpoint is identified by the digest of its manifest, not by its path."""
    from peft_pretraining.checkpoint.step_folder import read_json

    names = ("rank", "sp_ratio", "seed", "dtype", "stochastic_rounding")
    of_data = ("dataset", "eval_dataset", "text_field", "max_length", "packing", "document_mask")
    return {
        "checkpoint": read_json(folder / MANIFEST)["sha256"],
        **{name: getattr(args, name) for name in (*names, *of_data)},
        "data_fingerprint": data.source.fingerprint,
        "held_out_fingerprint": data.held_out.fingerprint,
        "eval_tokens": plan.eval_tokens,
        "steps": steps,
        **({"lr": args.lr, "warmup_steps": args.warmup_steps, "total_batch_size": plan.total_batch_size} if steps else {}),
    }


def rows_of(path: Path | None, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reads the rows of an unfinished study. Raises ValueError if the file is of another study, naming the differences."""
    if path is None or not path.exists():
        return []
    if path.is_dir():
        raise ValueError(f"--out {path}: is a folder; name a file")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        recorded, rows = dict(document["settings"]), [dict(row) for row in document["rows"]]
        complete = all({"row", "perplexity", "loss", "relative_error"} <= row.keys() for row in rows)
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"--out {path}: does not hold the rows of a study; name another file")
    differing = [
        f"{name} was {recorded.get(name)!r}, is now {settings.get(name)!r}"
        for name in sorted(recorded.keys() | settings.keys())
        if recorded.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(f"--out {path}: holds another study ({'; '.join(differing)}); name another file")
    return rows


def format_rows(figures: Mapping[str, Any]) -> str:
    """Formats one line per row for a terminal, in the paper's order."""
    settings = figures["settings"]
    labels = [label(row["row"], settings) for row in figures["rows"]]
    width = max(map(len, labels))
    lines = [f"{'':<{width}}  {'perplexity':>10}  {'loss':>8}  {'||W-W_row||/||W||':>17}  {'updates':>7}"]
    for text, row in zip(labels, figures["rows"], strict=True):
        lines.append(
            f"{text:<{width}}  {shown(row['perplexity']):>10}  {shown(row['loss'], '.4f'):>8}  {row['relative_error']:17.4f}  "
            f"{row['updates']:7,}"
        )
    return "\n".join(lines)


def label(row: str, settings: Mapping[str, Any]) -> str:
    """A row's name in the printed table."""
    return _LABELS[row].format(rank=settings["rank"], share=f"{settings['sp_ratio']:.4g}")


def shown(value: float | None, form: str = ",.2f") -> str:
    """Formats a figure; "not finite" for None."""
    return "not finite" if value is None else format(value, form)
