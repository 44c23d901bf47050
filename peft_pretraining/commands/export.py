"""`python -m peft_pretraining export`: writes a checkpoint as a dense model for transformers, or with its factors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "write a checkpoint's model as a dense LLaMA for transformers, or with its factors kept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="step_XXXXXXXX folder, or a run's folder")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")
    parser.add_argument(
        "--keep_factors",
        action="store_true",
        help="write B, A and the sparse values instead of dense weights: half the size; load with "
        "peft_pretraining.export.load_factored",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype of the weights (default: the run's)")
    parser.add_argument(
        "--push",
        metavar="OWNER/MODEL",
        help="also upload the export to this repository on the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN; "
        "a new repository is private",
    )
    parser.add_argument("--public", action="store_true", help="with --push: make a new repository public, or use a public one")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the export, uploads it if asked to, and prints a summary. Raises ValueError or OSError for refused values."""
    from peft_pretraining.export.push import check_push, push
    from peft_pretraining.export.write import export

    if args.push is not None:
        check_push(args.push)
    elif args.public:
        raise ValueError("--public has no effect without --push OWNER/MODEL; add it, or leave --public out")
    exported = export(args.checkpoint, args.out, keep_factors=args.keep_factors, dtype=args.dtype, name=args.push)
    figures = {"folder": str(exported.folder), "bytes": exported.num_bytes, "dtype": exported.dtype}
    kind = "factored" if args.keep_factors else "dense"
    if not args.json:
        size = f"{exported.num_bytes / 2**30:.2f} GiB of {exported.dtype}"
        print(f"{exported.folder}: {kind} model, {size}; see its README.md to load it", flush=True)
    if args.push is not None:
        figures["pushed"] = push(exported.folder, args.push, public=args.public)
    if args.json:
        print(json.dumps(figures))
    elif args.push is not None:
        print(f"uploaded to {figures['pushed']}")
    return 0
