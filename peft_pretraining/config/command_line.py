"""Reads a command line, a --config file or both into `Arguments`, with argparse.

A value that cannot be read raises no error here. Its problem is stored in `Arguments.refused`, and `plan.checks.check` reports it
together with all others. Imports no torch, because `--help` must answer in about a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

from peft_pretraining.config.arguments import GROUPS, ROWS, Arguments, ConfigError
from peft_pretraining.config.dataset_list import DatasetListError, joined_datasets, split_datasets
from peft_pretraining.config.files import PathError, expanded, read_mapping
from peft_pretraining.config.flag import Row, suggestion
from peft_pretraining.config.optimizers import OPTIMIZERS, PUBLISHED_NAMES

# Flags that can be given without a value.
_BARE = frozenset(
    field.name
    for group in GROUPS
    for field in dataclasses.fields(group)
    if ROWS[field.name].const is not None or str(field.type).startswith("bool")
)
# Flags that published programs turn off by 0.
_OFF_AT_ZERO = ("grad_clipping", "optimizer_random_pruning", "optimizer_magnitude_pruning")


@dataclass(frozen=True)
class Unreadable:
    """Replaces a flag's value that cannot be read; `problem` is the sentence to report."""

    problem: str


def parse_tokens(text: str) -> int:
    """Returns the number of tokens in a text such as `150M`, `1.1B`, `2k` or plain digits (powers of 1000). Raises ValueError."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
    number, unit = (text[:-1], units.get(text[-1:].lower())) if text[-1:].lower() in units else (text, 1)
    try:
        # Exact, so that 8.2B is a whole number.
        value = Decimal(number) * (unit or 1)
    except ArithmeticError:
        raise ValueError(f"{text!r} is not a number of tokens") from None
    if not abs(value) < 2**63 or value != int(value):
        raise ValueError(f"{text!r} is not a whole number of tokens below 2^63")
    return int(value)


def parse_memory(text: str) -> int:
    """Bytes from `80GB` (powers of 1000), `24GiB` (powers of 1024) or `24 GiB`. Raises ValueError, also without a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt])(i?)b?", text.strip().lower())
    num_bytes = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2])) if match else 0
    if num_bytes < 1:
        raise ValueError(f"{text!r} is not a size in bytes")
    return num_bytes


