"""`python -m peft_pretraining data`: builds, fetches, prepares and inspects data sets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.data.demo import build_demo

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer

HELP = "build, fetch, prepare and inspect data sets"


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else _at_least_one(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, does: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=does, description=does, allow_abbrev=False)
        added.add_argument("--json", action="store_true", help="print the figures as JSON")
        return added

    def add_source(added: argparse.ArgumentParser) -> None:
        added.add_argument("--dataset", required=True, help="as for training: c4, demo, folder, file, glob, hub:NAME")
        added.add_argument("--text_field", default="text", help="field of a record that holds the text (default: text)")

    demo = action("demo", "build the embedded corpus and its tokenizer, once, and print their folder")
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
        "--on_bad_record",
        choices=("skip", "fail"),
        default="skip",
        help="records without text: skip (and count; more than a quarter of a file is an error) | fail (default: skip)",
    )

    inspect = action("inspect", "show counts, lengths, bad records and a few documents of a data set")
    add_source(inspect)
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


def run(args: argparse.Namespace) -> int:
    """Performs the action and prints its figures. Exit code 0; errors are raised."""
    actions: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], str]]] = {
        "demo": _demo,
        "fetch": _fetch,
        "prepare": _prepare,
        "inspect": _inspect,
    }
    figures, text = actions[args.action](args)
    print(json.dumps(figures) if args.json else text)
    return 0


def _demo(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    folder = build_demo(args.cache_dir)
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


def _inspect(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from peft_pretraining.data.inspection import format_inspection, inspect_dataset, verify_prepared

    verified = verify_prepared(args.dataset) if args.verify else None
    figures = inspect_dataset(
        args.dataset,
        _available_tokenizer(args),
        documents=args.documents,
        max_length=args.max_length,
        text_field=args.text_field,
        data_lanes=args.data_lanes,
    )
    text = format_inspection(figures)
    if verified is not None:
        text = f"all {verified} files verified by their checksums\n{text}"
    return figures | {"verified_files": verified}, text


def _tokenizer_for(args: argparse.Namespace) -> Tokenizer:
    from peft_pretraining.data.source import open_source
    from peft_pretraining.data.tokenizer import load_tokenizer

    return load_tokenizer(args.tokenizer or open_source(args.dataset, "train").default_tokenizer)


def _available_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer of --tokenizer, or the data set's; None if the latter would be loaded from the hub."""
    from peft_pretraining.data.source import prepared_folder

    has_tokenizer = args.dataset == "demo" or prepared_folder(args.dataset) is not None
    return _tokenizer_for(args) if args.tokenizer or has_tokenizer else None
