"""The report's tables: rows of text under headings with units, shared by the page, the terminal and the dashboard."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.commands.report.groups import Group, against_baseline, baseline_of, method_title, task_of
from peft_pretraining.commands.report.published import LATER, PEAKS, RANK_AND_DELTA, RANK_AND_DELTA_MODEL, SEVEN_B, TABLE
from peft_pretraining.commands.report.read import RunRecord
from peft_pretraining.config.command_line import flags_for
from peft_pretraining.memory.account import CLASSES
from peft_pretraining.methods import METHODS
from peft_pretraining.record.intervals import Interval

MISSING = "—"
PERPLEXITY = "held-out perplexity ± 95 % interval"
PUBLISHED = "published perplexity (tokens)"
# The model's own arithmetic, and that of its dense equivalent (see mfu.py).
ARITHMETIC, MFU = "10⁹ operations/s: own / dense", "MFU, %: own / dense"
# Headings of what a run cost, shown in a separate table below its results.
COSTS = ("states measured, MiB", "peak measured, MiB", "tokens/s", ARITHMETIC, MFU, "updates", "tokens, 10⁶")
GAP = "against the baseline, % [95 % interval]"
# Arguments left out of the command that repeats a run: its folders, how it started, how it was watched.
_NOT_REPEATED = ("save_dir", "continue_from", "resume", "allow_changes", "config", "name", "tags", "wandb", "tracker", "dry_run")


@dataclass(frozen=True)
class Table:
    """A table: headings with units, and rows with one text per heading."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def columns(self, names: Sequence[str]) -> Table:
        """A table of the columns with these headings, in this table's order; unknown headings are ignored."""
        kept = [column for column, heading in enumerate(self.headings) if heading in names]
        return Table(
            tuple(self.headings[column] for column in kept),
            tuple(tuple(row[column] for column in kept) for row in self.rows),
        )


def number(value: float | None, form: str = ",.0f") -> str:
    """Formats a value; a dash for None."""
    return MISSING if value is None else format(value, form)


def perplexity_text(interval: Interval | None) -> str:
    """Formats mean ± half the 95 % interval, and the number of seeds."""
    if interval is None:
        return MISSING
    scatter = "" if interval.half is None else f" ± {interval.half:,.2f}"
    return f"{interval.mean:,.2f}{scatter} (n = {interval.n})"


def gap_text(ratio: Interval | None) -> str:
    """Formats a ratio as a gap in percent with its interval."""
    if ratio is None:
        return MISSING
    bounds = ""
    if ratio.low is not None and ratio.high is not None:
        bounds = f" [{100 * (ratio.low - 1):+.1f}, {100 * (ratio.high - 1):+.1f}]"
    return f"{100 * (ratio.mean - 1):+.1f}{bounds} (n = {ratio.n})"


def methods_table(groups: Sequence[Group]) -> Table:
    """A table of each setting's perplexity, parameters and memory with the published figures; empty columns are left out."""
    rows = [_methods_row(group, groups) for group in groups]
    several_models = len({group.first.model for group in groups}) > 1
    names = [name for name in rows[0] if name != "model" or several_models]
    names = [name for name in names if name == "setting" or any(row[name] != MISSING for row in rows)]
    return Table(tuple(names), tuple(tuple(row[name] for name in names) for row in rows))


def _methods_row(group: Group, groups: Sequence[Group]) -> dict[str, str]:
    first, published = group.first, group.published
    parameters, full_rank = group.figure("parameters"), group.figure("full_rank_parameters")
    states, peak, tokens = (group.figure(name) for name in ("states_bytes", "peak_memory_bytes", "tokens"))
    baseline = against_baseline(group, groups)
    is_baseline = len(groups) > 1 and baseline_of(task_of(group.settings), groups) is group
    paper = first.paper_memory
    return {
        "setting": group.label,
        "model": first.model,
        PERPLEXITY: perplexity_text(group.perplexity),
        PUBLISHED: f"{published.perplexity:.2f} ({published.tokens})" if published else MISSING,
        GAP: "baseline" if is_baseline else gap_text(baseline[1] if baseline else None),
        "parameters, 10⁶": number(parameters and parameters / 1e6, ",.2f"),
        "of full-rank, %": number(100 * parameters / full_rank if parameters and full_rank else None, ".0f"),
        "published parameters, 10⁶": number(published.parameters if published else None),
        "memory by the paper's convention, 10⁹ bytes": number(paper, ".2f" if paper and paper >= 0.1 else ".3f"),
        "published memory, 10⁹ bytes": number(published.memory if published else None, ".2f"),
        "states measured, MiB": number(states and states / 2**20, ",.1f"),
        "peak measured, MiB": number(peak and peak / 2**20, ",.0f"),
        "tokens/s": number(group.figure("tokens_per_second")),
        ARITHMETIC: _own_and_dense(group, "flops_per_second", 1e-9, ",.0f"),
        MFU: _own_and_dense(group, "mfu", 100, ".1f"),
        "updates": number(max(run.reached for run in group.runs)),
        "tokens, 10⁶": number(tokens and tokens / 1e6, ",.2f"),
    }


