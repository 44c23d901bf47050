"""Groups runs that differ only in their seed; computes mean, interval, and the gap to a baseline paired by seed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft_pretraining.commands.report.published import PublishedResult, published_for
from peft_pretraining.commands.report.read import RunRecord
from peft_pretraining.config.arguments import ROWS, Arguments
from peft_pretraining.methods import METHODS, has_effect
from peft_pretraining.record.intervals import Interval, mean_interval, ratio_interval

# Arguments that must be equal for perplexities to be comparable: all but the method and its tuning.
_TASK = (
    *("model", "data", "held_out", "eval_dataset", "tokenizer", "text_field", "max_length", "packing", "document_mask"),
    "total_batch_size",
)
_TASK_LENGTH = ("num_training_steps", "max_train_tokens")
# Arguments whose resolved values are in the plan.
_RESOLVED = ("dtype", "data_lanes", "total_batch_size")
# Arguments that distinguish settings; runs that differ only in their seed repeat one setting.
_SETTINGS = tuple(
    name
    for name, row in ROWS.items()
    if (row.defines_run or name == "eval_dataset") and name not in ("seed", "model_config", "dataset", *_RESOLVED)
)
_SHORT = {
    "rank": "r",
    "sp_ratio": "δ",
    "lora_alpha": "alpha",
    "total_batch_size": "batch",
    "num_training_steps": "updates",
    "warmup_steps": "warm-up",
    "max_length": "length",
    "max_train_tokens": "tokens",
    "restart_warmup_steps": "restart warm-up",
    "restart_every": "restarts",
}
# Settings whose values say what they are: "adamw", "cosine".
_PLAIN = ("optimizer", "scheduler", "dtype")


def method_title(name: str) -> str:
    """The name of a method in reports; the recorded name if this version does not know the method."""
    return METHODS[name].title if name in METHODS else name


def is_full_rank(name: str) -> bool:
    """Whether runs of this method are the baseline."""
    return name in METHODS and METHODS[name].full_rank


def settings_of(run: RunRecord) -> dict[str, Any]:
    """Everything that defines a run except its seed, by name, JSON-able; flags that its method does not read are left out."""
    arguments = run.arguments
    names = list(_SETTINGS)
    names += sorted(set(run.document["arguments"]) - ROWS.keys())
    settings = {name: arguments.get(name) for name in names if has_effect(name, run.method)}
    settings |= {name: run.plan.get(name) for name in _RESOLVED}
    model = run.plan.get("model") or {}
    # Each seed starts from its own full-rank run: those runs' settings are compared.
    if "warmed_up_model" in settings:
        settings["warmed_up_model"] = settings["warmed_up_model"] is not None
        settings |= _warm_up_of(run)
    # The content of a file matters, not its path.
    settings["model"] = {name: value for name, value in model.items() if name != "path"} or run.model
    dataset = run.document.get("dataset") or {}
    settings["data"] = dataset.get("fingerprint") or arguments["dataset"]
    settings["held_out"] = dataset.get("held_out_fingerprint")
    settings["data_order"] = run.data_order
    if arguments["max_train_tokens"] is not None:
        settings.pop("num_training_steps")
    return settings


def _warm_up_of(run: RunRecord) -> dict[str, Any]:
    """Settings of the full-rank run that a ReLoRA run started from; empty if an older version did not record them."""
    warm_up = run.document.get("warm_up") or {}
    arguments = warm_up.get("arguments") or {}
    settings = {
        f"warm-up {name}": arguments[name]
        for name in _SETTINGS
        if name in arguments and has_effect(name, "full") and name not in _TASK
    }
    return settings | ({"warm-up updates": warm_up["updates"]} if "updates" in warm_up else {})


def task_of(settings: dict[str, Any]) -> str:
    """A key equal for runs with comparable perplexities: same model shape, data, length and batch."""
    return json.dumps([settings.get(name) for name in (*_TASK, *_TASK_LENGTH)], sort_keys=True)


@dataclass(frozen=True)
class Group:
    """Runs of one setting. `counted`: the runs that enter the mean, finished and evaluated at the end, one per seed."""

    label: str
    settings: dict[str, Any]
    runs: tuple[RunRecord, ...]
    counted: tuple[RunRecord, ...]
    notes: tuple[str, ...]

    @property
    def first(self) -> RunRecord:
        """The first run; read from it what all runs of the group share."""
        return (self.counted or self.runs)[0]

    @property
    def method(self) -> str:
        """Name of the method, which all runs of the group share."""
        return self.first.method

    @property
    def perplexity(self) -> Interval | None:
        """Final held-out perplexity over seeds; None if no run was evaluated at its end."""
        values = [run.final_perplexity for run in self.counted]
        return mean_interval([value for value in values if value is not None]) if values else None

    @property
    def published(self) -> PublishedResult | None:
        """The published result for this configuration and method."""
        arguments = self.first.arguments
        return published_for(self.first.model, self.method, arguments["rank"], arguments["sp_ratio"])

    def measured(self, name: str) -> int | None:
        """Measured bytes of a class (or "peak"): the mean over the runs that recorded them."""
        values = [value for run in self.counted or self.runs if (value := run.measured(name)) is not None]
        return round(sum(values) / len(values)) if values else None

    def figure(self, name: str) -> float | None:
        """A figure of the summary: the mean over the runs that recorded it."""
        values = [run.figures[name] for run in self.counted or self.runs if run.figures.get(name) is not None]
        return sum(values) / len(values) if values else None


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Groups runs by setting; sorted by method, then by first appearance."""
    settings = [settings_of(run) for run in runs]
    keys = [json.dumps(values, sort_keys=True, default=str) for values in settings]
    by_key: dict[str, tuple[dict[str, Any], list[RunRecord]]] = {}
    for run, values, key in zip(runs, settings, keys, strict=True):
        by_key.setdefault(key, (values, []))[1].append(run)
    labels = _labels([(members[0], values) for values, members in by_key.values()])
    groups = [_group(label, values, members) for label, (values, members) in zip(labels, by_key.values(), strict=True)]
    order = list(METHODS)
    return sorted(groups, key=lambda group: order.index(group.method) if group.method in order else len(order))


