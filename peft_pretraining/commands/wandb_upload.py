"""`python -m peft_pretraining wandb-upload RUN...`: sends the records of runs to wandb, with the keys that training sends."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from peft_pretraining.commands.report.read import find_runs, load_run
from peft_pretraining.record.summary import summary
from peft_pretraining.record.wandb_run import (
    OF_ONE_RUN,
    finish_wandb,
    one_line,
    open_wandb,
    send_missing,
    wandb_mode,
    wandb_settings,
)

HELP = "send the metrics.jsonl of runs to wandb: the rows that wandb lacks, under the runs' own ids"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a folder of runs' folders")
    parser.add_argument(
        "--wandb",
        choices=("auto", "online", "offline"),
        default="auto",
        help="auto: online with a key, else offline (files for `wandb sync`) (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Sends every run. Raises ValueError for a folder without a run, an unreadable record, and failures of wandb."""
    folders = find_runs(args.runs)
    for name in OF_ONE_RUN:
        if len(folders) > 1 and os.environ.get(name):
            raise ValueError(f"{name}={os.environ[name]} names one run, and {len(folders)} are given; unset it, or name one run")
    mode = wandb_mode(args.wandb)
    if mode == "disabled":
        raise ValueError("WANDB_MODE or WANDB_DISABLED turns wandb off; unset it, or give --wandb online or --wandb offline")
    for folder in folders:
        _upload(folder, mode)
    return 0


def _upload(folder: Path, mode: str) -> None:
    document, rows = load_run(folder)
    settings = wandb_settings(document, folder)
    settings["id"] = os.environ.get("WANDB_RUN_ID", "").strip() or settings["id"]
    try:
        wandb_run = open_wandb(folder, settings, mode, limit_s=None)
        count = send_missing(wandb_run, rows)
        finish_wandb(wandb_run, summary(document, rows))
    except Exception as error:  # a refused key, a lost network, an old version: wandb raises many types
        raise ValueError(f"{folder}: {one_line(error)}; --wandb offline needs no network") from None
    others = "" if count == len(rows) else "; wandb has the others"
    print(f"{folder}: {count:,} of {len(rows):,} rows sent as run {wandb_run.id}{others}")
