"""Reads the rows of a run's metrics.jsonl, and summarises its results for the terminal, the report and the dashboard."""

from __future__ import annotations

import filecmp
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from peft_pretraining.training.stop import MARKER_FILE

METRICS_FILE = "metrics.jsonl"
# Prefixes of the keys of figures: numbers, or null where a figure was not finite.
_FIGURES = (
    *("loss", "lr", "gradnorm", "tokens_seen", "throughput_", "flops_", "mfu", "max_memory", "memory_", "final_eval_"),
    *("skipped_", "bad_"),
)
# Keys of which the summary has the median over logged updates, beside tokens per second; see mfu.py.
_RATES = ("flops_per_second", "flops_per_second_dense", "mfu", "mfu_dense")

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


def keep_record(path: Path) -> Path:
    """Copies metrics.jsonl to the name that `old_record` gives, unless an equal copy exists; returns the copy. Raises OSError."""
    copies = path.parent.glob(f"{path.stem}.old-*{path.suffix}")
    equal = next((copy for copy in copies if filecmp.cmp(path, copy, shallow=False)), None)
    return equal or shutil.copyfile(path, old_record(path))


def summary(document: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Returns a run's results by name; a figure that the record lacks (earlier version) is None.

    The final figures are those of the evaluation after the last update; None for a run that has not made all its updates.
    document: the contents of run.json. rows: the rows of metrics.jsonl. Memory is in bytes; "states" are parameters, support and
    moments together.
    """
    plan = document.get("plan") or {}
    updates = [row for row in rows if row.get("loss") is not None]
    own = own_updates(document, updates)
    evaluations = [row for row in rows if row.get("final_eval_perplexity") is not None]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    at_end = is_finished(document, rows) and last.get("update_step") == reached(rows)
    final: Row = last if at_end else {}
    tokens_per_second = _median(own, "throughput_tokens")
    states = [states_bytes(row) for row in own]
    return {
        "parameters": (plan.get("parameters") or {}).get("total"),
        "full_rank_parameters": plan.get("full_rank_parameters"),
        "updates": reached(rows),
        "tokens": tokens_seen(rows),
        "first_perplexity": first.get("final_eval_perplexity"),
        "first_evaluation_step": first.get("update_step"),
        "last_perplexity": last.get("final_eval_perplexity"),
        "last_evaluation_step": last.get("update_step"),
        "final_perplexity": final.get("final_eval_perplexity"),
        "final_evaluation_step": final.get("update_step"),
        "final_bits_per_byte": final.get("final_eval_bits_per_byte"),
        "evaluation_tokens": last.get("final_eval_tokens"),
        "tokens_per_second": tokens_per_second,
        **{name: _median(own, name) for name in _RATES},
        "training_seconds": seconds_of(updates)[-1] if _median(updates, "throughput_tokens") is not None else None,
        "states_bytes": next((value for value in reversed(states) if value is not None), None),
        "peak_memory_bytes": max((row["max_memory"] for row in own if row.get("max_memory")), default=None),
    }


def own_updates(document: Mapping[str, Any], updates: Sequence[Row]) -> list[Row]:
    """Returns the rows of a run's own updates; ReLoRA's record begins with those of the full-rank run that it started from."""
    before = (document.get("warm_up") or {}).get("updates") or 0
    return [row for row in updates if int(row.get("update_step") or 0) > before]


def _median(rows: Sequence[Row], name: str) -> float | None:
    """Returns the median of a key over the rows that have it; None without such rows."""
    values = [row[name] for row in rows if row.get(name)]
    return statistics.median(values) if values else None


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
