"""A run's folder as the report sees it: whatever of the record is there, and in words what is not."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft_pretraining.config.arguments import Arguments, as_dict
from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.memory.counts import paper_bytes, paper_estimate, parameter_counts
from peft_pretraining.record.recorder import METRICS_FILE, read_metrics
from peft_pretraining.record.summary import Row, seconds_of, summary
from peft_pretraining.training.stop import MARKER_FILE

FIGURES = "report.json"  # what a report's folder has
# How the names begin of what a report reads from metrics.jsonl; numbers, or null.
_NUMBERS = ("update_step", "tokens_seen", "loss", "throughput_", "max_memory", "memory_", "final_eval_")
_PRINTED_FROM = 0.1  # 10^9 bytes; the paper prints two digits behind the point


def load_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """run.json and the metrics of a run. Raises ValueError with what is missing."""
    document = _document(folder)
    rows = _rows(folder)
    if not rows:
        raise ValueError(f"{folder}: {METRICS_FILE} is missing or empty; the run has not logged an update yet")
    return document, rows


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Raises ValueError naming the line of a figure that is none."""
    rows = read_metrics(folder)
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            if name.startswith(_NUMBERS) and not isinstance(value, int | float | None):
                raise ValueError(
                    f"{folder / METRICS_FILE}: line {number}: {name} {value!r} is no number; the record is damaged there, and a "
                    "report needs it mended or that line taken out"
                )
    return rows


