"""Records the run with trackio, whose dashboard (scripts/dashboard.sh) needs no account: its database is on this machine.

trackio finds a run by its name alone, and adds a row for a step that it already has. So the name ends in the run's id, and a run
that goes on first removes the rows that metrics.jsonl does not have.
"""

from __future__ import annotations

import contextlib
import io
import os
import sqlite3
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.record.wandb_run import ONCE, WANDB_PROJECT, one_line, row_key, shown

INSTALL = "python -m pip install trackio"
# trackio has no summary. Keys with one value per run become bars, which compare runs, in a section of the part before the slash.
_SUMMARY = "summary/"
# Each would send the rows to another machine.
_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def start_trackio(settings: Mapping[str, Any]) -> TrackioRun | None:
    """Returns the trackio run, or None if trackio is absent or fails, which prints one warning. settings: see `start_tracker`."""
    try:
        return TrackioRun(settings)
    except ModuleNotFoundError as error:
        problem = f"it is not installed: {INSTALL}" if error.name == "trackio" else one_line(error)
    except Exception as error:
        # A database that cannot be written, or another version's functions.
        problem = one_line(error)
    print(f"warning: trackio is off ({problem}); all metrics are still written to metrics.jsonl", file=sys.stderr)
    return None


class TrackioRun:
    """A run in trackio's database: a new one, or the one of an earlier start of the same run."""

    name = "trackio"

    def __init__(self, settings: Mapping[str, Any]):
        """Opens the run and prints where it is recorded. Raises whatever trackio raises."""
        for name in _REMOTE:
            if os.environ.get(name):
                raise ValueError(f"{name} names a server, and --tracker trackio records on this machine only; unset it")
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._database = Path(SQLiteStorage.get_project_db_path(WANDB_PROJECT))
        self.run_name = self._earlier_name(settings["id"]) or "-".join(filter(None, (settings["name"], settings["id"])))
        self._num_rows = self._last_step = 0
        self._once: dict[str, Any] = {}
        self._usual_show, self._package = warnings.showwarning, str(Path(trackio.__file__).parent)
        warnings.showwarning = self._show_warning
        given: dict[str, Any] = {
            "project": WANDB_PROJECT,
            "name": self.run_name,
            "group": settings.get("group"),
            "resume": "allow",
        }
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._run = trackio.init(**given, config=dict(settings["config"]), embed=False)
        except Exception:
            warnings.showwarning = self._usual_show
            raise
        place = f"{self.run_name} in {self._database.parent}"
        print(f"trackio: recording {place} (`bash scripts/dashboard.sh` shows it)", file=sys.stderr)

    def _earlier_name(self, run_id: str | None) -> str | None:
        """The name that an earlier start gave to the run with this id, whose folder or --name may have changed."""
        with self._connected() as database:
            names = database.execute("SELECT DISTINCT run_name FROM metrics").fetchall() if run_id else []
        return next((name for (name,) in names if name.endswith(f"-{run_id}")), None)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Opens trackio's database. If there is none yet, opens an empty one in memory with the same table."""
        from trackio.fragments import import_inbox_dir

        # On a network file system trackio first writes rows to files, which its dashboard adds to the database.
        import_inbox_dir()
        exists = self._database.is_file()
        with contextlib.closing(sqlite3.connect(self._database if exists else ":memory:", timeout=30)) as database, database:
            if not exists:
                database.execute("CREATE TABLE metrics (id, run_name, step, metrics)")
            yield database

    def log(self, row: Mapping[str, Any]) -> None:
        """Queues a row of metrics.jsonl, which a thread of trackio's writes within a second."""
        self._last_step = row["update_step"]
        self._once |= {key: value for key, value in row.items() if key.startswith(ONCE)}
        self._send({key: value for key, value in shown(row).items() if key != "update_step" and not key.startswith(ONCE)})

    def _send(self, values: dict[str, Any]) -> None:
        self._num_rows += 1
        self._run.log(values, step=self._last_step)

    def send_missing(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Makes trackio's rows of the run equal to the record's: removes others, sends missing ones, returns their number."""
        wanted = {row_key(row) for row in rows}
        known, others = set(), []
        with self._connected() as database:
            for number, step, is_evaluation, is_summary in self._recorded(database):
                key = (step, bool(is_evaluation))
                if is_summary or key in known or key not in wanted:
                    others.append((number,))
                else:
                    known.add(key)
            database.executemany("DELETE FROM metrics WHERE id = ?", others)
        self._num_rows = len(known)
        for row in rows:
            self._once |= {key: value for key, value in row.items() if key.startswith(ONCE)}
            self._last_step = row["update_step"]
        missing = [row for row in rows if row_key(row) not in known]
        for row in missing:
            self.log(row)
        return len(missing)

    def _recorded(self, database: sqlite3.Connection) -> list[tuple[int, int, int, int]]:
        """The run's rows in trackio's database: (number, step, whether an evaluation, whether the summary)."""
        text = "instr(CAST(metrics AS TEXT), ?)"
        return database.execute(
            f"SELECT id, step, {text}, {text} FROM metrics WHERE run_name = ? ORDER BY id",
            ('"final_eval_loss"', f'"{_SUMMARY}updates"', self.run_name),
        ).fetchall()

    def finish(self, figures: Mapping[str, Any], exit_code: int = 0) -> None:
        """Sends a finished run's results under `summary/`, ends the trackio run, and tells whether rows are missing."""
        import trackio

        if figures.get("status") == "finished":
            figures = {**self._once, **figures}
            self._send({f"{_SUMMARY}{name}": value for name, value in figures.items() if isinstance(value, int | float)})
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                trackio.finish()
        finally:
            warnings.showwarning = self._usual_show
        with self._connected() as database:
            lost = self._num_rows - len(self._recorded(database))
        if lost > 0:
            raise OSError(
                f"{lost:,} rows are missing; `python -m peft_pretraining wandb-upload RUN --tracker trackio` sends them"
            )

    def _show_warning(self, message: Any, category: Any, filename: str, *rest: Any, **others: Any) -> None:
        """Shows trackio's warnings, such as of a full disk, as one line; it drops the rows that it cannot write."""
        if not filename.startswith(self._package):
            return self._usual_show(message, category, filename, *rest, **others)
        from tqdm import tqdm

        tqdm.write(f"warning: {message}; training and metrics.jsonl continue", file=sys.stderr)
        return None