def _parse_bool(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _checked_place(text: str) -> str:
    """The name of a data set or tokenizer as it was given, so that records and hashes of runs do not depend on the machine.

    Where it is opened it is expanded. Raises PathError where that would fail.
    """
    expanded(text)
    return text


def _checked_datasets(text: str) -> str:
    """The data sets as they were given. Raises DatasetListError: an invalid list; PathError as `_checked_place`."""
    for name, _ in split_datasets(text):
        expanded(name)
    return text


def _kind(field: dataclasses.Field[Any], row: Row) -> tuple[Callable[[str], Any], str, str]:
    """Returns the function that reads the flag's value, a description of valid values, and the value's name in --help."""
    if row.kind == "tokens":
        return parse_tokens, "a number of tokens such as 150M, 1.1B or 20000", "TOKENS"
    if row.kind == "memory":
        return parse_memory, "a size above 0 with its unit, such as 80GB or 24GiB", "SIZE"
    if row.kind == "path":
        return expanded, "a path", (row.unit or "path").upper()
    if row.kind == "place":
        return _checked_place, "a path or name", (row.unit or "text").upper()
    if row.kind == "datasets":
        return _checked_datasets, "a data set or a list", (row.unit or "text").upper()
    for name, read, wanted in (
        ("bool", _parse_bool, "true or false"),
        ("int", int, "a whole number"),
        ("float", float, "a number"),
    ):
        if str(field.type).startswith(name):
            return read, wanted, "true|false" if name == "bool" else (row.unit or name).upper()
    return str, "text", "NAME" if row.choices else (row.unit or "text").upper()


def _reader(field: dataclasses.Field[Any], row: Row) -> Callable[[str], Any]:
    """Returns a function that reads the flag's value, or returns `Unreadable`, so that the other flags are read too."""
    read, wanted, _ = _kind(field, row)

    def value_of(text: str) -> Any:
        try:
            return _chosen(field.name, row, read(text))
        except (PathError, DatasetListError) as error:
            return Unreadable(f"--{field.name} {text}: {error}")
        except (ValueError, OverflowError):
            return Unreadable(f"--{field.name} {text}: must be {wanted}")

    return value_of


def _chosen(name: str, row: Row, value: Any) -> Any:
    """Returns the value; for a flag with choices, the value that the chosen name stands for, ignoring case."""
    if row.choices is None or (name == "optimizer" and _published_optimizer(value) is not None):
        return value
    if value.lower() in row.choices:
        return row.choices[value.lower()]
    return Unreadable(f"--{name} {value}: must be one of {', '.join(row.choices)}{suggestion(value.lower(), row.choices)}")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError with one line instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line, grouped by topic; flags that are not given are None."""
    parser = _Parser(
        prog="torchrun_main.py",
        description="Pretrain a LLaMA from a JSON config, its linears full-rank, low-rank, or sparse plus low-rank (SLTrain).",
        epilog="Flags can also be set in a YAML or JSON file (--config FILE). To begin: bash scripts/quickstart.sh",
        allow_abbrev=False,
    )
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds all flags to the parser, grouped by topic, with None as default."""
    for group_class in GROUPS:
        group = parser.add_argument_group(str(group_class.__doc__))
        for field in dataclasses.fields(group_class):
            row = ROWS[field.name]
            shown = field.default not in (None, False, "") and not row.required
            note = " (required)" if row.required else f" (default: {field.default})" if shown else ""
            bare: dict[str, Any] = {"nargs": "?", "const": row.const or True} if field.name in _BARE else {}
            _, _, metavar = _kind(field, row)
            text = (row.help + note).replace("%", "%%")
            group.add_argument(f"--{field.name}", default=None, help=text, metavar=metavar, type=_reader(field, row), **bare)


def parse_args(argv: Sequence[str]) -> Arguments:
    """Returns the Arguments of a command line; problems are in `refused`, and `plan.checks.check` raises them."""
    argv, missing = _without_missing_values(argv)
    # argparse reads -hello as -h with a value, which it refuses.
    stray = [word for word in argv if word.startswith("-h") and word != "-h"]
    parsed, unknown = build_parser().parse_known_args([word for word in argv if word not in stray])
    unknown += stray
    return arguments_from(with_config_file({**given_flags(parsed), **unknown_flags(unknown), **missing}))


def _without_missing_values(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separates flags whose value is missing from the other words, because argparse would stop at the first of them.

    A value such as -5GB is joined to its flag by "=", because argparse would read it as a flag.
    """
    kept: list[str] = []
    missing: dict[str, Any] = {}
    words = iter(zip(argv, [*argv, "--"][1:], strict=True))
    for word, following in words:
        name = word.removeprefix("--")
        takes_value = word.startswith("--") and name in ROWS and name not in _BARE
        if takes_value and following.startswith("--"):
            missing[name] = Unreadable(f"{word}: needs a value ({ROWS[name].help})")
        elif takes_value and following.startswith("-"):
            kept.append(f"{word}={following}")
            next(words)
        else:
            kept.append(word)
    return kept, missing


def unknown_flags(words: Sequence[str]) -> dict[str, Any]:
    """Returns a problem for each unknown flag (with its value) and for each word that belongs to no flag."""
    phrases: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not phrases or not phrases[-1][0].startswith("-") or len(phrases[-1]) == 2:
            phrases.append([])
        phrases[-1].append(word)
    problems = {}
    for phrase in phrases:
        text = " ".join(phrase)
        meaning = _hint(phrase[0].split("=")[0]) if phrase[0].startswith("-") else "; --help lists every flag"
        problems[text] = Unreadable(f"unknown argument {text}{meaning}")
    return problems


def _hint(name: str, prefix: str = "--") -> str:
    # Imported for unknown flags only: no run needs the table.
    from peft_pretraining.config.other_programs import hint

    return hint(name, ROWS, prefix)


def given_flags(parsed: argparse.Namespace) -> dict[str, Any]:
    """Returns the given values of the flags that `add_flags` added, by name; `Unreadable` where a value cannot be read."""
    return {name: value for name, value in vars(parsed).items() if name in ROWS and value is not None}


def with_config_file(given: dict[str, Any]) -> dict[str, Any]:
    """Adds the values of the --config file, if one is given; values of the command line take precedence."""
    path = given.get("config")
    if not isinstance(path, str):
        return given
    try:
        values = read_mapping(path)
    except ValueError as error:
        return {**given, "config": Unreadable(f"--config {path}: {error}")}
    argv, problems = _file_to_argv(path, values)
    return {**problems, **given_flags(build_parser().parse_args(argv)), **given}


def _file_to_argv(path: str, values: dict[Any, Any]) -> tuple[list[str], dict[str, Any]]:
    """Converts a config file's values to a command line, so that both are read the same way; returns it and the problems."""
    argv: list[str] = []
    problems: dict[str, Any] = {}
    for key, value in values.items():
        if key == "config":
            problems[f"{path}: {key}"] = Unreadable(f"--config {path}: a config file cannot name another one; copy its entries")
        elif key not in ROWS:
            problems[f"{path}: {key}"] = Unreadable(f"--config {path}: unknown name {key!r}{_hint(str(key), prefix='')}")
        elif isinstance(value, (dict, list)) and ROWS[key].kind == "datasets":
            try:
                argv.append(f"--{key}={joined_datasets(value)}")
            except DatasetListError as error:
                problems[key] = Unreadable(f"--config {path}: {key}: {error}")
        elif isinstance(value, (dict, list)):
            problems[key] = Unreadable(f"--config {path}: {key} must be a single value, not {value!r}")
        elif isinstance(value, bool) and ROWS[key].const:
            argv += [f"--{key}"] if value else []
        elif value is not None:
            argv.append(f"--{key}={str(value).lower() if isinstance(value, bool) else value}")
    return argv, problems


def arguments_from(given: dict[str, Any]) -> Arguments:
    """Returns the Arguments with the given values; `refused` contains the problems of `Unreadable` and missing ones."""
    refused = {name: value.problem for name, value in given.items() if isinstance(value, Unreadable)}
    values = {name: value for name, value in given.items() if name not in refused}
    # Required flags may be in the --config file, so none is reported as missing if the file cannot be read.
    if "config" not in refused:
        for name, row in ROWS.items():
            if row.required and name not in given:
                refused[name] = f"--{name} is required: {row.help}"
    values = _with_published_optimizer(values, refused)
    for name in _OFF_AT_ZERO:
        if values.get(name) == 0:
            values[name] = None
    if values.get("weight_dtype") is not None:
        values.setdefault("stochastic_rounding", True)
    return Arguments(**values, given=frozenset(given), refused=refused)


def flags_for(arguments: Mapping[str, Any], left_out: Collection[str] = ()) -> list[str]:
    """Returns the flags, quoted for a shell, that give these arguments; values that are the defaults are left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(Arguments)}
    if arguments.get("weight_dtype") is not None:
        defaults["stochastic_rounding"] = True
    return [
        f"--{name} {shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))}"
        for name, value in arguments.items()
        if name not in left_out and value is not None and value != defaults.get(name)
    ]


def _published_optimizer(name: str) -> tuple[str, str | None, bool] | None:
    """Splits a published name such as GaLore_AdamW or adam8bit_per_layer into (optimizer, method, per_layer); None for others."""
    flags = PUBLISHED_NAMES.get(name.lower(), {"optimizer": name.lower()})
    optimizer, method = flags["optimizer"].removesuffix("_per_layer"), flags.get("peft_model")
    per_layer = flags["optimizer"].endswith("_per_layer")
    return (optimizer, method, per_layer) if (method or per_layer) and optimizer in OPTIMIZERS else None


def _with_published_optimizer(values: dict[str, Any], refused: dict[str, str]) -> dict[str, Any]:
    """Replaces a published optimizer name by the flags it stands for: galore_adamw8bit_per_layer by adam8bit, galore, per_layer.

    Published scripts pass --grad_clipping to *_per_layer names, where it had no effect. Here it has none either, with a notice.
    """
    parts = _published_optimizer(values.get("optimizer", ""))
    if parts is None:
        return values
    optimizer, meant, per_layer = parts
    method = values.get("peft_model", meant)
    if meant and method != meant:
        refused["optimizer"] = (
            f"--optimizer {values['optimizer']} with --peft_model {method}: this name means "
            f"--peft_model {meant}; leave --peft_model out, or use --optimizer {optimizer}"
        )
    values = {**values, "optimizer": optimizer} | ({"peft_model": method} if meant else {})
    if per_layer and "per_layer" not in values:
        values |= {"per_layer": True, "grad_clipping": None}
    return values
