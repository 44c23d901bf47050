"""Reads the rows of a run's metrics.jsonl, and summarises its results for the terminal, the report and the dashboard."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

METRICS_FILE = "metrics.jsonl"
# Prefixes of the keys of figures: numbers, or null where a figure was not finite.
_FIGURES = ("loss", "lr", "gradnorm", "tokens_seen", "throughput_", "max_memory", "memory_", "final_eval_", "skipped_", "bad_")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """The lines of a run's metrics.jsonl: the rows that can be read, and the numbers (from 1) of damaged lines."""

    rows: list[dict[str, Any]]
    damaged: list[int]

    @property
    def problem(self) -> str | None:
        """Names the damaged lines; None if there are none."""
        if not self.damaged:
            return None
        numbers = ", ".join(map(str, self.damaged[:5])) + (", ..." if len(self.damaged) > 5 else "")
        lines = f"line {numbers} is" if len(self.damaged) == 1 else f"{len(self.damaged):,} lines ({numbers}) are"
        return f"{METRICS_FILE}: {lines} damaged and left out"


def read_record(run_folder: Path) -> Record:
    """Reads a run's metrics.jsonl; a run without that file has an empty record. Raises OSError."""
    path, rows, damaged = run_folder / METRICS_FILE, [], []
    if path.is_file():
        # Not splitlines(), which also divides at characters that may stand within a damaged line.
        for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
            if (row := _row(line)) is not None:
                rows.append(row)
            elif line.strip():
                damaged.append(number)
    return Record(rows, damaged)


def _row(line: str) -> dict[str, Any] | None:
    """The row in a line; None unless it is a JSON object with the number of an update and figures that are numbers or null."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("update_step")) is not int:
        return None
    figures = [value for name, value in row.items() if name.startswith(_FIGURES)]
    return row if all(type(value) in (int, float, NoneType) for value in figures) else None


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl that can be read."""
    return read_record(run_folder).rows


def old_record(path: Path) -> Path:
    """Returns the first unused name beside metrics.jsonl under which an old one is kept: metrics.old-1.jsonl, ..."""
    number = 1
    while (old := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    return old


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
