"""A sweep's file: which runs it asks for, every one checked before the first begins."""

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

from peft_pretraining.command_line import parse_args
from peft_pretraining.config import Arguments, ConfigError
from peft_pretraining.distributed import World
from peft_pretraining.plan import Plan, make_plan

# The sweep itself says these, or they would undo what it does.
_OWN = {
    "save_dir": "the sweep names its runs' folders (`folder`)",
    "seed": "give the seeds as `seeds`",
    "resume": "a sweep goes on with what is there; remove a run's folder to make it anew",
    "continue_from": "a sweep goes on with what is there",
    "dry_run": "give it to the sweep command",
}
_KEYS = ("folder", "base", "seeds", "settings", "nproc_per_node")


@dataclass(frozen=True)
class Wanted:
    """A run that the sweep asks for. `argv`: what follows torchrun_main.py."""

    name: str
    folder: Path
    argv: tuple[str, ...]
    args: Arguments
    plan: Plan


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says. nproc_per_node: processes of each run, by torchrun from 2 on."""

    path: Path
    folder: Path
    nproc_per_node: int
    runs: tuple[Wanted, ...]


def load_sweep(path: Path) -> Sweep:
    """Read and check a sweep's file. A value that is a list stands for each of its values in turn.

    Raises ConfigError with all problems, each naming file, setting and way out.
    """
    values = _read(path)
    problems = [
        f"{path}: unknown key {key!r}{_suggestion(str(key))}; there are {', '.join(_KEYS)}"
        for key in values
        if key not in _KEYS
    ]
    folder, base, seeds, settings = (values.get(key) for key in _KEYS[:4])
    processes = values.get("nproc_per_node", 1)
    if not isinstance(folder, str) or not folder:
        problems.append(f"{path}: folder {folder!r}: name the folder of the runs, e.g. runs/my-sweep")
    if not _is_seeds(seeds):
        problems.append(f"{path}: seeds {seeds!r}: must be a list of whole numbers, each once, e.g. [42, 1, 2]")
    if not isinstance(settings, list) or not settings or not all(isinstance(entry, dict) for entry in settings):
        problems.append(
            f"{path}: settings: must be a list of mappings of flags to values, e.g. - {{peft_model: full, lr: 0.001}}"
        )
    if base is not None and not isinstance(base, dict):
        problems.append(f"{path}: base: must map flags, which all runs have, to values")
    if type(processes) is not int or processes < 1:
        problems.append(f"{path}: nproc_per_node {processes!r}: must be a whole number of processes, at least 1")
    if problems:
        raise ConfigError(problems)
    runs: list[Wanted] = []
    for seed, entry in itertools.product(seeds or (), settings or ()):
        for own, shown in _combinations(path, base or {}, entry, problems):
            wanted = _wanted(path, Path(str(folder)), own, shown, seed, processes, problems)
            runs += [wanted] if wanted is not None else []
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    problems += [f"{path}: {name} is asked for twice: two entries of settings say the same" for name in twice]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return Sweep(path, Path(str(folder)), processes, tuple(runs))


def _read(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read ({error})"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not valid YAML ({' '.join(str(error).split())})"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: must hold {', '.join(_KEYS)}, not a {type(values).__name__}"])
    return values


def _is_seeds(seeds: Any) -> bool:
    whole = isinstance(seeds, list) and bool(seeds) and all(type(seed) is int for seed in seeds)
    return whole and len(set(seeds)) == len(seeds)


def _combinations(
    path: Path, base: Mapping[str, Any], entry: Mapping[str, Any], problems: list[str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(every flag, the flags that the run's name is made of): the grid over all lists of an entry and of the base."""
    merged = {**base, **entry}
    unusable = [f"{path}: {name}: {_OWN[name]}" for name in merged if name in _OWN]
    unusable += [f"{path}: {name}: is an empty list" for name, value in merged.items() if value == []]
    unusable += [
        f"{path}: {name}: must be a value or a list of values, not {value!r}"
        for name, value in merged.items()
        if isinstance(value, dict)
        or (isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value))
    ]
    if unusable:
        problems += unusable
        return
    lists = {name: value if isinstance(value, list) else [value] for name, value in merged.items()}
    named = {name for name in merged if name in entry or isinstance(merged[name], list)}
    for values in itertools.product(*lists.values()):
        flags = dict(zip(lists, values, strict=True))
        yield flags, {name: value for name, value in flags.items() if name in named}


def _wanted(
    path: Path,
    folder: Path,
    flags: dict[str, Any],
    shown: dict[str, Any],
    seed: int,
    processes: int,
    problems: list[str],
) -> Wanted | None:
    name = run_name(shown, seed)
    argv = (*_argv(flags), f"--seed={seed}", f"--save_dir={folder / name}")
    try:
        args = parse_args(argv)
        return Wanted(name, folder / name, argv, args, make_plan(args, World(size=processes)))
    except ConfigError as error:
        problems += [f"{path}, {name}: {problem}" for problem in error.problems]
        return None


def _argv(flags: Mapping[str, Any]) -> Iterator[str]:
    """Flags as on the command line. A flag whose kind is an optional value works bare; null leaves one out."""
    bare = {field.name for field in dataclasses.fields(Arguments) if field.metadata.get("const")}
    for name, value in flags.items():
        if isinstance(value, bool) and name in bare:
            yield from ([f"--{name}"] if value else [])
        elif value is not None:
            yield f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


def run_name(shown: Mapping[str, Any], seed: int) -> str:
    """The name of a run's folder: its method, what its setting says, its seed. The same setting finds its folder again."""
    method = shown.get("peft_model")
    parts = [] if method is None else [str(method)]
    parts += [f"{name}{value}" for name, value in shown.items() if name != "peft_model"]
    return re.sub(r"[^\w.+-]+", "_", "-".join([*parts, f"seed{seed}"]))


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, _KEYS, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
