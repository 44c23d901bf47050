"""Reads a run's record for the report, with notes on missing parts."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft_pretraining.config.arguments import Arguments, as_dict
from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.memory.counts import paper_bytes, paper_estimate, parameter_counts
from peft_pretraining.record import summary
from peft_pretraining.record.summary import METRICS_FILE, Row, own_updates, read_record, seconds_of

# File of a report's figures, in its folder.
FIGURES = "report.json"
# In 10^9 bytes: below this, the paper's two decimals round too much away.
_PRINTED_FROM = 0.1


def load_run(folder: Path | str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads run.json and the metrics of a run, with a notice of damaged lines. Raises ValueError naming what is missing."""
    folder = Path(folder)
    document, record = _document(folder), read_record(folder)
    rows = record.rows
    if record.problem is not None:
        print(f"notice: {folder}: {record.problem}", file=sys.stderr)
    if not rows:
        raise ValueError(f"{folder}: {METRICS_FILE} is missing or has no readable line; the run has not logged an update yet")
    return document, rows


def _document(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder}: has no run.json; name a run's folder, such as the --save_dir of torchrun_main.py")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); the record of this run is damaged; each checkpoint of the run has a copy of it"
        ) from None
    if not isinstance(document, dict) or not all(isinstance(document.get(name), dict) for name in ("arguments", "plan")):
        raise ValueError(f"{path}: not the record of a run (no arguments, or no plan)")
    return document


@dataclass(frozen=True)
class RunRecord:
    """The record of a run: its run.json, metrics and figures."""

    folder: Path
    document: dict[str, Any]
    arguments: dict[str, Any]  # all arguments of this version; defaults for those that an older record lacks
    rows: Sequence[Row]  # of metrics.jsonl
    figures: dict[str, Any]  # summary.summary
    stopped: dict[str, Any] | None  # stopped.json
    notes: tuple[str, ...]  # what is missing, one sentence each

    @functools.cached_property
    def updates(self) -> Sequence[Row]:
        """The rows with a training loss."""
        return [row for row in self.rows if _is_number(row.get("loss"))]

    @functools.cached_property
    def evaluations(self) -> Sequence[Row]:
        """The rows with a held-out perplexity."""
        return [row for row in self.rows if _is_number(row.get("final_eval_perplexity"))]

    @property
    def plan(self) -> dict[str, Any]:
        """The plan as recorded; older versions recorded fewer entries."""
        return dict(self.document["plan"])

    @property
    def model(self) -> str:
        """Name of the model's configuration, e.g. llama_60m."""
        return str((self.plan.get("model") or {}).get("name") or Path(str(self.arguments["model_config"])).stem)

    @property
    def method(self) -> str:
        """Name of the method: full, lowrank, sltrain, ..."""
        return str(self.arguments["peft_model"])

    @property
    def data_order(self) -> str:
        """The order of the training data, also if none was asked for; earlier versions had no other order than lanes."""
        return str((self.document.get("dataset") or {}).get("order", "lanes"))

    @property
    def seed(self) -> int:
        """The run's --seed."""
        return int(self.arguments["seed"])

    @property
    def reached(self) -> int:
        """The last recorded update step, whether its loss was finite or not."""
        return summary.reached(self.rows)

    @property
    def tokens_seen(self) -> int:
        """Tokens of text seen up to the last recorded update."""
        return summary.tokens_seen(self.rows)

    @property
    def finished(self) -> bool:
        """Whether the run made all its updates."""
        return summary.is_finished(self.document, self.rows)

    @property
    def final_perplexity(self) -> float | None:
        """Held-out perplexity after the last update; None if the run did not reach it or was not evaluated there."""
        value: float | None = self.figures["final_perplexity"]
        return value

    @property
    def status(self) -> str:
        """The run's state in words: finished, or the updates made so far."""
        return summary.status(self.document, self.rows, self.stopped)

    @property
    def paper_memory(self) -> float | None:
        """Parameters and moments by the paper's convention, 10^9 bytes; None if the record lacks the model.

        Rounded as in the paper, except for models so small that rounding would leave zero.
        """
        return _paper_memory(self.plan, self.arguments)

    def predicted(self, name: str) -> int | None:
        """Predicted bytes of a class (or "peak") on the device of the run."""
        key = f"memory_{name}_predicted"
        values = [int(row[key]) for row in self.updates if row.get(key) is not None]
        return values[-1] if values else self._planned(name)

    def _planned(self, name: str) -> int | None:
        value = (self.plan.get("bytes") or {}).get(name)
        return None if value is None else int(value)

    def measured(self, name: str) -> int | None:
        """Measured bytes of parameters, support or optimizer; for "peak" the largest measurement."""
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
    counts, last = [], 0.0
    for row in updates:
        last = float(row.get("tokens_seen") or last)
        counts.append(last)
    return counts


def _at(step: int, steps: list[int], positions: list[float]) -> float:
    """Interpolates the position of an update linearly between logged updates; it is 0 before the first one."""
    last_step, last_position = 0, 0.0
    for logged, position in zip(steps, positions, strict=True):
        if logged >= step:
            share = (step - last_step) / (logged - last_step) if logged > last_step else 1.0
            return last_position + share * (position - last_position)
        last_step, last_position = logged, position
    return last_position