def _group(label: str, settings: dict[str, Any], runs: list[RunRecord]) -> Group:
    counted: dict[int, RunRecord] = {}
    notes = []
    for run in runs:
        if run.final_perplexity is None:
            continue
        if run.seed in counted:
            notes.append(
                f"{run.folder} repeats the settings and seed ({run.seed}) of {counted[run.seed].folder}: not counted again"
            )
        counted.setdefault(run.seed, run)
    evaluated = Counter(run.figures["evaluation_tokens"] for run in counted.values())
    if len(evaluated) > 1:
        sizes = ", ".join(f"{count:,}" for count in evaluated if count is not None)
        notes.append(f"{label}: its seeds were evaluated on different numbers of tokens ({sizes})")
    return Group(label, settings, tuple(runs), tuple(counted.values()), tuple(notes))


def _labels(members: list[tuple[RunRecord, dict[str, Any]]]) -> list[str]:
    """Labels made of the method and the settings that differ between the groups: "SLTrain, r = 64, lr = 0.002"."""
    names = sorted({name for _, values in members for name in values if name != "peft_model"})

    def varies(name: str) -> bool:
        """Whether a setting differs between the groups that have it; a rank that only one method has does not vary."""
        return len({json.dumps(values[name], sort_keys=True, default=str) for _, values in members if name in values}) > 1

    differing = [name for name in names if varies(name) and name not in ("model", "data", "held_out")]
    order = ["rank", "sp_ratio", "lora_alpha", "lr"]
    differing.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
    several_models, several_data, several_held_out = varies("model"), varies("data"), varies("held_out")
    labels = []
    for run, values in members:
        parts = [method_title(run.method)]
        parts += [run.model] if several_models else []
        parts += [text for name in differing if (text := _shown(name, values.get(name)))]
        parts += [f"data {str(values['data'])[:6]}"] if several_data else []
        parts += [f"held-out data {str(values['held_out'])[:6]}"] if several_held_out and not several_data else []
        labels.append(", ".join(parts))
    folders: dict[str, list[str]] = {}
    for label, (run, _) in zip(labels, members, strict=True):
        folders.setdefault(label, []).append(run.folder.name)
    return [
        label if len(folders[label]) == 1 else f"{label}, {_own_part(run.folder.name, folders[label])}"
        for label, (run, _) in zip(labels, members, strict=True)
    ]


def _own_part(name: str, names: Sequence[str]) -> str:
    """What distinguishes a folder's name from others: a sweep's names are parts joined by "-", most of them the same."""
    common = set.intersection(*(set(other.split("-")) for other in names))
    return "-".join(part for part in name.split("-") if part not in common) or name


def _shown(name: str, value: Any) -> str:
    """A setting as part of a label: "lr = 0.002", the name alone for a switch that is on, "" for a switch's usual state."""
    if value is None or value == "default":
        return ""
    if isinstance(value, bool):
        usually_on = getattr(Arguments, name.removeprefix("warm-up "), None) is True
        return "" if value is usually_on else name if value else f"{name} = false"
    # Of a path, the last part.
    text = f"{value:g}" if isinstance(value, float) else str(value).rstrip("/").rpartition("/")[2]
    return text if name in _PLAIN else f"{_SHORT.get(name, name)} = {text}"


def baseline_of(task: str, groups: Sequence[Group]) -> Group | None:
    """The baseline of a task's groups: the full-rank setting with the lowest mean perplexity, or else the first one of
    these groups that was evaluated at its end; None without one."""
    evaluated = [
        (group.perplexity.mean, number, group)
        for number, group in enumerate(groups)
        if group.perplexity is not None and task_of(group.settings) == task
    ]
    full = [entry for entry in evaluated if is_full_rank(entry[2].method)]
    if full:
        return min(full)[2]
    return evaluated[0][2] if evaluated else None


def against_baseline(group: Group, groups: Sequence[Group]) -> tuple[Group, Interval] | None:
    """The baseline of the group's task and the ratio of the group's perplexity to it, paired by seed; None for the baseline."""
    baseline = baseline_of(task_of(group.settings), groups)
    if baseline is None or baseline is group or group.perplexity is None:
        return None
    references = {run.seed: run.final_perplexity for run in baseline.counted}
    pairs = [(run.final_perplexity, references[run.seed]) for run in group.counted if run.seed in references]
    known = [(perplexity, reference) for perplexity, reference in pairs if perplexity is not None and reference is not None]
    return (baseline, ratio_interval(known)) if known else None
