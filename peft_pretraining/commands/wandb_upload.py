"""`python -m peft_pretraining wandb-upload RUN...`: sends the records of runs to wandb or trackio, as training sends them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_pretraining.commands.report.read import find_runs, load_run
from peft_pretraining.config.arguments import TRACKERS
from peft_pretraining.record.summary import read_stop, status, summary
from peft_pretraining.record.tracker import Tracker
from peft_pretraining.record.wandb_run import OF_ONE_RUN, WandbRun, one_line, open_wandb, wandb_mode, wandb_settings

HELP = "send the metrics.jsonl of runs to wandb, or trackio: the rows that it lacks, under the runs' own ids"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a folder of runs' folders")
    parser.add_argument(
        "--wandb",
        choices=("auto", "online", "offline"),
        default="auto",
        help="auto: online with a key, else offline (files for `wandb sync`) (default: %(default)s)",
    )
    parser.add_argument(
        "--tracker",
        choices=TRACKERS,
        default="wandb",
        help="trackio: to the dashboard that scripts/dashboard.sh opens; not for a run in progress (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Sends every run. Raises ValueError for a folder without a run, an unreadable record, and failures of wandb."""
    folders = find_runs(args.runs)
    for name in OF_ONE_RUN:
        if len(folders) > 1 and os.environ.get(name):
            raise ValueError(f"{name}={os.environ[name]} names one run, and {len(folders)} are given; unset it, or name one run")
    mode = None if args.tracker == "trackio" else wandb_mode(args.wandb)
    if mode == "disabled":
        raise ValueError("WANDB_MODE or WANDB_DISABLED turns wandb off; unset it, or give --wandb online or --wandb offline")
    for folder in folders:
        _upload(folder, mode)
    return 0


def _upload(folder: Path, mode: str | None) -> None:
    document, rows = load_run(folder)
    settings = wandb_settings(document, folder)
    settings["id"] = os.environ.get("WANDB_RUN_ID", "").strip() or settings["id"]
    try:
        tracker = _open(folder, settings, mode)
        count = tracker.send_missing(rows)
        tracker.finish({"status": status(document, rows, read_stop(folder)), **summary(document, rows)})
    except Exception as error:
        # A refused key, a lost network, an old version: wandb raises many types.
        hint = "" if mode is None else "; --wandb offline needs no network"
        raise ValueError(f"{folder}: {one_line(error)}{hint}") from None
    others = "" if count == len(rows) else f"; {tracker.name} has the others"
    print(f"{folder}: {count:,} of {len(rows):,} rows sent as run {tracker.run_name}{others}")


def _open(folder: Path, settings: Mapping[str, Any], mode: str | None) -> Tracker:
    """Opens the run at wandb in a mode of wandb's, or at trackio with None. Raises whatever the library raises."""
    if mode is not None:
        return WandbRun(open_wandb(folder, settings, mode, limit_s=None))
    from peft_pretraining.record.trackio_run import TrackioRun

    return TrackioRun(settings)
