"""Reads a sweep's file and checks every run before the first one starts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.commands.sweep.warm_up import WARM_UP, disagreements, unusable_warm_up, warm_up_flags
from peft_pretraining.config.arguments import ROWS, Arguments, ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.files import PathError, expanded, read_mapping
from peft_pretraining.config.flag import suggestion
from peft_pretraining.config.parameter_groups import PARAMETER_GROUPS
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
_RATES = ("lr", *(f"{group}_lr" for group in PARAMETER_GROUPS))
_KEYS = ("folder", "base", "seeds", "settings", "nproc_per_node", "search")


@dataclass(frozen=True)
class PlannedRun:
    """A run of the sweep. argv: the arguments of torchrun_main.py; warm_up: the full-rank run whose weights it starts from."""

    name: str
    folder: Path
    argv: tuple[str, ...]
    args: Arguments
    plan: Plan
    warm_up: PlannedRun | None = None


def load_sweep(path: Path) -> SweepFile:
    """Reads and checks a sweep's file. A list as a value makes one run for each of its items.

    An entry of `settings` is a mapping of flags to values, or a list of such mappings, whose combinations compete as one.
    `search`, a list of rounds, chooses among the combinations of each entry; an entry's own `search` replaces the file's.
    Raises ConfigError with all problems, each naming the file, the setting and what to write instead.
    """
    try:
        values = read_mapping(path)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from None
    _check_keys(path, values)
    problems: list[str] = []
    folder, base, seeds, settings = (values.get(key) for key in _KEYS[:4])
    rounds = _rounds(path, values.get("search"), problems)
    entries = [_entry(path, base or {}, item, rounds, problems) for item in settings or ()]
    _raise(problems)
    processes = values.get("nproc_per_node", 1)
    file = SweepFile(path, Path(expanded(str(folder))), processes, tuple(seeds or ()), tuple(entries))
    candidates: list[Sequence[SweepSetting]] = [entry.settings for entry in entries]
    # Every run that could be made is checked before the first one starts: each setting could be the best of its round.
    for number in range(file.num_rounds):
        candidates = file.candidates(number, candidates, of_best=False)
        file.search_round(number, candidates)
    file.final_runs(candidates)
    return file


def _check_keys(path: Path, values: Mapping[Any, Any]) -> None:
    """Raises ConfigError with all problems of the file's keys and of their values' types."""
    problems = [
        f"{path}: unknown key {key!r}{suggestion(str(key), _KEYS)}; known keys: {', '.join(_KEYS)}"
        for key in values
        if key not in _KEYS
    ]
    folder, base, seeds, settings = (values.get(key) for key in _KEYS[:4])
    processes = values.get("nproc_per_node", 1)
    if not isinstance(folder, str) or not folder:
        problems.append(f"{path}: folder {folder!r}: name the folder of the runs, e.g. runs/my-sweep")
    else:
        try:
            expanded(folder)
        except PathError as error:
            problems.append(f"{path}: folder {folder}: {error}")
    if not _is_seeds(seeds):
        problems.append(f"{path}: seeds {seeds!r}: must be a list of different whole numbers, e.g. [42, 1, 2]")
    grids = [grid for item in settings for grid in _grids(item)] if isinstance(settings, list) else []
    if not grids or not all(isinstance(grid, dict) for grid in grids):
        problems.append(
            f"{path}: settings: must be a list of mappings of flags to values, e.g. - {{peft_model: full, lr: 0.001}} "
            "(or of lists of such mappings, which a search compares as one)"
        )
    if base is not None and not isinstance(base, dict):
        problems.append(f"{path}: base: must map the flags of all runs to values, e.g. {{lr: 0.001}}")
    if type(processes) is not int or processes < 1:
        problems.append(f"{path}: nproc_per_node {processes!r}: must be a whole number of processes, at least 1")
    _raise(problems)


def _grids(item: Any) -> list[Any]:
    """The mappings of an item of `settings`."""
    return item if isinstance(item, list) else [item]


def _entry(path: Path, base: Mapping[str, Any], item: Any, rounds: tuple[Round, ...], problems: list[str]) -> Entry:
    """Reads an item of `settings`; adds what cannot work to `problems`. rounds: those of the file."""
    grids = _grids(item)
    settings = [
        setting
        for grid in grids
        for setting in _combinations(path, base, {name: grid[name] for name in grid if name != "search"}, problems)
    ]
    searches = [grid["search"] for grid in grids if "search" in grid]
    if len(searches) > 1:
        problems.append(f"{path}: search: give it to one of the mappings that compete as one entry, not to {len(searches)}")
    rounds = _rounds(path, searches[0], problems) if searches else rounds
    if any(here.lr_factors for here in rounds) and any(setting.flags.get("lr") is None for setting in settings):
        problems.append(f"{path}: search: lr_factors: multiplies learning rates, but {item!r} has no lr; give it, or in `base`")
    return Entry(tuple(settings), rounds)


def without_warm_ups(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that a report compares: all but the full-rank runs that other runs start from."""
    warm_ups = {run.warm_up.name for run in runs if run.warm_up is not None}
    return [run for run in runs if run.name not in warm_ups]


