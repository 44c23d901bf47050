"""The stages of a sweep: rounds in which the settings of each entry compete, then the runs of those that are left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft_pretraining.commands.report.read import read_run
from peft_pretraining.commands.sweep.settings import Entry, PlannedRun, SweepFile, SweepSetting, without_duplicates


@dataclass(frozen=True)
class Stage:
    """Runs that do not wait for one another's results. title: of a round of the search, None for the final runs."""

    title: str | None
    runs: list[PlannedRun]


def stages(file: SweepFile, results: list[str]) -> Iterator[Stage]:
    """Yields each stage; ask for the next one only when all runs of a stage are made, as their perplexities decide on it.

    results: a Markdown table of each round is appended when it is over, and one of the whole search's work after the last.
    """
    candidates: list[Sequence[SweepSetting]] = [entry.settings for entry in file.entries]
    searched: list[list[PlannedRun]] = [[] for _ in file.entries]
    for number in range(file.num_rounds):
        candidates = file.candidates(number, candidates)
        runs_by_entry = file.search_round(number, candidates)
        title = f"search, round {number + 1} of {file.num_rounds}"
        yield Stage(title, without_duplicates([run for entry in runs_by_entry for runs in entry for run in runs]))
        kept = [_best(entry, runs, number) for entry, runs in zip(file.entries, runs_by_entry, strict=True)]
        results.append(_table(title, runs_by_entry, kept))
        for runs, entry in zip(searched, runs_by_entry, strict=True):
            runs += [of_candidate[-1] for of_candidate in entry]
        candidates = [
            settings if places is None else [settings[place] for place in places]
            for settings, places in zip(candidates, kept, strict=True)
        ]
    final_runs = file.final_runs(candidates)
    if file.num_rounds:
        results.append(_work(searched, max(run.plan.num_training_steps for run in final_runs)))
    yield Stage(None, final_runs)


def _best(entry: Entry, runs: Sequence[Sequence[PlannedRun]], number: int) -> list[int] | None:
    """Places of the candidates with the lowest perplexity, the best first, the earlier of equal ones; None without a round."""
    if not runs:
        return None
    ranked = sorted(range(len(runs)), key=lambda place: _perplexity(runs[place][-1]))
    return ranked[: entry.rounds[number].keep]


def _perplexity(run: PlannedRun) -> float:
    """The perplexity at the end of a finished run; infinite for a run that diverged."""
    perplexity = read_run(run.folder).final_perplexity
    return math.inf if perplexity is None else perplexity


def _table(title: str, runs_by_entry: Sequence[Sequence[Sequence[PlannedRun]]], kept: Sequence[list[int] | None]) -> str:
    lines = [f"## {title[0].upper()}{title[1:]}", "", "| run | perplexity | goes on |", "|---|---|---|"]
    for entry, places in zip(runs_by_entry, kept, strict=True):
        for place, runs in enumerate(entry):
            goes_on = "yes" if places and place in places else ""
            lines.append(f"| {runs[-1].name} | {_perplexity(runs[-1]):,.2f} | {goes_on} |")
    return "\n".join(lines)


def _work(searched: Sequence[Sequence[PlannedRun]], updates_of_a_final_run: int) -> str:
    """Returns a Markdown table of the runs that the search made for each entry, and of their updates.

    Runs that are repeated in the final comparison, as they have the same flags there, are included.
    """
    lines = ["## Work of the search", "", "| method | optimizer | runs | updates | in final runs |", "|---|---|---|---|---|"]
    for runs in filter(None, searched):
        # Runs that start from a full-rank run share it, and continue its count of updates.
        warm_ups = {run.warm_up.folder: run.warm_up.plan.num_training_steps for run in runs if run.warm_up is not None}
        own = sum(run.plan.num_training_steps - (warm_ups[run.warm_up.folder] if run.warm_up else 0) for run in runs)
        updates, args = own + sum(warm_ups.values()), runs[0].args
        share = updates / updates_of_a_final_run
        lines.append(f"| {args.peft_model} | {args.optimizer} | {len(runs)} | {updates:,} | {share:.1f} |")
    return "\n".join(lines)