def _own_and_dense(group: Group, name: str, factor: float, form: str) -> str:
    """Formats a figure of the model's own arithmetic and that of its dense equivalent."""
    own, dense = group.figure(name), group.figure(f"{name}_dense")
    return MISSING if own is None or dense is None else f"{factor * own:{form}} / {factor * dense:{form}}"


def published_table(groups: Sequence[Group]) -> Table | None:
    """Returns a table of every published result of the models that were run, or None without such results."""
    models = {group.first.model for group in groups}
    entries = [entry for entry in (*TABLE, *LATER, *SEVEN_B) if entry.model in models]
    if not entries:
        return None
    headings = ("method", "model", "tokens", "perplexity", "parameters, 10⁶", "memory, 10⁹ bytes", "source")
    rows = [
        (
            entry.note or method_title(entry.method), entry.model, entry.tokens, f"{entry.perplexity:.2f}",
            number(entry.parameters), number(entry.memory, ".2f"), entry.source,
        )
        for entry in entries
    ]  # fmt: skip
    return Table(headings, tuple(rows))


def published_memory_table(groups: Sequence[Group]) -> Table | None:
    """A table of published measurements of peak memory for the models that were run; None if there are none."""
    models = [model for model in dict.fromkeys(group.first.model for group in groups) if model in PEAKS]
    if not models:
        return None
    headings = ("published setting", *(f"{model}: peak, GB" for model in models))
    return Table(headings, tuple((name, *(f"{PEAKS[model][name]:.1f}" for model in models)) for name in PEAKS[models[0]]))


def _is_sparse(method: str) -> bool:
    return method in METHODS and METHODS[method].sparse


def rank_delta_table(groups: Sequence[Group]) -> Table | None:
    """A table of SLTrain's perplexity by rank (rows) and delta (columns), with published values for llama_60m.

    None with fewer than two settings, or if they also differ in something else.
    """
    shown = [group for group in groups if _is_sparse(group.method) and group.perplexity is not None]
    pairs = {(group.settings["rank"], group.settings["sp_ratio"]) for group in shown}
    # alpha may follow the rank.
    varied = ("rank", "sp_ratio", "lora_alpha")
    others = {json.dumps({k: v for k, v in group.settings.items() if k not in varied}, default=str) for group in shown}
    if len(pairs) < 2 or len(others) > 1 or len(pairs) < len(shown):
        return None
    ranks, deltas = sorted({rank for rank, _ in pairs}), sorted({delta for _, delta in pairs})
    by_pair = {(group.settings["rank"], group.settings["sp_ratio"]): group for group in shown}
    published = RANK_AND_DELTA if shown[0].first.model == RANK_AND_DELTA_MODEL else {}

    def cell(pair: tuple[int, float]) -> str:
        text = perplexity_text(by_pair[pair].perplexity) if pair in by_pair else MISSING
        return f"{text}; published {published[pair]:.2f}" if pair in published else text

    rows = [(f"r = {rank}", *(cell((rank, delta)) for delta in deltas)) for rank in ranks]
    return Table(("rank", *(f"δ = {delta:g}: perplexity" for delta in deltas)), tuple(rows))


def memory_table(groups: Sequence[Group]) -> Table:
    """A table of every class of the memory prediction, with the measured mean over runs where it is measured."""
    measured = ("parameters", "support", "optimizer", "peak")
    names = (*CLASSES, "peak")
    headings = tuple(f"{name}, MiB" + (": predicted / measured" if name in measured else "") for name in names)

    def mebibytes(value: int | None) -> str:
        return number(None if value is None else value / 2**20, ",.1f")

    def cell(group: Group, name: str) -> str:
        predicted = mebibytes(group.first.predicted(name))
        return f"{predicted} / {mebibytes(group.measured(name))}" if name in measured else predicted

    rows = [(group.label, *(cell(group, name) for name in names)) for group in groups]
    return Table(("setting", *headings), tuple(rows))


def run_names(runs: Sequence[RunRecord]) -> dict[Path, str]:
    """Names of runs by folder; with the parent folder's name if several runs have the same name."""
    paths = {run.folder: run.folder.resolve() for run in runs}
    counts = Counter(path.name for path in paths.values())
    return {folder: path.name if counts[path.name] == 1 else f"{path.parent.name}/{path.name}" for folder, path in paths.items()}


