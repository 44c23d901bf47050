"""The JSON file of a section of benchmarks/on_gpu.py, rewritten after every step, so that a hang or a crash costs one step."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

# A section's exit code after an error above LARGEST_ERROR: nothing that follows would mean anything.
WRONG_NUMBERS = 3


class WrongNumbers(Exception):
    """Raised when a result is so far from float64 that nothing further should be measured."""


@dataclass(frozen=True)
class Options:
    """What the sections are asked to do.

    device: cpu or cuda. tiny: smallest sizes, for a test of the code. dataset, tokenizer: of the section `learn`.
    """

    device: str
    tiny: bool
    dataset: str
    tokenizer: str | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """Returns the options of parsed arguments."""
        return cls(args.device, args.tiny, args.dataset, args.tokenizer)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file that is complete at any time: under another name first."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns a file's content, {} if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Record:
    """The rows of one section: each has a name and what was measured, or why not ("skipped" or "error").

    Steps begin only while there is time for one as long as the longest so far.
    """

    def __init__(self, path: Path, section: str, seconds: float, facts: Mapping[str, Any]):
        """seconds: time until the section should end. facts: what describes the run: command, device, versions."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._end, self._longest = path, time.monotonic() + seconds, 0.0
        self.rows: list[dict[str, Any]] = []
        self._content: dict[str, Any] = {"section": section, "state": "running", "date": date.today().isoformat(), **facts}
        self._content |= {"seconds_allowed": round(seconds, 1), "running": None, "rows": self.rows}
        self.write()

    @property
    def seconds_left(self) -> float:
        """Seconds until the section should end."""
        return self._end - time.monotonic()

    def step(self, name: str, measure: Callable[[], Mapping[str, Any] | Iterable[Mapping[str, Any]]]) -> dict[str, Any]:
        """Appends and returns the row of a step, whatever its result. Raises WrongNumbers, and errors that lose the device.

        measure: returns the row, or yields parts of it; a part is written when it is there, and kept if a later one fails.
        """
        row: dict[str, Any] = {"name": name}
        self.rows.append(row)
        if self.seconds_left < self._longest or self.seconds_left <= 0:
            row["skipped"] = "no time left"
            self._finish(row)
            return row
        self._content["running"] = name
        self.write()
        start = time.monotonic()
        try:
            result = measure()
            for part in [result] if isinstance(result, Mapping) else result:
                row |= part
                self.write()
        except (WrongNumbers, KeyboardInterrupt) as error:
            row["error"] = str(error)
            self._finish(row)
            raise
        # A step may fail in any way; the others are measured all the same.
        except Exception as error:
            row |= _why(error)
            if _loses_the_device(error):
                self._finish(row)
                raise
        finally:
            row["seconds_taken"] = round(time.monotonic() - start, 3)
            self._longest = max(self._longest, time.monotonic() - start)
        self._finish(row)
        return row

    def _finish(self, row: dict[str, Any]) -> None:
        self._content["running"] = None
        self.write()
        said = row.get("skipped") or row.get("error") or f"{row.get('seconds_taken', 0):.1f} s"
        print(f"{self._content['section']}: {row['name']}: {said}", flush=True)

    def write(self) -> None:
        """Writes the file."""
        write_json(self.path, self._content)

    def end(self, state: str) -> None:
        """Sets the section's state and writes the file."""
        self._content["state"] = state
        self.write()


def _why(error: Exception) -> dict[str, str]:
    """Returns the row of a step that failed: skipped if a package is missing."""
    from peft_pretraining.optim.build import OptimizerUnavailable

    if isinstance(error, ModuleNotFoundError):
        return {"skipped": f"{(error.name or str(error)).partition('.')[0]} is not installed"}
    if isinstance(error, OptimizerUnavailable):
        return {"skipped": str(error)}
    first = str(error).strip().partition("\n")[0]
    return {"error": f"{type(error).__name__}: {first}"[:500], "traceback": traceback.format_exc()[-2000:]}


def _loses_the_device(error: Exception) -> bool:
    from gpu.timing import is_lost

    return is_lost(error)
