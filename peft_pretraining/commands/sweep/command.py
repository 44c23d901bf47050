"""`python -m peft_pretraining sweep FILE`: makes every setting's runs, one or several at a time, then writes a report."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from peft_pretraining.checkpoint.step_folder import list_checkpoints
from peft_pretraining.commands.report.command import PAGE, format_groups, write_report
from peft_pretraining.commands.sweep.parallel import TimeLeft, run_environments, work_of
from peft_pretraining.commands.sweep.runner import (
    MADE,
    Outcome,
    State,
    Stopping,
    command_line,
    log_path,
    make_run,
    state_of,
)
from peft_pretraining.commands.sweep.search import stages
from peft_pretraining.commands.sweep.settings import PlannedRun, SweepFile, load_sweep, without_warm_ups
from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.distributed.world import lasting_output
from peft_pretraining.record.wandb_run import OF_ONE_RUN

HELP = "run a file's settings over seeds, one or several at a time: finished runs are skipped, stopped ones continue; then report"
REPORT, SEARCH = "report", "search.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("file", type=Path, help="YAML file: folder, base, seeds, settings (examples: scripts/sweeps/)")
    parser.add_argument(
        "--parallel_runs",
        type=int,
        default=1,
        metavar="RUNS",
        help="runs at a time, each with its own GPUs or an equal share of the cores (default: %(default)s)",
    )
    parser.add_argument("--dry_run", action="store_true", help="list the runs with their state and command, then exit")


def run(args: argparse.Namespace) -> int:
    """Makes the runs. Returns the exit code, 0: all finished; 1: one failed; 130: stopped on request. Raises ConfigError."""
    if args.parallel_runs < 1:
        raise ConfigError([f"--parallel_runs {args.parallel_runs}: must be at least 1, the number of runs at a time"])
    file = load_sweep(args.file)
    if args.dry_run:
        print(format_sweep(file))
        return 0
    for name in OF_ONE_RUN:
        # Runs are processes with this environment, and would all be recorded as one.
        if value := os.environ.pop(name, None):
            print(f"notice: {name}={value} has no effect: it names one run, and a sweep has several", file=sys.stderr)
    with lasting_output():
        return _make_and_report(file, args.parallel_runs)


def _make_and_report(file: SweepFile, at_a_time: int) -> int:
    """Makes all runs, stage by stage, and the report; returns the exit code."""
    stopping = Stopping()
    outcomes: dict[str, Outcome] = {}
    tables: list[str] = []
    with stopping.listening():
        for stage in stages(file, tables):
            if stage.title is not None:
                print(f"{stage.title}: {len(stage.runs)} runs", flush=True)
            outcomes = _Stage(stage.runs, file.nproc_per_node, at_a_time, stopping).make()
            if any(outcome.kind not in MADE for outcome in outcomes.values()) or stopping.signal_name is not None:
                break
    if stopping.signal_name is not None or any(outcome.kind == "stopped" for outcome in outcomes.values()):
        finished = sum(outcome.kind in MADE for outcome in outcomes.values())
        print(
            f"stopped on request ({stopping.signal_name or 'of a run'}): {finished} of {len(stage.runs)} runs are finished; "
            "what was under way has saved a checkpoint. The same command continues."
        )
        return 130
    if stage.title is None:
        _report(file, stage.runs, tables)
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.kind == "failed"}
    for name, outcome in failed.items():
        print(f"failed: {name}: {outcome.text}")
    if failed:
        needed = "" if stage.title is None else "; the next round needs them"
        print(
            f"{len(failed)} of {len(stage.runs)} runs failed{needed}; repeat the command to retry them, finished runs are skipped"
        )
    return 1 if failed else 0


class _Stage:
    """Makes the runs of a stage in their order, several at a time; a run that starts from another waits for that one."""

    def __init__(self, runs: Sequence[PlannedRun], processes: int, at_a_time: int, stopping: Stopping):
        """processes: of each run. at_a_time: runs at the same time."""
        self._runs, self._processes, self._stopping = runs, processes, stopping
        self._free, notice = run_environments(min(at_a_time, max(1, len(runs))), processes, runs)
        if notice is not None:
            print(f"notice: {notice}", file=sys.stderr)
        self._left = TimeLeft(len(self._free))
        self._waiting = list(runs)
        self._running: dict[Future[Outcome], _Running] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._stopped = False

    def make(self) -> dict[str, Outcome]:
        """Makes every run until one is stopped; returns the outcomes by name."""
        with ThreadPoolExecutor(len(self._free)) as pool:
            while True:
                self._start_ready(pool)
                if not self._running:
                    return self._outcomes
                for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                    self._end(future)

    def _start_ready(self, pool: ThreadPoolExecutor) -> None:
        """Starts runs in their order while an environment is free; settles those that need none."""
        for planned in tuple(self._waiting):
            if self._stopped or self._stopping.signal_name is not None or not self._free:
                return
            if planned.warm_up is not None and planned.warm_up.name not in self._outcomes:
                continue
            self._waiting.remove(planned)
            state, head = state_of(planned), self._head(planned)
            settled = _settled(planned, state, self._runs, self._outcomes)
            if settled is not None:
                self._outcomes[planned.name] = settled
                failed = settled.kind == "failed"
                print(f"{head}: {f'FAILED: {settled.text}' if failed else f'{settled.text}, skipped'}", flush=True)
                continue
            print(f"{head}: {state.text}; output in {log_path(planned)}", flush=True)
            environment = self._free.pop(0)
            future = pool.submit(make_run, planned, self._processes, self._stopping, environment)
            self._running[future] = _Running(planned, environment, work_of(planned) * (1 - state.share), time.monotonic())

    def _end(self, future: Future[Outcome]) -> None:
        """Records and prints a run's outcome, and stops the others if it was stopped."""
        ended = self._running.pop(future)
        self._free.append(ended.environment)
        now = time.monotonic()
        try:
            outcome = future.result()
        except OSError as error:
            # A log that cannot be written, a process that cannot be started: the other runs go on.
            outcome = Outcome("failed", f"could not be started: {error}")
        self._outcomes[ended.planned.name] = outcome
        if outcome.kind in MADE:
            self._left.add(ended.work, now - ended.since)
        if outcome.kind == "stopped" and not self._stopped:
            self._stopped = True
            # A run that was stopped by itself ends the sweep, as a signal to the sweep does.
            if self._stopping.signal_name is None:
                self._stopping.pass_on(signal.SIGTERM)
        running = {run.planned.name: (run.work, now - run.since) for run in self._running.values()}
        left = "" if self._stopped else self._left.text([work_of(planned) for planned in self._waiting], running)
        print(f"{self._head(ended.planned)}: {'FAILED: ' if outcome.kind == 'failed' else ''}{outcome.text}{left}", flush=True)

    def _head(self, planned: PlannedRun) -> str:
        return f"[{self._runs.index(planned) + 1}/{len(self._runs)}] {planned.name}"