def _rounds(path: Path, search: Any, problems: list[str]) -> tuple[Round, ...]:
    """Reads `search`, the rounds of a search; adds what cannot work to `problems`."""
    if search is None:
        return ()
    rounds: list[Round] = []
    for entry in search if isinstance(search, list) else [search]:
        keep = entry.get("keep") if isinstance(entry, dict) else None
        if type(keep) is not int or keep < 1:
            problems.append(
                f"{path}: search: must be a list of rounds, each with `keep`, how many settings of an entry go on, and flags of "
                f"its runs, e.g. - {{num_training_steps: 150, keep: 2}}, not {entry!r}"
            )
            continue
        factors = entry.get("lr_factors", [])
        if not isinstance(factors, list) or not all(_is_factor(factor) for factor in factors):
            problems.append(
                f"{path}: search: lr_factors {factors!r}: must be a list of factors of the learning rates above 0, e.g. [0.5]"
            )
            continue
        if factors and not rounds:
            problems.append(f"{path}: search: lr_factors: the first round has no best setting yet; give it to a later round")
        flags = {name: value for name, value in entry.items() if name not in ("keep", "lr_factors")}
        problems += _unusable(path, flags)
        problems += [
            f"{path}: search: {name}: a round's runs have one value, not a list"
            for name in flags
            if isinstance(flags[name], list)
        ]
        rounds.append(Round(keep, flags, tuple(factors)))
    return tuple(rounds)


def _is_factor(value: Any) -> bool:
    """True for a finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf


@dataclass(frozen=True)
class Round:
    """A round of a search: runs of the first seed with these flags, of which the `keep` best of each entry go on.

    lr_factors: the best setting of the round before competes with all its learning rates multiplied by each of these too, as
    longer runs need lower ones.
    """

    keep: int
    flags: Mapping[str, Any]
    lr_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Entry:
    """An entry of `settings`: its combinations, and the rounds that choose among them."""

    settings: tuple[SweepSetting, ...]
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class SweepFile:
    """The content of a sweep's file: entries of settings, and how many processes each run has (torchrun from two on)."""

    path: Path
    folder: Path
    nproc_per_node: int
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]

    @property
    def num_rounds(self) -> int:
        """Rounds of the entry that has most of them."""
        return max((len(entry.rounds) for entry in self.entries), default=0)

    @property
    def runs(self) -> list[PlannedRun]:
        """The runs of all settings with all seeds, as without a search."""
        return self.final_runs([entry.settings for entry in self.entries])

    def candidates(
        self, number: int, settings: Sequence[Sequence[SweepSetting]], of_best: bool = True
    ) -> list[Sequence[SweepSetting]]:
        """Returns by entry what competes in a round (counted from 0), without repetitions.

        settings: those that the round before has kept, the best first. of_best: only the best one's rates are multiplied.
        """
        found: list[Sequence[SweepSetting]] = []
        for entry, kept in zip(self.entries, settings, strict=True):
            factors = entry.rounds[number].lr_factors if number < len(entry.rounds) else ()
            scaled = [setting.scaled(factor) for setting in kept[: 1 if of_best else None] for factor in factors]
            both = [*kept, *scaled]
            found.append([setting for place, setting in enumerate(both) if setting not in both[:place]])
        return found

    def search_round(self, number: int, candidates: Sequence[Sequence[SweepSetting]]) -> list[list[list[PlannedRun]]]:
        """Returns the runs of a round (counted from 0): by entry, by candidate, the candidate's own run last.

        An entry with no more than `keep` candidates has none, unless a later round needs to know the best of them. Raises
        ConfigError with all problems.
        """
        problems: list[str] = []
        runs_by_entry: list[list[list[PlannedRun]]] = []
        for entry, settings in zip(self.entries, candidates, strict=True):
            here = entry.rounds[number] if number < len(entry.rounds) else None
            ranked = len(settings) > 1 and any(later.lr_factors for later in entry.rounds[number + 1 :])
            if here is None or (len(settings) <= here.keep and not ranked):
                runs_by_entry.append([])
                continue
            # Runs without flags of their own are runs of the final comparison, which are not repeated there.
            folder = self.folder / f"search-{number + 1}" if here.flags else self.folder
            changed = [dataclasses.replace(setting, flags={**setting.flags, **here.flags}) for setting in settings]
            runs_by_entry.append([self._runs(folder, setting, self.seeds[0], problems) for setting in changed])
        _raise(problems)
        return runs_by_entry

    def final_runs(self, candidates: Sequence[Sequence[SweepSetting]]) -> list[PlannedRun]:
        """Returns the runs of all candidates with all seeds, those of the first seed first. Raises ConfigError."""
        problems: list[str] = []
        runs = [
            run
            for seed, settings in itertools.product(self.seeds, candidates)
            for setting in settings
            for run in self._runs(self.folder, setting, seed, problems)
        ]
        runs = without_duplicates(runs)
        repeated = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
        problems += [f"{self.path}: {name} appears twice: two entries of settings are the same; remove one" for name in repeated]
        _raise(problems)
        return runs

    def _runs(self, folder: Path, setting: SweepSetting, seed: int, problems: list[str]) -> list[PlannedRun]:
        return list(_runs_of(self, folder, setting, seed, problems))


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _is_seeds(seeds: Any) -> bool:
    are_integers = isinstance(seeds, list) and bool(seeds) and all(type(seed) is int for seed in seeds)
    return are_integers and len(set(seeds)) == len(seeds)


