"""`python -m peft_pretraining data`: builds, fetches, prepares and inspects data sets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.config.command_line import parse_tokens
from peft_pretraining.config.dataset_list import DEMOS, DatasetListError, split_datasets
from peft_pretraining.data.demo import build_demo

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer

HELP = "build, fetch, prepare and inspect data sets, and train tokenizers"


def _at_least_one(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _amount(text: str) -> int:
    try:
        value = parse_tokens(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text} is not a number such as 20M") from None
    return _at_least_one(str(value))


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else _at_least_one(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    parser.set_defaults(print_help=parser.print_help)

    def action(name: str, does: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=does, description=does, allow_abbrev=False)
        added.add_argument("--json", action="store_true", help="print the figures as JSON")
        return added

    def add_source(added: argparse.ArgumentParser, name: str = "") -> None:
        several = "; a list with weights, as for training" if name in ("inspect", "tokenizer") else ""
        added.add_argument("--dataset", required=True, help=f"as for training: c4, demo, folder, file, glob, hub:NAME{several}")
        added.add_argument("--text_field", default="text", help="field of a record that holds the text (default: text)")

    demo = action("demo", "build the embedded corpus and its tokenizer, once, and print their folder")
    demo.add_argument("--name", choices=DEMOS, default="demo", help="its name as a data set (default: demo)")
    demo.add_argument("--cache_dir", type=Path, help="where to build (default: $SPARSE_LORA_CACHE or ~/.cache/sltrain)")

    fetch = action("fetch", "copy files of a data set from the network to a folder; repeat to continue")
    add_source(fetch)
    fetch.add_argument("--out", type=Path, required=True, help="folder to copy to")
    fetch.add_argument("--shards", type=_at_least_one, required=True, help="number of training files to copy, from the first")
    fetch.add_argument(
        "--validation_shards", type=_at_least_one, default=8, help="validation files to copy (default: 8, all of C4's)"
    )

    prepare = action("prepare", "tokenise a data set once into files that training maps into memory; repeat to continue")
    add_source(prepare)
    prepare.add_argument(
        "--tokenizer",
        help="hub name, tokenizer folder or SentencePiece .model file (default: the data set's own, t5-base)",
    )
    prepare.add_argument("--out", type=Path, required=True, help="folder to write; train with it as --dataset")
    prepare.add_argument("--documents", type=_at_least_one, help="largest number of documents per split (default: all)")
    prepare.add_argument(
        "--processes",
        type=_at_least_one,
        default=1,
        help="tokenising processes; the files are the same for any number (default: 1, which tokenises in threads)",
    )
    prepare.add_argument(
        "--on_bad_record",
        choices=("skip", "fail"),
        default="skip",
        help="records without text: skip (and count; more than a quarter of a file is an error) | fail (default: skip)",
    )

    tokenizer = action("tokenizer", "train a tokenizer on the training documents of a data set")
    add_source(tokenizer, "tokenizer")
    _add_tokenizer_flags(tokenizer)

    inspect = action("inspect", "show counts, lengths, bad records and a few documents of a data set")
    add_source(inspect, "inspect")
    _add_inspect_flags(inspect)


def _add_inspect_flags(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("--tokenizer", help="tokenizer for counting (default: the one of demo or prepared data)")
    inspect.add_argument(
        "--documents", type=_number_or_all, default=1000, help="documents of each split to read, or all (default: 1000)"
    )
    inspect.add_argument(
        "--max_length",
        type=_at_least_one,
        default=256,
        help="sequence length for the shares of tokens cut and padded (default: 256)",
    )
    inspect.add_argument(
        "--data_lanes",
        type=_at_least_one,
        help="virtual readers whose shares of the training split are shown (default: as for training)",
    )
    inspect.add_argument("--verify", action="store_true", help="prepared data: verify every file's checksum first")


def _add_tokenizer_flags(tokenizer: argparse.ArgumentParser) -> None:
    tokenizer.add_argument("--vocab_size", type=_at_least_one, required=True, help="number of pieces, special ones included")
    tokenizer.add_argument(
        "--model", choices=("bpe", "unigram"), default="bpe", help="kind of SentencePiece model (default: bpe)"
    )
    tokenizer.add_argument("--out", type=Path, required=True, help="new folder for the tokenizer; train with it as --tokenizer")
    tokenizer.add_argument("--max_documents", type=_at_least_one, help="largest number of training documents (default: no bound)")
    tokenizer.add_argument(
        "--max_bytes",
        type=_amount,
        default=50_000_000,
        help="largest amount of text in bytes, such as 20M (default: 50M)",
    )
    tokenizer.add_argument("--seed", type=int, default=0, help="draws the order of the files that are read (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Performs the action and prints its figures; prints the list without an action. Exit code 0; errors are raised."""
    if args.action is None:
        args.print_help()
        return 0
    actions: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], str]]] = {
        "demo": _demo,
        "fetch": _fetch,
        "prepare": _prepare,
        "inspect": _inspect,
        "tokenizer": _tokenizer,
    }
    if args.action in ("fetch", "prepare") and len(_names(args)) > 1:
        raise ValueError(
            f"--dataset {args.dataset}: `data {args.action}` takes one data set; call it once for each, then train on all"
        )
    figures, text = actions[args.action](args)
    print(json.dumps(figures) if args.json else text)
    return 0


