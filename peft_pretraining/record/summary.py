"""Reads the rows of a run's metrics.jsonl, and summarises its results for the terminal, the report and the dashboard."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.training.stop import MARKER_FILE

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
    """Returns a run's results by name; a figure that the record lacks (earlier version) is None.

    The final figures are those of the evaluation after the last update; None for a run that has not made all its updates.
    document: the contents of run.json. rows: the rows of metrics.jsonl. Memory is in bytes; "states" are parameters, support and
    moments together.
    """
    plan = document.get("plan") or {}
    updates = [row for row in rows if row.get("loss") is not None]
    evaluations = [row for row in rows if row.get("final_eval_perplexity") is not None]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    at_end = is_finished(document, rows) and last.get("update_step") == reached(rows)
    final: Row = last if at_end else {}
    rates = [row["throughput_tokens"] for row in updates if row.get("throughput_tokens")]
    states = [states_bytes(row) for row in updates]
    return {
        "parameters": (plan.get("parameters") or {}).get("total"),
        "full_rank_parameters": plan.get("full_rank_parameters"),
        "updates": updates[-1].get("update_step", 0) if updates else 0,
        "tokens": updates[-1].get("tokens_seen", 0) if updates else 0,
        "first_perplexity": first.get("final_eval_perplexity"),
        "first_evaluation_step": first.get("update_step"),
        "last_perplexity": last.get("final_eval_perplexity"),
        "last_evaluation_step": last.get("update_step"),
        "final_perplexity": final.get("final_eval_perplexity"),
        "final_evaluation_step": final.get("update_step"),
        "final_bits_per_byte": final.get("final_eval_bits_per_byte"),
        "evaluation_tokens": last.get("final_eval_tokens"),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "training_seconds": seconds_of(updates)[-1] if rates else None,
        # The newest value: ReLoRA's record begins with the rows of the full-rank run that it started from.
        "states_bytes": next((value for value in reversed(states) if value is not None), None),
        "peak_memory_bytes": max((row["max_memory"] for row in updates if row.get("max_memory")), default=None),
    }


def reached(rows: Sequence[Row]) -> int:
    """Returns the last recorded update step, whether its loss was finite or not."""
    return max((int(row.get("update_step") or 0) for row in rows), default=0)


def tokens_seen(rows: Sequence[Row]) -> int:
    """Returns the tokens of text seen up to the last recorded update."""
    return max((int(row.get("tokens_seen") or 0) for row in rows), default=0)


def is_finished(document: Mapping[str, Any], rows: Sequence[Row]) -> bool:
    """Tells whether the run has made all its updates; True if run.json does not say how many."""
    updates, tokens = _length(document)
    return tokens_seen(rows) >= tokens if tokens is not None else updates is None or reached(rows) >= updates


def status(document: Mapping[str, Any], rows: Sequence[Row], stop: Mapping[str, Any] | None) -> str:
    """Returns the run's state in words: finished, or the updates made so far. stop: see `read_stop`."""
    if is_finished(document, rows):
        return "finished"
    # Updates after the last logged one are only in stopped.json.
    made = [*rows, stop or {}]
    updates, tokens = _length(document)
    position = f"{reached(made):,} of {updates:,}"
    if tokens is not None:
        position = f"{reached(made):,} ({tokens_seen(made):,} of {tokens:,} tokens)"
    return f"unfinished after update {position}" if stop is None else f"stopped at update {position}"


def read_stop(run_folder: Path) -> dict[str, Any] | None:
    """Returns the contents of stopped.json, {} if it is damaged; None for a run that was not asked to stop."""
    path = run_folder / MARKER_FILE
    if not path.is_file():
        return None
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        return {**marker, **{name: int(marker[name]) for name in ("update_step", "tokens_seen") if name in marker}}
    except (ValueError, TypeError):
        return {}


def _length(document: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Returns the planned updates, and the planned tokens of a run whose length is given in tokens."""
    plan, arguments = document.get("plan") or {}, document.get("arguments") or {}
    updates, tokens = plan.get("num_training_steps") or arguments.get("num_training_steps"), plan.get("max_train_tokens")
    return None if updates is None else int(updates), None if tokens is None else int(tokens)


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
