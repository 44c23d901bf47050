"""`python -m peft_pretraining evaluate`: measures held-out perplexity of checkpoints and exports, with a 95 % interval."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from peft_pretraining.data.loader import EvalSet
    from peft_pretraining.data.tokenizer import Tokenizer
    from peft_pretraining.export.load import Loaded

HELP = "perplexity of checkpoints and exports on a data set, with a 95 % interval, and bits per byte"


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of one model. loss: mean over target tokens, nats. perplexity: exp(loss); low and high are the ends of its
    95 % interval, None for a single batch. bits_per_byte: None if the tokenizer's pieces have no byte lengths. max_length,
    packing: how text was cut into sequences; perplexities are comparable only if these are equal."""

    checkpoint: str
    loss: float
    perplexity: float
    perplexity_low: float | None
    perplexity_high: float | None
    tokens: int
    bits_per_byte: float | None
    max_length: int
    packing: bool
    dtype: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        *("--checkpoint", "--checkpoints"),
        type=Path,
        nargs="+",
        required=True,
        help="run, step_XXXXXXXX folder, export, or LLaMA in transformers' layout; several are shown in one table",
    )
    parser.add_argument("--dataset", help="as the trainer's --eval_dataset (default: the held-out data of the run)")
    parser.add_argument("--text_field", help="field of a record that holds the text (default: the run's, else text)")
    parser.add_argument("--tokenizer", help="as the trainer's (default: the one beside the model)")
    parser.add_argument("--max_length", type=int, help="tokens per sequence (default: the run's, else the model's positions)")
    parser.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="pack documents end to end instead of one per sequence (default: as the run)",
    )
    parser.add_argument("--eval_tokens", type=int, help="target tokens to evaluate (default: the whole set)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per batch (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype of the model (default: as stored)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON: an object, or a list for several checkpoints")


