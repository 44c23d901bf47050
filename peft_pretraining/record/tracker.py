"""The dashboard that gets a run's rows while it trains: wandb's, or trackio's on this machine (`--tracker`).

Rank 0 alone has one. Its failures cost one line and never stop the training: metrics.jsonl has everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from peft_pretraining.record.wandb_run import WandbRun, start_wandb


class Tracker(Protocol):
    """A run at a dashboard. Every method may raise whatever the dashboard's library raises.

    name: the dashboard's. run_name: what the dashboard knows the run by.
    """

    name: str
    run_name: str

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends a row of metrics.jsonl."""

    def send_missing(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Sends the rows of the record that the dashboard lacks, such as the last ones before a kill; returns how many."""

    def finish(self, figures: Mapping[str, Any], exit_code: int = 0) -> None:
        """Sends the run's results (`summary` and `status`), and ends the run at the dashboard."""


def start_tracker(run_folder: Path, settings: Mapping[str, Any]) -> Tracker | None:
    """Returns the run at the dashboard, or None if it is disabled or fails, which prints one warning.

    settings: those of `start_wandb`, and tracker (wandb, trackio; default: wandb).
    """
    if settings.get("tracker") == "trackio":
        from peft_pretraining.record.trackio_run import start_trackio

        return start_trackio(settings)
    run = start_wandb(run_folder, settings)
    return None if run is None else WandbRun(run)
