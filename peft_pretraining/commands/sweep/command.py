"""`python -m peft_pretraining sweep FILE`: runs every setting with every seed, one after another, then writes a report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from peft_pretraining.commands.report.command import PAGE, format_groups, write_report
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
from peft_pretraining.commands.sweep.settings import PlannedRun, Sweep, load_sweep
from peft_pretraining.record.wandb_run import OF_ONE_RUN

HELP = "run a file's settings over seeds, one after another: finished runs are skipped, stopped ones continue; then report"
REPORT = "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("file", type=Path, help="YAML file: folder, base, seeds, settings (examples: scripts/sweeps/)")
    parser.add_argument("--dry_run", action="store_true", help="list the runs with their state and command, then exit")


def run(args: argparse.Namespace) -> int:
    """Makes the runs. Returns the exit code, 0: all finished; 1: one failed; 130: stopped on request. Raises ConfigError."""
    sweep = load_sweep(args.file)
    if args.dry_run:
        print(format_sweep(sweep))
        return 0
    for name in OF_ONE_RUN:
        # Runs are processes with this environment, and would all be recorded as one.
        if value := os.environ.pop(name, None):
            print(f"notice: {name}={value} has no effect: it names one run, and a sweep has several", file=sys.stderr)
    stopping = Stopping()
    with stopping.listening():
        outcomes = _run_all(sweep, stopping)
    if stopping.signal_name is not None or any(outcome.kind == "stopped" for outcome in outcomes.values()):
        finished = sum(outcome.kind in MADE for outcome in outcomes.values())
        print(
            f"stopped on request ({stopping.signal_name or 'of a run'}): {finished} of {len(sweep.runs)} runs are finished; "
            "the current run has saved a checkpoint. Continue with the same command:\n"
            f"  python -m peft_pretraining sweep {shlex.quote(str(args.file))}"
        )
        return 130
    _report(sweep)
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.kind == "failed"}
    for name, outcome in failed.items():
        print(f"failed: {name}: {outcome.text}")
    if failed:
        print(f"{len(failed)} of {len(sweep.runs)} runs failed; repeat the command to retry them, finished runs are skipped")
    return 1 if failed else 0


def _run_all(sweep: Sweep, stopping: Stopping) -> dict[str, Outcome]:
    """Makes every run in turn until one is stopped; returns the outcomes by name."""
    outcomes: dict[str, Outcome] = {}
    for number, planned in enumerate(sweep.runs, start=1):
        if stopping.signal_name is not None:
            break
        head = f"[{number}/{len(sweep.runs)}] {planned.name}"
        state = state_of(planned)
        if state.kind in MADE:
            outcomes[planned.name] = Outcome(state.kind, state.text)
            print(f"{head}: {state.text}, skipped", flush=True)
            continue
        if not _is_needed(planned, sweep):
            outcomes[planned.name] = Outcome("finished", "the runs that start from it are finished")
            print(f"{head}: {outcomes[planned.name].text}, skipped", flush=True)
            continue
        if (problem := _start_problem(planned, state, outcomes)) is not None:
            outcomes[planned.name] = Outcome("failed", problem)
            print(f"{head}: FAILED: {problem}", flush=True)
            continue
        print(f"{head}: {state.text}; output in {log_path(planned)}", flush=True)
        outcome = outcomes[planned.name] = make_run(planned, sweep.nproc_per_node, stopping)
        print(f"{head}: {'FAILED: ' if outcome.kind == 'failed' else ''}{outcome.text}", flush=True)
        if outcome.kind == "stopped":
            break
    return outcomes


def _is_needed(planned: PlannedRun, sweep: Sweep) -> bool:
    """False for a full-rank run that only serves as a start for other runs, if all of those are finished."""
    dependents = [run for run in sweep.runs if run.after is not None and run.after.name == planned.name]
    return not dependents or any(state_of(run).kind not in MADE for run in dependents)


def _start_problem(planned: PlannedRun, state: State, outcomes: Mapping[str, Outcome]) -> str | None:
    """The reason not to start an unfinished run; None if it may start."""
    if state.kind == "other":
        return f"{planned.folder} {state.text}"
    if planned.after is None:
        return None
    # Started from an unfinished or diverged run, this run would look like any other in the report.
    reason = {"failed": "did not finish", "diverged": "has no finite perplexity"}.get(outcomes[planned.after.name].kind)
    return None if reason is None else f"it starts from {planned.after.name}, which {reason}"


def _report(sweep: Sweep) -> None:
    folders = [planned.folder for planned in sweep.compared if (planned.folder / "run.json").is_file()]
    if not folders:
        print("no run has a run.json: nothing to report")
        return
    out = sweep.folder / REPORT
    groups = write_report(folders, out, title=sweep.path.stem.replace("_", " "))
    print(f"\n{format_groups(groups)}\n\npage     {out / PAGE}")


def format_sweep(sweep: Sweep) -> str:
    """Formats every run with the state of its folder and its command."""
    states = {planned.name: state_of(planned) for planned in sweep.runs}
    counts = Counter(state.kind for state in states.values())
    words = {
        "new": "not started",
        "begun": "to continue",
        "finished": "finished",
        "diverged": "finished without a finite perplexity",
        "other": "made with other arguments",
    }
    lines = [f"{len(sweep.runs)} runs: " + ", ".join(f"{count} {words[kind]}" for kind, count in counts.items())]
    for planned in sweep.runs:
        lines.append(f"\n{planned.name}: {states[planned.name].text}")
        lines.append(f"  {shlex.join(command_line(planned, sweep.nproc_per_node))}")
    return "\n".join(lines)
