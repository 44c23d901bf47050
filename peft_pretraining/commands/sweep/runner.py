"""Starts and stops the runs of a sweep as separate processes, and reads their state from their folders."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from peft_pretraining.checkpoint.step_folder import list_checkpoints
from peft_pretraining.commands.report.read import read_run
from peft_pretraining.commands.sweep.settings import PlannedRun
from peft_pretraining.config.arguments import ROWS
from peft_pretraining.distributed.world import stop_signals
from peft_pretraining.plan.schedule import is_finished
from peft_pretraining.record.summary import read_metrics
from peft_pretraining.run.folder import differing_shape, same_place
from peft_pretraining.training.stop import MARKER_FILE

PROGRAM = Path(__file__).resolve().parents[3] / "torchrun_main.py"
# Paths to the same place may be written differently the next time.
_PATHS = ("tokenizer", "dataset")
# Kinds of State and Outcome of runs that are not started again.
MADE = ("finished", "diverged")


@dataclass(frozen=True)
class State:
    """The state of a run's folder. kind: "new", "begun" (can continue), "finished", "diverged" (finished with a non-finite
    perplexity), or "other" (made with other arguments). text: the state in words. share: of the updates that are made."""

    kind: str
    text: str
    share: float = 0.0


def state_of(planned: PlannedRun) -> State:
    """Reads the state of a run's folder from its record, without loading tensors."""
    if not (planned.folder / "run.json").is_file():
        return State("new", "not started")
    try:
        record = read_run(planned.folder)
    except ValueError as error:
        return State("begun", f"its record cannot be read ({error})")
    # The warm-up run lies in the sweep's folder, and its settings are part of this run's name.
    not_compared = {"model_config", "total_batch_size", "data_order"}
    if planned.warm_up is not None:
        not_compared.add("warmed_up_model")
    requested = {
        name: getattr(planned.args, name)
        for name, row in ROWS.items()
        if (row.defines_run or row.on_resume != "freely") and name not in not_compared
    }
    differing = [
        f"{name} {record.arguments.get(name)} (now {value})"
        for name, value in requested.items()
        if (then := record.arguments.get(name)) != value and not (name in _PATHS and same_place(then, value))
    ]
    if "model" in record.plan:
        shape = differing_shape(record.plan, planned.plan)
        differing += [f"a model whose {key} is {then} (now {now})" for key, (then, now) in shape.items()]
    batch = record.plan.get("total_batch_size")
    differing += [f"total_batch_size {batch} (now {total})"] if batch != (total := planned.plan.total_batch_size) else []
    if planned.args.data_order not in (None, record.data_order):
        differing.append(f"data_order {record.data_order} (now {planned.args.data_order})")
    if differing:
        return State("other", f"was made with {', '.join(differing)}; remove that folder, or name another `folder`")
    if is_finished(planned.plan, record.reached, record.tokens_seen):
        if record.final_perplexity is not None:
            return State("finished", f"finished, perplexity {record.final_perplexity:,.2f}")
        if _evaluated_without_result(planned.folder, record.reached):
            return State("diverged", "finished with a non-finite perplexity")
    if not list_checkpoints(planned.folder):
        return State("begun", f"{record.status}, no checkpoint: starts from the beginning")
    share = min(1.0, record.reached / max(1, planned.plan.num_training_steps))
    return State("begun", f"{record.status}: continues from its newest checkpoint", share)


def _evaluated_without_result(folder: Path, step: int) -> bool:
    """Whether the evaluation at this update gave no finite perplexity; starting the run again would not change that."""
    rows = read_metrics(folder)
    return any("final_eval_perplexity" in row and row.get("update_step") == step for row in rows)


def command_line(planned: PlannedRun, processes: int) -> list[str]:
    """The command that starts a run: the program itself, through torchrun for two or more processes."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "peft_pretraining.distributed.launch", "--standalone", "--nproc_per_node", str(processes)]
    return [*start, str(PROGRAM), *planned.argv]


class Stopping:
    """Records requests to stop the sweep, and passes every signal on to the runs under way, which save and exit."""

    def __init__(self) -> None:
        """Starts without a request."""
        self.signal_name: str | None = None
        self._processes: set[subprocess.Popen[bytes]] = set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stopping]:
        """Records signals during the block instead of ending the process."""
        handlers = {number: signal.signal(number, self._note) for number in stop_signals()}
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self.pass_on(number)

    def pass_on(self, number: int) -> None:
        """Sends a signal to every run under way."""
        for process in tuple(self._processes):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def run(self, command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> int:
        """Runs the command and returns its exit code. Its process group is separate, so a terminal's Ctrl-C arrives here only.

        environment: variables that differ from this process's. Several threads may call it.
        """
        variables = {**os.environ, **environment}
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0, env=variables
        ) as process:
            self._processes.add(process)
            # The signal may have arrived while the process was starting.
            if self.signal_name is not None:
                process.send_signal(getattr(signal, self.signal_name))
            try:
                return process.wait()
            finally:
                self._processes.discard(process)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. kind: "finished", "diverged", "stopped" or "failed"; text: the outcome in words."""

    kind: str
    text: str


def make_run(planned: PlannedRun, processes: int, stopping: Stopping, environment: Mapping[str, str]) -> Outcome:
    """Makes a run and returns its outcome, from exit code and record. Output goes to <folder>.log beside the folder."""
    path = log_path(planned)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = command_line(planned, processes)
    # An earlier stop's: if the program fails before it removes it, this start would look like a stop on request.
    (planned.folder / MARKER_FILE).unlink(missing_ok=True)
    with path.open("ab", buffering=0) as log:
        log.write(f"== {shlex.join(command)}\n".encode())
        begin = log.tell()
        code = stopping.run(command, log, environment)
    state = state_of(planned)
    if code == 0 and state.kind in MADE:
        return Outcome(state.kind, state.text)
    if stopping.signal_name is not None or (planned.folder / MARKER_FILE).is_file():
        return Outcome("stopped", state.text)
    if code == 0:
        return Outcome("failed", f"exited without an error but is {state.text}; log {path}")
    ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Outcome("failed", f"{ending}: {_last_error(path, begin)}; log {path}")


def log_path(planned: PlannedRun) -> Path:
    """The file that a run's output goes to."""
    return planned.folder.with_name(f"{planned.folder.name}.log")


def _last_error(path: Path, begin: int) -> str:
    """The last line of a log, from `begin` on, that names an error; else its last line."""
    with path.open("rb") as log:
        log.seek(begin)
        text = log.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error", line, re.IGNORECASE)]
    return (errors or lines or ["no output"])[-1][:300]