def _document(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no run.json in it; name a run's folder, such as the --save_dir of torchrun_main.py")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); the record of this run is damaged") from None
    if not isinstance(document, dict) or not all(isinstance(document.get(name), dict) for name in ("arguments", "plan")):
        raise ValueError(f"{path}: not the record of a run (no arguments, or no plan)")
    return document


@dataclass(frozen=True)
class RunRecord:
    """A run as it is recorded."""

    folder: Path
    document: dict[str, Any]
    arguments: dict[str, Any]  # all of this version's, those of an older record by their defaults
    rows: Sequence[Row]  # of metrics.jsonl
    figures: dict[str, Any]  # summary.summary
    stopped: dict[str, Any] | None  # stopped.json
    notes: tuple[str, ...]  # what is missing, one sentence each

    @functools.cached_property
    def updates(self) -> Sequence[Row]:
        """The rows that have a loss."""
        return [row for row in self.rows if _is_number(row.get("loss"))]

    @functools.cached_property
    def evaluations(self) -> Sequence[Row]:
        """The rows that have a held-out perplexity."""
        return [row for row in self.rows if _is_number(row.get("final_eval_perplexity"))]

    @property
    def plan(self) -> dict[str, Any]:
        """The plan as recorded; of an older version without some of its entries."""
        return dict(self.document["plan"])

    @property
    def model(self) -> str:
        """Name of the model's configuration, e.g. llama_60m."""
        return str((self.plan.get("model") or {}).get("name") or Path(str(self.arguments["model_config"])).stem)

    @property
    def method(self) -> str:
        """full, lowrank, sltrain, ..."""
        return str(self.arguments["peft_model"])

    @property
    def seed(self) -> int:
        """The run's --seed."""
        return int(self.arguments["seed"])

    @property
    def reached(self) -> int:
        """The last update step that the record knows of, whether its loss was finite or not."""
        return max((int(row.get("update_step") or 0) for row in self.rows), default=0)

    @property
    def tokens_seen(self) -> int:
        """Tokens of text up to there."""
        return max((int(row.get("tokens_seen") or 0) for row in self.rows), default=0)

    @property
    def finished(self) -> bool:
        """Whether it made all its updates."""
        most = self.plan.get("max_train_tokens")
        if most is not None:
            return self.tokens_seen >= int(most)
        return self.reached >= int(self.plan.get("num_training_steps") or self.arguments["num_training_steps"])

    @property
    def final_perplexity(self) -> float | None:
        """Held-out perplexity after the last update; None where the run did not get there."""
        at_end = self.finished and self.figures["final_evaluation_step"] == self.reached
        return self.figures["final_perplexity"] if at_end else None

    @property
    def status(self) -> str:
        """finished, or how far it came."""
        if self.finished:
            return "finished"
        planned = self.plan.get("num_training_steps") or self.arguments["num_training_steps"]
        how = "stopped" if self.stopped is not None else "unfinished"
        return f"{how} after update {self.reached:,} of {planned:,}"

    @property
    def paper_memory(self) -> float | None:
        """Parameters and moments by the paper's convention, 10^9 bytes; None where the record lacks the model.

        Rounded as the paper prints it, but for models so small that nothing would be left.
        """
        return _paper_memory(self.plan, self.arguments)

    def predicted(self, name: str) -> int | None:
        """Bytes of a class (or "peak") by the account, on the device that it ran on."""
        key = f"memory_{name}_predicted"
        found = [int(row[key]) for row in self.updates if row.get(key) is not None]
        return found[-1] if found else self._planned(name)

    def _planned(self, name: str) -> int | None:
        value = (self.plan.get("bytes") or {}).get(name)
        return None if value is None else int(value)

    def measured(self, name: str) -> int | None:
        """Measured bytes of parameters, support or optimizer; of "peak" the largest seen."""
        if name == "peak":
            peak: int | None = self.figures["peak_memory_bytes"]
            return peak
        key = f"memory_{name}_measured"
        return next((int(row[key]) for row in reversed(self.updates) if row.get(key) is not None), None)

    def axis(self, name: str) -> tuple[list[float], list[float]]:
        """Positions of updates and of evaluations on an axis: "steps", "tokens" or "seconds" of training."""
        steps = [int(row.get("update_step") or 0) for row in self.updates]
        positions: list[float]
        if name == "steps":
            return [float(step) for step in steps], [float(row.get("update_step") or 0) for row in self.evaluations]
        positions = seconds_of(self.updates) if name == "seconds" else _tokens(self.updates)
        return positions, [_at(int(row.get("update_step") or 0), steps, positions) for row in self.evaluations]


def _tokens(updates: Sequence[Row]) -> list[float]:
    found, last = [], 0.0
    for row in updates:
        last = float(row.get("tokens_seen") or last)
        found.append(last)
    return found


def _at(step: int, steps: list[int], positions: list[float]) -> float:
    """The position at an update between logged ones, by a straight line; 0 before the first."""
    before_step, before = 0, 0.0
    for logged, position in zip(steps, positions, strict=True):
        if logged >= step:
            share = (step - before_step) / (logged - before_step) if logged > before_step else 1.0
            return before + share * (position - before)
        before_step, before = logged, position
    return before


def find_runs(paths: list[Path]) -> list[Path]:
    """Folders of runs: those named, and those one level below a named folder of runs; each once, in order.

    A sweep's log, FOLDER.log beside a named folder, and its report are passed over: runs/my-sweep/* names them too. Of a folder
    of runs those come first whose names say least, as a sweep gives them: the plain setting before those with something added.

    Raises ValueError naming a path that is neither.
    """
    found: dict[Path, Path] = {}
    passed_over = {path.with_name(f"{path.name}.log") for path in paths}
    if len(paths) > 1:
        passed_over |= {path for path in paths if (path / FIGURES).is_file() and not (path / "run.json").is_file()}
    for path in (path for path in paths if path not in passed_over):
        inside = [path] if (path / "run.json").is_file() else []
        if not inside and path.is_dir():
            inside = [child for child in path.iterdir() if (child / "run.json").is_file()]
            inside.sort(key=lambda child: (child.name.count("-"), child.name))
        if not inside:
            raise ValueError(
                f"{path}: no run.json in it or in a folder below; name runs' folders, such as the --save_dir of "
                "torchrun_main.py, or a folder of them"
            )
        for folder in inside:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read_run(folder: Path) -> RunRecord:
    """The record of a run, with notes on what it lacks. Raises ValueError where run.json is none, or a figure no number."""
    document = _document(folder)
    rows = _rows(folder)
    run = RunRecord(
        folder=folder,
        document=document,
        arguments=_with_defaults(document["arguments"]),
        rows=rows,
        figures=summary(document, rows),
        stopped=_stopped(folder),
        notes=(),
    )
    return replace(run, notes=tuple(_notes(run)))


def _with_defaults(said: dict[str, Any]) -> dict[str, Any]:
    """An older record lacks newer arguments, or left them open: it ran as their defaults do."""
    return {**as_dict(Arguments()), **{name: value for name, value in said.items() if value is not None}}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _stopped(folder: Path) -> dict[str, Any] | None:
    path = folder / MARKER_FILE
    try:
        marker = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return {}
    return marker if marker is None or isinstance(marker, dict) else {}


def _paper_memory(plan: dict[str, Any], arguments: dict[str, Any]) -> float | None:
    known = {field.name for field in fields(ModelConfig)}
    try:
        model = ModelConfig(**{key: value for key, value in (plan.get("model") or {}).items() if key in known})
        method = str(arguments["peft_model"])
        counts = parameter_counts(
            model,
            method=method,
            rank=int(arguments["rank"]),
            sparsity=float(arguments["sp_ratio"]),
            support=str(arguments["support"]),
        )
        printed = paper_estimate(counts, method)["total_G"]
    except (TypeError, ValueError):
        return None
    if printed >= _PRINTED_FROM:
        return printed
    return sum(paper_bytes(counts)) / 1e9


def _notes(run: RunRecord) -> list[str]:
    """What is missing in a run's record, one sentence each."""
    if not run.rows:
        return [f"no update is logged yet ({METRICS_FILE} is missing or empty)"]
    notes = []
    if not run.finished:
        notes.append(f"{run.status}: its last perplexity is in the table of runs, and counts in no mean")
    infinite = sum("final_eval_perplexity" in row and row["final_eval_perplexity"] is None for row in run.rows)
    if infinite:
        notes.append(f"{infinite:,} evaluations gave no finite perplexity")
    elif not run.evaluations:
        notes.append("never evaluated: no held-out perplexity")
    if run.evaluations and run.finished and run.final_perplexity is None:
        notes.append(
            f"no perplexity after its last update; the last one is that of update {run.figures['final_evaluation_step']:,}"
        )
    nonfinite = sum("loss" in row and row["loss"] is None for row in run.rows)
    if nonfinite:
        notes.append(f"{nonfinite:,} logged updates had a non-finite loss")
    skipped = max((int(row.get("skipped_updates") or 0) for row in run.rows), default=0)
    if skipped:
        notes.append(f"{skipped:,} updates were skipped (numbers that were not finite)")
    if run.updates and run.figures["states_bytes"] is None:
        notes.append(
            "of an earlier version: memory by class was not measured"
            + ("" if run.predicted("peak") else ", nor the peak predicted")
        )
    if run.updates and run.figures["tokens_per_second"] is None:
        notes.append("no throughput is recorded, so there is no time axis for it")
    unknown = sorted(set(run.document["arguments"]) - set(as_dict(Arguments())))
    if unknown:
        notes.append(f"recorded with arguments that this version does not know: {', '.join(unknown)}")
    return notes