@dataclass(frozen=True)
class _Running:
    """A run under way: its environment variables, the tokens that it had left to compute, and when it began (time.monotonic)."""

    planned: PlannedRun
    environment: dict[str, str]
    work: float
    since: float


def _settled(planned: PlannedRun, state: State, runs: Sequence[PlannedRun], outcomes: Mapping[str, Outcome]) -> Outcome | None:
    """Returns the outcome of a run that is not started: it is made already, is not needed, or cannot start; else None."""
    if state.kind in MADE:
        return Outcome(state.kind, state.text)
    if not _is_needed(planned, runs):
        return Outcome("finished", "the runs that start from it are finished")
    problem = _start_problem(planned, state, outcomes)
    return None if problem is None else Outcome("failed", problem)


def _is_needed(planned: PlannedRun, runs: Sequence[PlannedRun]) -> bool:
    """False for a full-rank run that only serves as a start for other runs, if all of those are finished."""
    dependents = [run for run in runs if run.warm_up is not None and run.warm_up.name == planned.name]
    return not dependents or any(state_of(run).kind not in MADE for run in dependents)


def _start_problem(planned: PlannedRun, state: State, outcomes: Mapping[str, Outcome]) -> str | None:
    """The reason not to start an unfinished run; None if it may start."""
    if state.kind == "other":
        return f"{planned.folder} {state.text}"
    if planned.warm_up is None:
        return None
    # Started from an unfinished or diverged run, this run would look like any other in the report.
    reason = {"failed": "did not finish", "diverged": "has no finite perplexity"}.get(outcomes[planned.warm_up.name].kind)
    if reason is not None:
        return f"it starts from {planned.warm_up.name}, which {reason}"
    if not list_checkpoints(planned.folder) and not list_checkpoints(planned.warm_up.folder):
        return f"it starts from {planned.warm_up.folder}, whose checkpoints are gone; remove that folder to make it again"
    return None


def _report(file: SweepFile, runs: Sequence[PlannedRun], tables: Sequence[str]) -> None:
    """Writes the report on the final runs, and the search's tables beside it."""
    folders = [run.folder for run in without_warm_ups(runs) if (run.folder / "run.json").is_file()]
    if not folders:
        print("no run has a run.json: nothing to report")
        return
    out = file.folder / REPORT
    groups = write_report(folders, out, title=file.path.stem.replace("_", " "))
    if tables:
        (out / SEARCH).write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    print(f"\n{format_groups(groups)}\n\npage     {out / PAGE}")


def format_sweep(file: SweepFile) -> str:
    """Formats every run of the first stage that is not finished, with the state of its folder and its command."""
    for stage in stages(file, []):
        states = {planned.name: state_of(planned) for planned in stage.runs}
        if any(state.kind not in MADE for state in states.values()):
            break
    counts = Counter(state.kind for state in states.values())
    words = {
        "new": "not started",
        "begun": "to continue",
        "finished": "finished",
        "diverged": "finished without a finite perplexity",
        "other": "made with other arguments",
    }
    title = "" if stage.title is None else f"{stage.title}: "
    lines = [f"{title}{len(stage.runs)} runs: " + ", ".join(f"{count} {words[kind]}" for kind, count in counts.items())]
    if stage.title is not None:
        lines.append("their perplexities decide which settings go on")
    for planned in stage.runs:
        lines.append(f"\n{planned.name}: {states[planned.name].text}")
        lines.append(f"  {shlex.join(command_line(planned, file.nproc_per_node))}")
    return "\n".join(lines)
