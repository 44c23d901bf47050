"""Reads the rows of a run's metrics.jsonl, and summarises its results for the terminal, the report and the dashboard."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"

Row = Mapping[str, Any]


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without a last line that a crash cut short; empty if there is no file."""
    path = run_folder / METRICS_FILE
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def summary(document: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Returns a run's results by name; a figure that the record lacks (stopped run, earlier version) is None.

    document: the contents of run.json. rows: the rows of metrics.jsonl. Memory is in bytes; "states" are parameters, support and
    moments together.
    """
    plan = document.get("plan") or {}
    updates = [row for row in rows if row.get("loss") is not None]
    evaluations = [row for row in rows if row.get("final_eval_perplexity") is not None]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    rates = [row["throughput_tokens"] for row in updates if row.get("throughput_tokens")]
    states = [states_bytes(row) for row in updates]
    return {
        "parameters": (plan.get("parameters") or {}).get("total"),
        "full_rank_parameters": plan.get("full_rank_parameters"),
        "updates": updates[-1].get("update_step", 0) if updates else 0,
        "tokens": updates[-1].get("tokens_seen", 0) if updates else 0,
        "first_perplexity": first.get("final_eval_perplexity"),
        "first_evaluation_step": first.get("update_step"),
        "final_perplexity": last.get("final_eval_perplexity"),
        "final_evaluation_step": last.get("update_step"),
        "final_bits_per_byte": last.get("final_eval_bits_per_byte"),
        "evaluation_tokens": last.get("final_eval_tokens"),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "training_seconds": seconds_of(updates)[-1] if rates else None,
        # The newest value: ReLoRA's record begins with the rows of the full-rank run that it started from.
        "states_bytes": next((value for value in reversed(states) if value is not None), None),
        "peak_memory_bytes": max((row["max_memory"] for row in updates if row.get("max_memory")), default=None),
    }


def states_bytes(row: Row) -> int | None:
    """Returns the measured bytes of parameters, support and moments together, or None if the row lacks them."""
    measured = [row.get(f"memory_{name}_measured") for name in ("parameters", "support", "optimizer")]
    return None if None in measured else sum(int(value) for value in measured if value is not None)


def seconds_of(updates: Sequence[Row]) -> list[float]:
    """Returns the seconds of training up to each logged update: the sum of tokens since the last row over the measured rate.

    Evaluation, saving and the time between a stop and the next start are not included. A row without a rate adds nothing.
    """
    total, tokens_before, times = 0.0, 0, []
    for row in updates:
        tokens, rate = row.get("tokens_seen") or tokens_before, row.get("throughput_tokens")
        total += (tokens - tokens_before) / rate if rate else 0.0
        tokens_before = tokens
        times.append(total)
    return times