def find_runs(paths: list[Path]) -> list[Path]:
    """Returns the folders of runs: those named, and those one level below a named folder; each once, in order.

    A sweep's logs (FOLDER.log beside FOLDER) and its report are skipped, as the pattern runs/my-sweep/* matches them too. Within
    a folder, runs with fewer parts in their name come first: a sweep adds parts to the name of the plain setting.

    Raises ValueError naming a path that holds no run.
    """
    folders: dict[Path, Path] = {}
    skipped = {Path(f"{path.absolute()}.log") for path in paths}
    if len(paths) > 1:
        skipped |= {path.absolute() for path in paths if (path / FIGURES).is_file() and not (path / "run.json").is_file()}
    for path in (path for path in paths if path.absolute() not in skipped):
        inside = [path] if (path / "run.json").is_file() else []
        if not inside and path.is_dir():
            inside = [child for child in path.iterdir() if (child / "run.json").is_file()]
            inside.sort(key=lambda child: (child.name.count("-"), child.name))
        if not inside:
            raise ValueError(
                f"{path}: no run.json in it or one level below; name runs' folders, such as the --save_dir of "
                "torchrun_main.py, or a folder of them"
            )
        for folder in inside:
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def read_run(folder: Path) -> RunRecord:
    """Reads a run, with notes on missing parts and damaged lines. Raises ValueError if run.json is not the record of a run."""
    document, record = _document(folder), read_record(folder)
    rows = record.rows
    run = RunRecord(
        folder=folder,
        document=document,
        arguments=_with_defaults(document["arguments"]),
        rows=rows,
        figures=summary.summary(document, rows),
        stopped=summary.read_stop(folder),
        notes=(),
    )
    problem = [] if record.problem is None else [record.problem]
    return replace(run, notes=(*problem, *_notes(run)))


def _with_defaults(recorded: dict[str, Any]) -> dict[str, Any]:
    """Adds the defaults of arguments that an older record lacks or left open; the run used them."""
    return {**as_dict(Arguments()), **{name: value for name, value in recorded.items() if value is not None}}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _paper_memory(plan: dict[str, Any], arguments: dict[str, Any]) -> float | None:
    field_names = {field.name for field in fields(ModelConfig)}
    try:
        model = ModelConfig(**{key: value for key, value in (plan.get("model") or {}).items() if key in field_names})
        method, optimizer = str(arguments["peft_model"]), str(arguments["optimizer"])
        counts = parameter_counts(
            model,
            method=method,
            rank=int(arguments["rank"]),
            sparsity=float(arguments["sp_ratio"]),
            support=str(arguments["support"]),
        )
        printed = paper_estimate(counts, method, optimizer)["total_G"]
    except (TypeError, ValueError):
        return None
    if printed >= _PRINTED_FROM:
        return printed
    return sum(paper_bytes(counts, optimizer)) / 1e9


def _notes(run: RunRecord) -> list[str]:
    """What a reader of the figures should know of a run's record, one sentence each."""
    if not run.rows:
        return [f"no update is logged yet ({METRICS_FILE} is missing or empty)"]
    notes = []
    if not run.finished:
        last, step = run.figures["last_perplexity"], run.figures["last_evaluation_step"]
        evaluated = "" if last is None else f" (after update {step:,} it was {last:,.2f})"
        notes.append(f"{run.status}: no final perplexity{evaluated}, not in the mean")
    infinite = sum("final_eval_perplexity" in row and row["final_eval_perplexity"] is None for row in run.rows)
    if infinite:
        notes.append(f"{infinite:,} evaluations gave no finite perplexity")
    elif not run.evaluations:
        notes.append("never evaluated: no held-out perplexity")
    if run.evaluations and run.finished and run.final_perplexity is None:
        notes.append(
            f"no perplexity after its last update; the last evaluation was at update {run.figures['last_evaluation_step']:,}"
        )
    nonfinite = sum("loss" in row and row["loss"] is None for row in run.rows)
    if nonfinite:
        notes.append(f"{nonfinite:,} logged updates had a non-finite loss")
    skipped = max((int(row.get("skipped_updates") or 0) for row in run.rows), default=0)
    if skipped:
        notes.append(f"{skipped:,} updates were skipped (non-finite gradients or loss)")
    own = own_updates(run.document, run.updates)
    if own and run.figures["states_bytes"] is None:
        notes.append(
            "recorded by an earlier version: memory by class was not measured"
            + ("" if run.predicted("peak") else ", nor the peak predicted")
        )
    if own and run.figures["tokens_per_second"] is None:
        notes.append("no throughput is recorded, so the run is missing from plots against time")
    for change in run.document.get("changes") or ():
        name, then, now, step = (change.get(key) for key in ("name", "then", "now", "after_update"))
        notes.append(f"resumed after update {step} with another {name} ({now} instead of {then}): no single command repeats it")
    unknown = sorted(set(run.document["arguments"]) - set(as_dict(Arguments())))
    if unknown:
        notes.append(f"recorded with arguments that this version does not know: {', '.join(unknown)}")
    return notes
