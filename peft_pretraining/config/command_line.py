"""From a command line, a --config file or both to `Arguments`: plain argparse, names of published optimizers, choices.

Every problem of single values is reported at once. No torch in here: `--help` must answer in about a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from peft_pretraining.config.arguments import GROUPS, Arguments, ConfigError, suggestion
from peft_pretraining.config.optimizers import PUBLISHED_NAMES
from peft_pretraining.plan.checks import value_problems


def parse_tokens(text: str) -> int:
    """Number of tokens from `150M`, `1.1B`, `2k` or plain digits (powers of 1000). Raises ValueError."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
    number, unit = (text[:-1], units.get(text[-1:].lower())) if text[-1:].lower() in units else (text, 1)
    value = float(number) * (unit or 1)
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{text!r} is not a whole number of tokens")
    return int(value)


def _parse_bool(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return words[text.lower()]


def _tokens_argument(text: str) -> int:
    try:
        return parse_tokens(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 150M, 1.1B or 20000") from None


class _Parser(argparse.ArgumentParser):
    """argparse that reports an error as one line instead of the whole usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def _parser_for(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """argparse keywords for one dataclass field."""
    annotation = str(field.type)
    metadata = field.metadata
    if metadata.get("const"):
        return {"nargs": "?", "const": metadata["const"]}
    if annotation.startswith("bool"):
        return {"nargs": "?", "const": True, "type": _parse_bool, "metavar": "true|false"}
    if metadata.get("type") == "tokens":
        return {"type": _tokens_argument, "metavar": "TOKENS"}
    for name, kind in (("int", int), ("float", float)):
        if annotation.startswith(name):
            return {"type": kind, "metavar": name.upper()}
    return {"metavar": "NAME" if metadata.get("choices") else "TEXT"}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, grouped by topic; defaults stay None here, which tells what was given from what was not."""
    parser = _Parser(
        prog="torchrun_main.py",
        description="Pretrain a LLaMA from a JSON config, its linears full-rank, low-rank, or sparse plus low-rank (SLTrain).",
        epilog="Every flag can also stand in a YAML or JSON file (--config FILE). Start: bash scripts/quickstart.sh",
        allow_abbrev=False,
    )
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags, grouped by topic, their defaults None."""
    for group_class in GROUPS:
        group = parser.add_argument_group(str(group_class.__doc__))
        for field in dataclasses.fields(group_class):
            shown = field.default not in (None, False, "") and not field.metadata.get("required")
            default = f" (default: {field.default})" if shown else ""
            note = " (required)" if field.metadata.get("required") else default
            text = (field.metadata["help"] + note).replace("%", "%%")
            group.add_argument(f"--{field.name}", default=None, help=text, **_parser_for(field))


def _read_config_file(path: str) -> dict[str, Any]:
    """Values of a --config file, checked for unknown names. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--config {path}: cannot be read ({error})"]) from None
    try:
        if path.endswith((".yaml", ".yml")):
            import yaml

            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except ValueError as error:
        raise ConfigError([f"--config {path}: not valid JSON ({error})"]) from None
    except Exception as error:  # yaml.YAMLError, named without importing yaml above
        raise ConfigError([f"--config {path}: not valid YAML ({' '.join(str(error).split())})"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"--config {path}: must hold names and values, not a {type(values).__name__}"])
    return values


def _file_to_argv(path: str, values: dict[str, Any]) -> list[str]:
    """A config file's values as the command line that says the same, so that both are parsed by one rule."""
    names = {field.name for field in dataclasses.fields(Arguments)} - {"given", "config"}
    bare = {field.name for field in dataclasses.fields(Arguments) if field.metadata.get("const")}
    problems, argv = [], []
    for key, value in values.items():
        if key not in names:
            problems.append(f"--config {path}: unknown name {key!r}{suggestion(str(key), names)}")
        elif isinstance(value, (dict, list)):
            problems.append(f"--config {path}: {key} must be a single value, not {value!r}")
        elif isinstance(value, bool) and key in bare:
            argv += [f"--{key}"] if value else []
        elif value is not None:
            argv.append(f"--{key}={str(value).lower() if isinstance(value, bool) else value}")
    if problems:
        raise ConfigError(problems)
    return argv


def parse_args(argv: Sequence[str]) -> Arguments:
    """Arguments from a command line, with values normalised and every problem of a single value reported.

    Raises:
        ConfigError: an unknown flag, a value of the wrong kind or out of range, a name that is none of the choices.
    """
    parsed, unknown = build_parser().parse_known_args(list(argv))
    given = with_config_file(given_flags(parsed))
    flags = {f"--{field.name}" for field in dataclasses.fields(Arguments)}
    if unknown:
        first = unknown[0].split("=")[0]
        raise ConfigError([f"unknown argument {' '.join(unknown)}{suggestion(first, flags)}; --help lists every flag"])
    return arguments_from(given)


def given_flags(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was said of `add_flags`' flags, by name."""
    names = {field.name for field in dataclasses.fields(Arguments)}
    return {name: value for name, value in vars(parsed).items() if name in names and value is not None}


def with_config_file(given: dict[str, Any]) -> dict[str, Any]:
    """What was said, over what the --config file that it may name says. Raises ConfigError."""
    if "config" not in given:
        return given
    said = _file_to_argv(given["config"], _read_config_file(given["config"]))
    return {**given_flags(build_parser().parse_args(said)), **given}


def arguments_from(given: dict[str, Any]) -> Arguments:
    """Arguments from what was said, by name. Raises ConfigError."""
    problems = [
        f"--{field.name} is required: {field.metadata['help']}"
        for field in dataclasses.fields(Arguments)
        if field.metadata.get("required") and field.name not in given
    ]
    values, more = _without_published_names(given)
    values = _without_per_layer_names(values)
    problems += more + _normalise_choices(values)
    if problems:
        raise ConfigError(problems)
    args = Arguments(**values, given=frozenset(given))
    problems = value_problems(args)
    if problems:
        raise ConfigError(problems)
    if args.grad_clipping == 0:
        args.grad_clipping = None
    return args


def _without_published_names(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values with a published name such as galore_adamw as the flags it stands for; a problem where another method was given."""
    meant = PUBLISHED_NAMES.get(str(given.get("optimizer", "")).lower())
    if meant is None:
        return dict(given), []
    method = given.get("peft_model", meant["peft_model"])
    values = {**given, **meant, "peft_model": method}
    if str(method).lower() == meant["peft_model"]:
        return values, []
    return values, [
        f"--optimizer {given['optimizer']} with --peft_model {method}: it steps dense weights in a subspace, which is "
        f"--peft_model {meant['peft_model']}; leave --peft_model out, or use --optimizer {meant['optimizer']}"
    ]


def _without_per_layer_names(given: dict[str, Any]) -> dict[str, Any]:
    """Values with a published name such as adam8bit_per_layer as adam8bit and --per_layer.

    Published scripts pass --grad_clipping to these, where it had no effect; it has none here either, with a notice.
    """
    name = str(given.get("optimizer", "")).lower()
    if not name.endswith("_per_layer"):
        return dict(given)
    values = {**given, "optimizer": name.removesuffix("_per_layer")}
    if "per_layer" not in given:
        values |= {"per_layer": True, "grad_clipping": None}
    return values


def _normalise_choices(given: dict[str, Any]) -> list[str]:
    """Lower-case the names that are chosen from a list, in place; problems for those that are none of them."""
    problems = []
    for field in dataclasses.fields(Arguments):
        choices = field.metadata.get("choices")
        if choices is None or field.name not in given:
            continue
        value = str(given[field.name]).lower()
        if value in choices:
            given[field.name] = choices[value] if isinstance(choices, dict) else value
        else:
            hint = suggestion(value, set(choices))
            problems.append(f"--{field.name} {given[field.name]}: must be one of {', '.join(choices)}{hint}")
    return problems