def run(args: argparse.Namespace) -> int:
    """Evaluates the models one after another and prints a table. Raises ValueError or OSError."""
    for name in ("max_length", "eval_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < (2 if name == "max_length" else 1):
            raise ValueError(f"--{name} {value}: must be at least {2 if name == 'max_length' else 1}")
    from peft_pretraining.distributed.device import pick_device
    from peft_pretraining.distributed.world import World
    from peft_pretraining.export.load import holds_export

    # All are checked before the first evaluation, which may take hours.
    for path in args.checkpoint:
        if holds_export(path) and args.dataset is None:
            raise ValueError(f"--dataset is required for {path}: an export records no data set; name one, such as c4 or a folder")
    trained_on = _training_data([path for path in args.checkpoint if not holds_export(path)])
    device = pick_device(args.device, World())
    evaluated: list[Evaluated] = []
    try:
        for path in args.checkpoint:
            # Kept at once, so that it is printed even if a later model fails.
            evaluated.append(evaluate_one(path, device, args, trained_on))
    finally:
        if evaluated:
            single = len(args.checkpoint) == 1
            print(_as_json(evaluated, single) if args.json else format_table(evaluated))
    return 0


def _training_data(runs: Sequence[Path]) -> list[str]:
    """The data sets that runs and checkpoints record as their training data."""
    from peft_pretraining.checkpoint.step_folder import read_json

    records = [read_json(path / "run.json") for path in runs if (path / "run.json").is_file()]
    return [str(record["arguments"]["dataset"]) for record in records if "dataset" in record.get("arguments", {})]


def _as_json(evaluated: Sequence[Evaluated], single: bool) -> str:
    return json.dumps(asdict(evaluated[0]) if single else [asdict(entry) for entry in evaluated])


def evaluate_one(path: Path, device: torch.device, args: argparse.Namespace, trained_on: Sequence[str] = ()) -> Evaluated:
    """Evaluates one model. trained_on: training data of all models of the table. Raises ValueError or OSError."""
    from peft_pretraining.export.load import load_for_inference
    from peft_pretraining.model.loss import TokenLoss
    from peft_pretraining.training.evaluate import Batches, evaluate

    loaded = load_for_inference(path, device, args.dtype)
    tokenizer = _tokenizer(loaded, args, path)
    positions = loaded.model.config.max_position_embeddings
    max_length = args.max_length or (loaded.args.max_length if loaded.args is not None else positions)
    if max_length > positions:
        raise ValueError(f"--max_length {max_length}: {path} has {positions} positions; use at most {positions}")
    packing = args.packing if args.packing is not None else bool(loaded.args is not None and loaded.args.packing)
    masked = packing and loaded.args is not None and loaded.args.document_mask
    module = TokenLoss(loaded.model, document_end=tokenizer.eos_id if masked else None)
    batches: Batches = []
    eval_set = _eval_set(loaded, tokenizer, args, max_length, packing, trained_on)
    result = evaluate(module, eval_set, bytes_per_id=tokenizer.bytes_per_id(), each=batches)
    low, high = interval([(loss.item(), int(tokens)) for loss, tokens in batches])
    return Evaluated(
        str(path),
        result.loss,
        result.perplexity,
        low,
        high,
        result.tokens,
        result.bits_per_byte,
        max_length,
        packing,
        loaded.dtype,
    )


def _tokenizer(loaded: Loaded, args: argparse.Namespace, path: Path) -> Tokenizer:
    from peft_pretraining.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{path}: the folder has no tokenizer; name one with --tokenizer")
    if tokenizer.text_vocab_size > loaded.model.config.vocab_size:
        raise ValueError(
            f"--tokenizer {tokenizer.name}: has ids up to {tokenizer.text_vocab_size - 1}, but {path} has a vocabulary of "
            f"{loaded.model.config.vocab_size}; use the tokenizer it was trained with"
        )
    return tokenizer


def _eval_set(
    loaded: Loaded, tokenizer: Tokenizer, args: argparse.Namespace, max_length: int, packing: bool, trained_on: Sequence[str]
) -> EvalSet:
    """The evaluation set: the one of the model's run, with given flags replacing the run's values.

    An evaluation data set is used completely; of data that any model of the table was trained on, none of the training documents.
    """
    from peft_pretraining.config.dataset_list import shares_dataset
    from peft_pretraining.data.loader import EvalSet
    from peft_pretraining.data.mixture import open_dataset
    from peft_pretraining.data.source import READING_RULES

    run = loaded.args
    recorded = None if run is None else run.eval_dataset
    dataset = args.dataset or recorded or (run.dataset if run is not None else "")
    field = args.text_field or (run.text_field if run is not None else "text")
    own = args.dataset is None and recorded is not None
    # The run's own version of the split rules decides which documents it held out.
    rules = loaded.rules if run is not None and (own or shares_dataset(dataset, run.dataset)) else READING_RULES
    trained = trained_on if run is None or not own else [run.dataset] if loaded.rules > 2 else []
    source = open_dataset(dataset, "validation", text_field=field, trained_on=trained, rules=rules)
    if run is None and not any(shares_dataset(dataset, each) for each in trained_on):
        split = open_dataset(dataset, "validation", text_field=field)
        if any(each.keep != "all" for each in split.sources):
            print(
                f"notice: {dataset}: all its documents are evaluated, as an export does not record what it was trained on; if it "
                "was on these, evaluate its run or checkpoint too, so that only what was held out is used",
                file=sys.stderr,
            )
    return EvalSet(
        source,
        tokenizer,
        max_length=max_length,
        packing=packing,
        max_tokens=args.eval_tokens,
        batch_size=args.batch_size,
    )


def interval(batches: Sequence[tuple[float, int]]) -> tuple[float | None, float | None]:
    """Returns the ends of the 95 % interval of exp(sum of losses / sum of tokens), batches being independent draws.

    Variance of a ratio estimator by linearisation (Cochran, Sampling Techniques, 6.4), Student's t for the number of batches.
    """
    from peft_pretraining.record.intervals import t_quantile
    from peft_pretraining.training.evaluate import perplexity_of

    n, tokens = len(batches), sum(count for _, count in batches)
    if n < 2:
        return None, None
    mean = sum(loss for loss, _ in batches) / tokens
    squares = sum((loss - mean * count) ** 2 for loss, count in batches)
    half = t_quantile(n - 1) * math.sqrt(squares * n / (n - 1)) / tokens
    return perplexity_of(mean - half), perplexity_of(mean + half)


def format_table(evaluated: Sequence[Evaluated]) -> str:
    """Formats a table with one line per model, for a terminal."""

    def cells(entry: Evaluated) -> Iterator[str]:
        bounds = "" if entry.perplexity_low is None else f" [{entry.perplexity_low:,.2f}, {entry.perplexity_high:,.2f}]"
        yield entry.checkpoint
        yield f"{entry.perplexity:,.2f}{bounds}"
        yield f"{entry.loss:.4f}"
        yield "-" if entry.bits_per_byte is None else f"{entry.bits_per_byte:.4f}"
        yield f"{entry.tokens:,}"
        yield f"{entry.max_length}{', packed' if entry.packing else ''}"

    rows = [
        ("model", "perplexity [95 %]", "loss", "bits per byte", "tokens", "length"),
        *(tuple(cells(entry)) for entry in evaluated),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
