"""Starts, stops and judges one run of a sweep as a process of its own, by the state of the run's folder."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from peft_pretraining.commands.report.read import read_run
from peft_pretraining.commands.sweep.settings import Wanted
from peft_pretraining.config.arguments import ROWS
from peft_pretraining.plan.schedule import is_finished
from peft_pretraining.record.summary import read_metrics
from peft_pretraining.training.stop import MARKER_FILE

PROGRAM = Path(__file__).resolve().parents[3] / "torchrun_main.py"
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
# Where a file lies may be said in another way the next time.
_PATHS = ("model_config", "tokenizer", "dataset")
# Kinds of State and Outcome that there is nothing left to do for.
MADE = ("finished", "diverged")


@dataclass(frozen=True)
class State:
    """Of a run's folder. kind: "new", "begun" (it goes on), "finished", "diverged" (finished, its perplexity not finite), or
    "other" (made with other arguments)."""

    kind: str
    text: str


def state_of(wanted: Wanted) -> State:
    """What is in the run's folder, from its record; nothing is loaded."""
    if not (wanted.folder / "run.json").is_file():
        return State("new", "not begun")
    try:
        record = read_run(wanted.folder)
    except ValueError as error:
        return State("begun", f"its record cannot be read ({error})")
    # What the sweep itself makes first lies where the sweep does; how it was made is in the run's name.
    elsewhere = {*_PATHS, "total_batch_size", *(["warmed_up_model"] if wanted.after is not None else [])}
    mine = {
        name: getattr(wanted.args, name)
        for name, row in ROWS.items()
        if (row.defines_run or row.on_resume != "freely") and name not in elsewhere
    }
    differing = [
        f"{name} {record.arguments.get(name)} (now {value})"
        for name, value in mine.items()
        if record.arguments.get(name) != value
    ]
    batch = record.plan.get("total_batch_size")
    differing += [f"total_batch_size {batch} (now {total})"] if batch != (total := wanted.plan.total_batch_size) else []
    if differing:
        return State("other", f"was made with {', '.join(differing)}; remove it, or name another `folder`")
    if is_finished(wanted.plan, record.reached, record.tokens_seen):
        if record.final_perplexity is not None:
            return State("finished", f"finished, perplexity {record.final_perplexity:,.2f}")
        if _evaluated_without_result(wanted.folder, record.reached):
            return State("diverged", "finished, its perplexity is not finite")
    if not any(wanted.folder.glob("step_*")):
        return State("begun", f"{record.status}, no checkpoint: begins anew")
    return State("begun", f"{record.status}: goes on from its newest checkpoint")


def _evaluated_without_result(folder: Path, step: int) -> bool:
    """Whether the evaluation at this update gave no finite perplexity: to start the run again would change nothing."""
    rows = read_metrics(folder)
    return any("final_eval_perplexity" in row and row.get("update_step") == step for row in rows)


def command_line(wanted: Wanted, processes: int) -> list[str]:
    """The words that start a run: the program itself, by torchrun from two processes on."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        start += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    return [*start, str(PROGRAM), *wanted.argv]


class Stopping:
    """Whether the sweep was asked to stop. Every signal is passed on to the run under way, which saves and ends."""

    def __init__(self) -> None:
        """Nothing is asked for yet."""
        self.signal_name: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stopping]:
        """Records signals during the block; they do not end the process."""
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def run(self, command: Sequence[str], log: IO[bytes]) -> int:
        """Run the command to its end; its exit code. Its process group is its own: a terminal's Ctrl-C comes through here."""
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", **os.environ}  # as scripts/setup.sh: time to save
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, process_group=0
        ) as process:
            self._process = process
            if self.signal_name is not None:  # it came while the process was being made
                process.send_signal(getattr(signal, self.signal_name))
            try:
                return process.wait()
            finally:
                self._process = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended. kind: "finished", "diverged", "stopped" or "failed"; text: in words."""

    kind: str
    text: str


def make_run(wanted: Wanted, processes: int, stopping: Stopping) -> Outcome:
    """Start the run, wait for it, and judge by exit code and record. Its output goes to <folder>.log beside its folder."""
    path = log_path(wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = command_line(wanted, processes)
    with path.open("ab", buffering=0) as log:
        log.write(f"== {shlex.join(command)}\n".encode())
        begin = log.tell()
        code = stopping.run(command, log)
    state = state_of(wanted)
    if code == 0 and state.kind in MADE:
        return Outcome(state.kind, state.text)
    if stopping.signal_name is not None or (wanted.folder / MARKER_FILE).is_file():
        return Outcome("stopped", state.text)
    if code == 0:
        return Outcome("failed", f"it ended without an error but is {state.text}; log {path}")
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Outcome("failed", f"{how}: {_last_error(path, begin)}; log {path}")


def log_path(wanted: Wanted) -> Path:
    """The file for a run's output."""
    return wanted.folder.with_name(f"{wanted.folder.name}.log")


def _last_error(path: Path, begin: int) -> str:
    """The last line of a log, from `begin` on, that names an error; else its last line."""
    with path.open("rb") as log:
        log.seek(begin)
        text = log.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error", line, re.IGNORECASE)]
    return (errors or lines or ["no output"])[-1][:300]
