"""Reads a sweep's file and checks every run before the first one starts."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.commands.sweep.warm_up import WARM_UP, disagreements, unusable_warm_up, warm_up_flags
from peft_pretraining.config.arguments import ROWS, Arguments, ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.files import PathError, expanded, read_mapping
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.plan import Plan, make_plan

# Flags that a setting may not have, as the sweep sets them itself, and what to do instead.
_SET_BY_SWEEP = {
    "save_dir": "the sweep names its runs' folders; give their parent folder as `folder`",
    "seed": "give the seeds as `seeds`",
    "resume": "a sweep always continues existing runs; remove a run's folder to repeat it",
    "continue_from": "a sweep always continues existing runs; leave it out",
    "dry_run": "give --dry_run to the sweep command",
}
_KEYS = ("folder", "base", "seeds", "settings", "nproc_per_node")


@dataclass(frozen=True)
class PlannedRun:
    """A run of the sweep. argv: the arguments of torchrun_main.py; after: the full-rank run whose weights it starts from."""

    name: str
    folder: Path
    argv: tuple[str, ...]
    args: Arguments
    plan: Plan
    after: PlannedRun | None = None


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep's file. runs: in order; nproc_per_node: processes of each run, through torchrun if 2 or more."""

    path: Path
    folder: Path
    nproc_per_node: int
    runs: tuple[PlannedRun, ...]

    @property
    def compared(self) -> tuple[PlannedRun, ...]:
        """The runs that the report compares: all but the full-rank runs that other runs start from."""
        warm_ups = {run.after.name for run in self.runs if run.after is not None}
        return tuple(run for run in self.runs if run.name not in warm_ups)


def load_sweep(path: Path) -> Sweep:
    """Reads and checks a sweep's file. A list as a value makes one run for each of its items.

    Raises ConfigError with all problems, each naming the file, the setting and what to write instead.
    """
    try:
        values = read_mapping(path)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from None
    problems = [
        f"{path}: unknown key {key!r}{_suggestion(str(key))}; known keys: {', '.join(_KEYS)}"
        for key in values
        if key not in _KEYS
    ]
    folder, base, seeds, settings = (values.get(key) for key in _KEYS[:4])
    processes = values.get("nproc_per_node", 1)
    if not isinstance(folder, str) or not folder:
        problems.append(f"{path}: folder {folder!r}: name the folder of the runs, e.g. runs/my-sweep")
    else:
        try:
            folder = expanded(folder)
        except PathError as error:
            problems.append(f"{path}: folder {folder}: {error}")
    if not _is_seeds(seeds):
        problems.append(f"{path}: seeds {seeds!r}: must be a list of different whole numbers, e.g. [42, 1, 2]")
    if not isinstance(settings, list) or not settings or not all(isinstance(entry, dict) for entry in settings):
        problems.append(
            f"{path}: settings: must be a list of mappings of flags to values, e.g. - {{peft_model: full, lr: 0.001}}"
        )
    if base is not None and not isinstance(base, dict):
        problems.append(f"{path}: base: must map the flags of all runs to values, e.g. {{lr: 0.001}}")
    if type(processes) is not int or processes < 1:
        problems.append(f"{path}: nproc_per_node {processes!r}: must be a whole number of processes, at least 1")
    if problems:
        raise ConfigError(problems)
    runs: list[PlannedRun] = []
    for seed, entry in itertools.product(seeds or (), settings or ()):
        for setting in _combinations(path, base or {}, entry, problems):
            runs += _runs_of(path, Path(str(folder)), setting, seed, processes, problems)
    runs = _without_duplicates(runs)
    repeated = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    problems += [f"{path}: {name} appears twice: two entries of settings are the same; remove one" for name in repeated]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return Sweep(path, Path(str(folder)), processes, tuple(runs))


def _is_seeds(seeds: Any) -> bool:
    are_integers = isinstance(seeds, list) and bool(seeds) and all(type(seed) is int for seed in seeds)
    return are_integers and len(set(seeds)) == len(seeds)


@dataclass(frozen=True)
class _Setting:
    """Flags of a run. shown: the flags in the run's name; first: the full-rank run that it starts from, if any."""

    flags: dict[str, Any]
    shown: dict[str, Any]
    first: _Setting | None = None


