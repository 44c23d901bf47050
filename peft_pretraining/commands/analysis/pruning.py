"""`python -m peft_pretraining pruning`: what is left of a full-rank checkpoint as low-rank plus sparse, pruned and trained.

The rows of the paper's table 1 (arXiv 2406.02214): the checkpoint, the best rank-r part L0 of its weights, L0 with the residual's
largest or random entries, L0 with sparse values trained on these supports.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.checkpoint.manifest import MANIFEST
from peft_pretraining.checkpoint.new_folder import make_folder
from peft_pretraining.config.arguments import Arguments, ConfigError, arguments_of_record
from peft_pretraining.methods import METHODS
from peft_pretraining.plan.checks import value_problems

if TYPE_CHECKING:
    import torch

    from peft_pretraining.plan.plan import Plan

HELP = "the pruning study: perplexity of a full-rank checkpoint's best low-rank part, with pruned and with trained sparse parts"
_LABELS = {
    "full": "checkpoint W",
    "low_rank": "best rank-{rank} part L0",
    "top_pruned": "L0 + largest {share} of the residual",
    "random_pruned": "L0 + random {share} of the residual",
    "top_trained": "L0 + S trained, support of the largest",
    "random_trained": "L0 + S trained, random support",
}
# What the study takes from the checkpoint's run where no flag says otherwise.
_DATA = ("dataset", "eval_dataset", "text_field", "eval_tokens", "max_length", "packing", "document_mask", "data_lanes")
_TRAINING = ("workers", "on_bad_record", "lr", "batch_size", "seed", "stochastic_rounding")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="step_XXXXXXXX folder, or a run's folder, of a full or galore run",
    )
    parser.add_argument("--rank", type=int, required=True, help="rank r of L0, below every weight's shorter side")
    parser.add_argument(
        "--sp_ratio", type=float, default=0.03, help="share of each weight's entries that S has (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1000,
        help="updates that train S, 0 for the other rows alone (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, help="peak learning rate of S's values (default: the run's)")
    parser.add_argument("--batch_size", type=int, help="sequences per micro-batch (default: the run's)")
    parser.add_argument("--total_batch_size", type=int, help="sequences per update (default: the run's)")
    parser.add_argument("--dataset", help="as for training; read by the checkpoint's tokenizer (default: the run's)")
    parser.add_argument(
        "--eval_dataset",
        help="held-out data (default: the validation split of --dataset where that is given, else the run's)",
    )
    parser.add_argument("--eval_tokens", type=int, help="tokens to evaluate on (default: the run's)")
    parser.add_argument("--seed", type=int, help="of the random support and the data's order (default: the run's)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file, completed row by row: the same command makes the rows that it lacks")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Make the rows that are missing, print all. Raises ValueError for values that cannot work."""
    if args.steps < 0:
        raise ValueError(f"--steps {args.steps}: must be 0 or more")
    from peft_pretraining.checkpoint.step_folder import resolve
    from peft_pretraining.commands.analysis.spectra import refuse_inside_checkpoint
    from peft_pretraining.distributed.device import pick_device
    from peft_pretraining.distributed.world import World

    if args.out is not None:
        refuse_inside_checkpoint(args.out)
    device = pick_device(args.device, World())
    figures = study(args, resolve(args.checkpoint), device)
    print(json.dumps(figures) if args.json else format_rows(figures))
    return 0