@dataclass(frozen=True)
class SweepSetting:
    """Flags of a run. shown: the flags in the run's name; warm_up: the full-rank run that it starts from, if any."""

    flags: dict[str, Any]
    shown: dict[str, Any]
    warm_up: SweepSetting | None = None

    def scaled(self, factor: float) -> SweepSetting:
        """Returns the setting with all its learning rates multiplied. The full-rank run that it starts from keeps its own."""
        changed = {name: _scaled(self.flags[name], factor) for name in _RATES if self.flags.get(name) is not None}
        return SweepSetting({**self.flags, **changed}, {**self.shown, **changed}, self.warm_up)


def _scaled(rate: Any, factor: float) -> Any:
    """Returns rate x factor, rounded so that it reads well in a run's name; a value that is not a number is refused later."""
    try:
        return float(f"{float(rate) * factor:.6g}")
    except (TypeError, ValueError):
        return rate


def _combinations(path: Path, base: Mapping[str, Any], entry: Mapping[str, Any], problems: list[str]) -> Iterator[SweepSetting]:
    """Yields the grid over all lists of an entry and of the base; adds what cannot work to `problems`."""
    warm_up = entry.get(WARM_UP)
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
        if warm_up is None:
            yield SweepSetting(flags, shown)
            continue
        warm_up_name = "-".join(f"{name}{value}" for name, value in sorted(warm_up.items()))
        yield SweepSetting(flags, {**shown, f"{WARM_UP}-": warm_up_name}, SweepSetting(*warm_up_flags(base, entry, flags)))


def _unusable(path: Path, flags: Mapping[str, Any]) -> list[str]:
    problems = [f"{path}: {name}: {_SET_BY_SWEEP[name]}" for name in flags if name in _SET_BY_SWEEP]
    problems += [f"{path}: {name}: is an empty list; give at least one value" for name, value in flags.items() if value == []]
    problems += [
        f"{path}: {name}: must be a value or a list of values, not {value!r}"
        for name, value in flags.items()
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value))
    ]
    return problems


def _runs_of(file: SweepFile, folder: Path, setting: SweepSetting, seed: int, problems: list[str]) -> Iterator[PlannedRun]:
    """Yields the run of a setting with this seed, after the run that it starts from; adds what cannot work to `problems`.

    folder: of the run. The run that it starts from is in the sweep's folder, as a round's flags do not change it.
    """
    path, processes, name = file.path, file.nproc_per_node, run_name(setting.shown, seed)
    planned = _planned_run(path, folder, setting.flags, name, seed, processes, problems)
    if setting.warm_up is None:
        yield from [] if planned is None else [planned]
        return
    # The warm-up is one level deeper, so that a report on the folder leaves it out.
    name = f"{WARM_UP}/{run_name(setting.warm_up.shown, seed)}"
    warm_up = _planned_run(path, file.folder, setting.warm_up.flags, name, seed, processes, problems)
    if planned is not None and warm_up is not None:
        problems += [
            f"{path}, {planned.name}: {problem}"
            for problem in disagreements(planned.args, planned.plan, warm_up.args, warm_up.plan)
        ]
        # The warm-up's folder does not exist yet: the flag would be refused if it were set before the checks.
        args = dataclasses.replace(planned.args, warmed_up_model=str(warm_up.folder))
        argv = (*planned.argv, f"--warmed_up_model={warm_up.folder}")
        yield from (warm_up, dataclasses.replace(planned, args=args, argv=argv, warm_up=warm_up))


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


def without_duplicates(runs: list[PlannedRun]) -> list[PlannedRun]:
    """The runs without duplicates of full-rank runs that several runs start from."""
    warm_ups = {run.warm_up.name for run in runs if run.warm_up is not None}
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