def _combinations(path: Path, base: Mapping[str, Any], entry: Mapping[str, Any], problems: list[str]) -> Iterator[_Setting]:
    """Yields the grid over all lists of an entry and of the base; adds what cannot work to `problems`."""
    first = entry.get(WARM_UP)
    merged = {name: value for name, value in {**base, **entry}.items() if name != WARM_UP}
    unusable = _unusable(path, merged)
    if WARM_UP in base or WARM_UP in entry:
        problem = unusable_warm_up(base, entry)
        unusable += _unusable(path, entry[WARM_UP]) if problem is None else [f"{path}: {problem}"]
    if unusable:
        problems += unusable
        return
    lists = {name: value if isinstance(value, list) else [value] for name, value in merged.items()}
    named = {name for name in merged if name in entry or isinstance(merged[name], list)}
    for values in itertools.product(*lists.values()):
        flags = dict(zip(lists, values, strict=True))
        shown = {name: value for name, value in flags.items() if name in named}
        if first is None:
            yield _Setting(flags, shown)
            continue
        warm_up_name = "-".join(f"{name}{value}" for name, value in sorted(first.items()))
        yield _Setting(flags, {**shown, f"{WARM_UP}-": warm_up_name}, _Setting(*warm_up_flags(base, entry, flags)))


def _unusable(path: Path, flags: Mapping[str, Any]) -> list[str]:
    problems = [f"{path}: {name}: {_SET_BY_SWEEP[name]}" for name in flags if name in _SET_BY_SWEEP]
    problems += [f"{path}: {name}: is an empty list; give at least one value" for name, value in flags.items() if value == []]
    problems += [
        f"{path}: {name}: must be a value or a list of values, not {value!r}"
        for name, value in flags.items()
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value))
    ]
    return problems


def _runs_of(path: Path, folder: Path, setting: _Setting, seed: int, processes: int, problems: list[str]) -> Iterator[PlannedRun]:
    """Yields the run of a setting with this seed, after the run that it starts from; adds what cannot work to `problems`."""
    name = run_name(setting.shown, seed)
    planned = _planned_run(path, folder, setting.flags, name, seed, processes, problems)
    if setting.first is None:
        yield from [] if planned is None else [planned]
        return
    name = f"{WARM_UP}/{run_name(setting.first.shown, seed)}"  # one level deeper, so that a report on the folder leaves it out
    after = _planned_run(path, folder, setting.first.flags, name, seed, processes, problems)
    if planned is not None and after is not None:
        problems += [
            f"{path}, {planned.name}: {problem}" for problem in disagreements(planned.args, planned.plan, after.args, after.plan)
        ]
        # The warm-up's folder does not exist yet: the flag would be refused if it were set before the checks.
        args = dataclasses.replace(planned.args, warmed_up_model=str(after.folder))
        argv = (*planned.argv, f"--warmed_up_model={after.folder}")
        yield from (after, dataclasses.replace(planned, args=args, argv=argv, after=after))


def _planned_run(
    path: Path,
    folder: Path,
    flags: Mapping[str, Any],
    name: str,
    seed: int,
    processes: int,
    problems: list[str],
) -> PlannedRun | None:
    argv = (*_argv(flags), f"--seed={seed}", f"--save_dir={folder / name}")
    try:
        args = parse_args(argv)
        return PlannedRun(name, folder / name, argv, args, make_plan(args, World(size=processes)))
    except ConfigError as error:
        problems += [f"{path}, {name}: {problem}" for problem in error.problems]
        return None


def _without_duplicates(runs: list[PlannedRun]) -> list[PlannedRun]:
    """The runs without duplicates of full-rank runs that several runs start from."""
    warm_ups = {run.after.name for run in runs if run.after is not None}
    seen: set[tuple[str, ...]] = set()
    kept = []
    for run in runs:
        if run.name not in warm_ups or run.argv not in seen:
            kept.append(run)
        seen.add(run.argv)
    return kept


def _argv(flags: Mapping[str, Any]) -> Iterator[str]:
    """Yields flags as on the command line; null leaves a flag out, true gives a flag with an optional value no value."""
    for name, value in flags.items():
        if isinstance(value, bool) and name in ROWS and ROWS[name].const:
            yield from ([f"--{name}"] if value else [])
        elif value is not None:
            yield f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


def run_name(shown: Mapping[str, Any], seed: int) -> str:
    """The name of a run's folder: method, setting and seed, so that the same setting finds its folder again."""
    method = shown.get("peft_model")
    parts = [] if method is None else [str(method)]
    parts += [f"{name}{value}" for name, value in shown.items() if name != "peft_model"]
    return re.sub(r"[^\w.+-]+", "_", "-".join([*parts, f"seed{seed}"]))


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, _KEYS, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
