"""`python -m peft_pretraining data`: build and find data sets."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peft_pretraining.data.demo import build_demo

HELP = "build data sets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    demo = actions.add_parser("demo", help="build the embedded corpus and its tokenizer, once, and say where they are")
    demo.add_argument("--cache_dir", type=Path, help="where to build (default: $SPARSE_LORA_CACHE or ~/.cache/sltrain)")
    demo.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Build the corpus if it is not there yet and print what it holds."""
    folder = build_demo(args.cache_dir)
    figures = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    if args.json:
        print(json.dumps({"folder": str(folder), **figures}))
    else:
        print(
            f"{figures['train_documents']:,} documents to train on ({figures['train_bytes'] / 1e6:.1f} MB), "
            f"{figures['validation_documents']:,} held out, a tokenizer of {figures['vocab_size']:,} pieces: {folder}"
        )
    return 0