def study_arguments(args: argparse.Namespace, folder: Path, record: Mapping[str, Any]) -> Arguments:
    """The trainer's arguments for the study of a checkpoint with this run.json: adam, cosine, a tenth of the updates warm-up.

    Raises:
        ConfigError: values that cannot work, by flag.
    """
    before = arguments_of_record(record["arguments"])
    dense = [name for name, method in METHODS.items() if not method.replaces_linears]
    if before.peft_model not in dense:
        raise ConfigError(
            [
                f"--checkpoint {folder}: a run of --peft_model {before.peft_model}, whose weights are factors already; "
                f"the study takes apart the dense ones of {' and '.join(dense)}"
            ]
        )
    values = {name: getattr(before, name) for name in (*_DATA, *_TRAINING)}
    values["total_batch_size"] = record["plan"].get("total_batch_size")
    if not isinstance(values["total_batch_size"], int):
        raise ConfigError([f"{folder / 'run.json'}: its plan has no total_batch_size; it is of another version"])
    if args.dataset is not None:
        values |= {"eval_dataset": None, "data_lanes": None}
    given = ("dataset", "eval_dataset", "eval_tokens", "lr", "batch_size", "total_batch_size", "seed")
    values |= {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    found = Arguments(
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
    problems = value_problems(found)
    if problems:
        raise ConfigError(problems)
    return found


def study(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    """{"settings", "versions", "rows"}: how the rows were made and the figures of each, written to --out one by one.

    Raises:
        ValueError: the checkpoint is no dense one, numbers do not fit it, or --out is of another study.
    """
    from peft_pretraining.checkpoint.step_folder import write_json
    from peft_pretraining.commands.analysis.decompose import check_rank, target_linears
    from peft_pretraining.commands.analysis.study import ROWS, make_rows
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
    data = build_data(values, plan, World(), device)
    settings = study_settings(values, folder, plan, data.source.fingerprint, args.steps)
    rows = rows_of(args.out, settings)
    if args.out is not None:
        make_folder(args.out.parent)
    found = {"settings": settings, "versions": versions(), "rows": rows}
    made = {row["row"] for row in rows}
    missing = [name for name, (_, trained) in ROWS.items() if name not in made and (args.steps or not trained)]
    module = TokenLoss(model, document_end=data.tokenizer.eos_id if values.packing and values.document_mask else None)
    try:
        for row in make_rows(missing, module, values, plan, data, device):
            rows.append(row)
            if args.out is not None:
                write_json(args.out, found)
            print(f"{label(row['row'], settings)}: perplexity {shown(row['perplexity'])}", file=sys.stderr)
    finally:
        data.loader.close()
    return found


def study_settings(args: Arguments, folder: Path, plan: Plan, fingerprint: str, steps: int) -> dict[str, Any]:
    """What a study's figures depend on; the checkpoint by the digest of its manifest, wherever it lies."""
    from peft_pretraining.checkpoint.step_folder import read_json

    names = ("rank", "sp_ratio", "seed", "dtype", "stochastic_rounding")
    data = ("dataset", "eval_dataset", "text_field", "max_length", "packing", "document_mask")
    return {
        "checkpoint": read_json(folder / MANIFEST)["sha256"],
        **{name: getattr(args, name) for name in (*names, *data)},
        "data_fingerprint": fingerprint,
        "eval_tokens": plan.eval_tokens,
        "steps": steps,
        **({"lr": args.lr, "warmup_steps": args.warmup_steps, "total_batch_size": plan.total_batch_size} if steps else {}),
    }


def rows_of(path: Path | None, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that a file of the same study holds. Raises ValueError where it is of another one, naming what differs."""
    if path is None or not path.exists():
        return []
    if path.is_dir():
        raise ValueError(f"--out {path}: is a folder; name a file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, rows = dict(found["settings"]), [dict(row) for row in found["rows"]]
        complete = all({"row", "perplexity", "loss", "relative_error"} <= row.keys() for row in rows)
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"--out {path}: holds something else than a study's rows; name another file")
    differing = [
        f"{name} is {before.get(name)!r} there and {settings.get(name)!r} here"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(f"--out {path}: holds another study, {'; '.join(differing)}; name another file")
    return rows


def format_rows(figures: Mapping[str, Any]) -> str:
    """A line per row for a terminal, in the paper's order."""
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
    """A figure, or that it is not finite."""
    return "not finite" if value is None else format(value, form)