def runs_table(runs: Sequence[RunRecord]) -> Table:
    """A table with one row per run."""
    names = run_names(runs)
    headings = (
        *("run", "method", "lr", "seed", "state", "updates", "first perplexity", "final perplexity", "bits per byte"),
        *("tokens evaluated", "tokens/s", "training, minutes", "peak, MiB"),
    )

    def row(run: RunRecord) -> tuple[str, ...]:
        figures = run.figures
        seconds, peak = figures["training_seconds"], figures["peak_memory_bytes"]
        return (
            names[run.folder],
            method_title(run.method),
            f"{run.arguments['lr']:g}",
            str(run.seed),
            run.status,
            number(run.reached),
            number(figures["first_perplexity"], ",.2f"),
            number(figures["final_perplexity"], ",.2f"),
            number(figures["final_bits_per_byte"], ".4f"),
            number(figures["evaluation_tokens"]),
            number(figures["tokens_per_second"]),
            number(seconds and seconds / 60, ",.1f"),
            number(peak and peak / 2**20),
        )

    return Table(headings, tuple(map(row, runs)))


def command_of(run: RunRecord) -> str:
    """The command line that repeats the run: every argument that differs from its default, torchrun for several processes.

    For a run on several machines: the command for each machine, HOST being the name of one of them.
    """
    return " ".join([_start_of(run), "torchrun_main.py", *flags_for(run.document["arguments"], _NOT_REPEATED)])


def _start_of(run: RunRecord) -> str:
    world = run.document.get("world") or {}
    processes = int(world.get("processes") or run.plan.get("world_size") or 1)
    # Older records lack local_processes.
    local = int(world.get("local_processes") or processes)
    if processes > local:
        rendezvous = "--rdzv_backend c10d --rdzv_endpoint HOST:29400"
        return f"torchrun --nnodes {processes // local} --nproc_per_node {local} {rendezvous}"
    return f"torchrun --standalone --nproc_per_node {processes}" if processes > 1 else "python"


def made_with(run: RunRecord) -> dict[str, str]:
    """Versions, commit, data and machine, by name."""
    document = run.document
    machine, world, data = (document.get(name) or {} for name in ("machine", "world", "dataset"))
    texts = {
        "versions": ", ".join(f"{name} {version}" for name, version in (document.get("versions") or {}).items()),
        "git commit": document.get("git_commit"),
        "data": data.get("description"),
        "data fingerprint": data.get("fingerprint"),
        "processes x threads": f"{world.get('processes', '?')} x {world.get('threads', '?')}" if world else None,
        "machine": ", ".join(str(value) for value in (machine.get("platform"), machine.get("gpu")) if value),
        "continued from": document.get("continued_from"),
    }
    return {name: str(value) for name, value in texts.items() if value}


def problems(groups: Sequence[Group]) -> list[str]:
    """Notes on what is missing in the runs or cannot be compared, one sentence each."""
    names_of = run_names([run for group in groups for run in group.runs])
    runs_by_note: dict[str, list[str]] = {}
    for group in groups:
        for run in group.runs:
            for note in run.notes:
                runs_by_note.setdefault(note, []).append(names_of[run.folder])
    lines = [f"{', '.join(names)}: {note}" for note, names in runs_by_note.items()]
    lines += [note for group in groups for note in group.notes]
    evaluated = {
        run.figures["evaluation_tokens"] for group in groups for run in group.counted if run.figures["evaluation_tokens"]
    }
    if len(evaluated) > 1 and max(evaluated) > 1.01 * min(evaluated):
        lines.append(
            f"the runs were evaluated on {min(evaluated):,} to {max(evaluated):,} tokens: small differences are not meaningful"
        )
    tasks = {task_of(group.settings) for group in groups}
    if len(tasks) > 1:
        lines.append(
            "the runs differ in model, data, batch or length: perplexities are comparable only between runs that agree in these"
        )
    machines = {
        (str(made_with(run).get("machine")), str(made_with(run).get("processes x threads")))
        for group in groups
        for run in group.runs
    }
    if len(machines) > 1:
        lines.append("the runs used different machines or numbers of threads: their throughputs are not comparable")
    return lines


def as_json(groups: Sequence[Group]) -> dict[str, Any]:
    """Groups and runs with their figures, as JSON-able values."""

    def group_entry(group: Group) -> dict[str, Any]:
        baseline = against_baseline(group, groups)
        return {
            "label": group.label,
            "method": group.method,
            "model": group.first.model,
            "settings": group.settings,
            "seeds": [run.seed for run in group.counted],
            "perplexity": None if group.perplexity is None else dataclasses.asdict(group.perplexity),
            "against": None if baseline is None else {"label": baseline[0].label, **dataclasses.asdict(baseline[1])},
            "paper_memory_G": group.first.paper_memory,
            "published": None if group.published is None else dataclasses.asdict(group.published),
            "runs": [
                {
                    "folder": str(run.folder),
                    "seed": run.seed,
                    "status": run.status,
                    "notes": list(run.notes),
                    **run.figures,
                }
                for run in group.runs
            ],
        }

    return {"groups": [group_entry(group) for group in groups], "problems": problems(groups)}