def _names(args: argparse.Namespace) -> list[str]:
    """The data sets of --dataset. Raises ValueError: an invalid list."""
    try:
        return [name for name, _ in split_datasets(args.dataset)]
    except DatasetListError as error:
        raise ValueError(f"--dataset {args.dataset}: {error}") from None


def _demo(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    folder = build_demo(args.cache_dir, DEMOS[args.name])
    figures = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    text = (
        f"{figures['train_documents']:,} documents to train on ({figures['train_bytes'] / 1e6:.1f} MB), "
        f"{figures['validation_documents']:,} held out, tokenizer with {figures['vocab_size']:,} pieces: {folder}"
    )
    return {"folder": str(folder), **figures}, text


def _fetch(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from peft_pretraining.data.fetch import fetch

    files = fetch(
        args.dataset,
        args.out,
        shards=args.shards,
        validation_shards=args.validation_shards,
        text_field=args.text_field,
    )
    size = sum(path.stat().st_size for path in files)
    figures = {"folder": str(args.out), "files": [str(path) for path in files], "size_bytes": size}
    return figures, f"{len(files)} files, {size / 1e6:,.1f} MB, train with --dataset {args.out}"


def _prepare(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from peft_pretraining.data.prepare import prepare

    manifest = prepare(
        args.dataset,
        _tokenizer_for(args),
        args.out,
        text_field=args.text_field,
        documents=args.documents,
        on_bad_record=args.on_bad_record,
        processes=args.processes,
    )
    bad_records: dict[str, int] = {}
    for shard in manifest.shards:
        for kind, count in shard.bad_records.items():
            bad_records[kind] = bad_records.get(kind, 0) + count
    totals = {name: manifest.total(name) for name in ("train", "train_tokens", "validation", "validation_tokens", "empty")}
    kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in bad_records.items())
    text = (
        f"{totals['train']:,} documents to train on, {totals['train_tokens']:,} tokens; {totals['validation']:,} held out, "
        f"{totals['validation_tokens']:,} tokens; bad records: {kinds or 'none'}; train with --dataset {args.out}"
    )
    return {"folder": str(args.out), **totals, "bad_records": bad_records}, text


def _tokenizer(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from peft_pretraining.data.source import readable_bytes
    from peft_pretraining.data.train_tokenizer import train_tokenizer

    names = ("vocab_size", "model", "text_field", "max_documents", "max_bytes", "seed")
    figures = train_tokenizer(args.dataset, args.out, **{name: getattr(args, name) for name in names})
    text = (
        f"{figures['vocab_size']:,} pieces ({figures['model']}) from {figures['documents']:,} documents, "
        f"{readable_bytes(figures['bytes'])} of text; train with --tokenizer {args.out}"
    )
    return {"folder": str(args.out), **figures}, text


def _inspect(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from peft_pretraining.data.inspection import (
        format_inspection,
        format_mixture,
        inspect_dataset,
        inspect_mixture,
        verify_prepared,
    )
    from peft_pretraining.data.mixture import Mixture, open_dataset

    names = _names(args)
    verified = sum(map(verify_prepared, names)) if args.verify else None
    options = {name: getattr(args, name) for name in ("documents", "max_length", "text_field", "data_lanes")}
    # A single data set may have one split that cannot be opened.
    data = open_dataset(args.dataset, "train", text_field=args.text_field) if len(names) > 1 else None
    if isinstance(data, Mixture):
        figures = inspect_mixture(data, _available_tokenizer(args), **options)
        text = format_mixture(figures)
    else:
        figures = inspect_dataset(names[0], _available_tokenizer(args), **options)
        text = format_inspection(figures)
    if verified is not None:
        text = f"all {verified} files verified by their checksums\n{text}"
    return figures | {"verified_files": verified}, text


def _tokenizer_for(args: argparse.Namespace) -> Tokenizer:
    from peft_pretraining.data.mixture import open_dataset
    from peft_pretraining.data.tokenizer import load_tokenizer

    return load_tokenizer(args.tokenizer or open_dataset(args.dataset, "train").default_tokenizer)


def _available_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer of --tokenizer, or the data set's; None if the latter would be loaded from the hub."""
    from peft_pretraining.data.source import prepared_folder

    names = _names(args)
    has_tokenizer = (len(names) == 1 and names[0] in DEMOS) or any(prepared_folder(name) is not None for name in names)
    return _tokenizer_for(args) if args.tokenizer or has_tokenizer else None
