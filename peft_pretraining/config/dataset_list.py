"""Splits the value of --dataset into data sets and weights: "c4:0.7, /data/code:0.2, hub:NAME:0.1".

A name ends at a comma and its weight follows the last colon. Double quotes (doubled inside) keep a name with commas together;
commas inside brackets, as in a pattern {a,b}, separate nothing.
"""

from __future__ import annotations

import glob
import math
import os
import re
from typing import Any

from peft_pretraining.config.files import PathError, expanded

# Names of the corpus that is built from installed documentation, with the number of pieces of its tokenizer.
DEMOS = {"demo": 8000, "demo-2k": 2000}
# Data sets that are neither files nor addresses.
NAMED = ("c4", *DEMOS)
_BRACKETS = {"{": 1, "[": 1, "}": -1, "]": -1}
# What may follow a comma that ends an address, which may contain commas itself.
_NEXT_NAME = re.compile(r"\s|\w+://|hub:|[/~.]")
_WEIGHT = re.compile(r"[-+]?\.?\d.*|[-+]?(nan|inf|infinity)", re.IGNORECASE)
_QUOTED = re.compile(r'"((?:[^"]|"")*)"(?:\s*:\s*(.*))?')
_KEYS = ({"dataset", "weight"}, {"name", "weight"}, {"path", "weight"})


class DatasetListError(ValueError):
    """A list of data sets cannot be read; the message continues a sentence about it."""


def split_datasets(text: str) -> list[tuple[str, float | None]]:
    """Returns the data sets of a text with their weights, None where no weight is written; a single data set has none.

    Raises DatasetListError: an entry is empty, or the list is invalid (`_refuse_invalid`). PathError: a variable is not set.
    """
    if _exists(text):
        return [(text, None)]
    pieces = _pieces(text)
    names_and_weights = [_name_and_weight(piece, alone=len(pieces) == 1) for piece in pieces]
    if len(names_and_weights) > 1:
        _refuse_invalid(names_and_weights)
    elif names_and_weights[0][1] is not None:
        raise DatasetListError(
            f"has a weight and no second data set to weigh it against; write {names_and_weights[0][0]}, or name more"
        )
    return names_and_weights


def dataset_names(text: str) -> list[str]:
    """Returns the names of `split_datasets`; the text itself where that raises an error, which is reported elsewhere."""
    try:
        return [name for name, _ in split_datasets(text)]
    except (DatasetListError, PathError):
        return [text]


def shares_dataset(one: str, other: str) -> bool:
    """Whether two values of --dataset have a data set in common.

    Names are compared, and paths by where they lead. A folder and a file inside it are different data sets.
    """
    return bool({_place(name) for name in dataset_names(one)} & {_place(name) for name in dataset_names(other)})


def joined_datasets(value: list[Any] | dict[Any, Any]) -> str:
    """Returns the text for a list or mapping of a YAML or JSON file: names, NAME:WEIGHT, {NAME: WEIGHT}, or {dataset:, weight:}.

    Raises DatasetListError: an entry has another form.
    """
    entries = list(value.items()) if isinstance(value, dict) and set(value) not in _KEYS else []
    for item in [] if entries else [value] if isinstance(value, dict) else value:
        if isinstance(item, str):
            entries.append(_name_and_weight(item, alone=False))
        elif isinstance(item, dict) and set(item) in _KEYS:
            entries.append((next(item[key] for key in item if key != "weight"), item["weight"]))
        elif isinstance(item, dict) and len(item) == 1:
            entries += item.items()
        else:
            raise DatasetListError(f"{item!r} is neither NAME, NAME:WEIGHT nor NAME: WEIGHT")
    if not entries:
        raise DatasetListError("is an empty list")
    return ", ".join(_entry_text(name, weight) for name, weight in entries)


def _entry_text(name: Any, weight: Any) -> str:
    if not isinstance(name, str) or not name.strip() or isinstance(weight, bool | list | dict):
        raise DatasetListError(f"{name!r}: {weight!r} is not a name with a number as its weight")
    plain = name == name.strip() and not set(name) & set(',"{}[]') and _name_and_weight(name, alone=False) == (name, None)
    quoted = name if plain else '"' + name.replace('"', '""') + '"'
    return quoted if weight is None else f"{quoted}:{weight}"


def _pieces(text: str) -> list[str]:
    pieces, start, depth, inside = [], 0, 0, False
    for place, character in enumerate(text):
        if character == '"':
            inside = not inside
        elif not inside:
            depth = max(0, depth + _BRACKETS.get(character, 0))
            if character == "," and not depth and _ends_name(text[start:place].strip(), text[place + 1 :]):
                pieces.append(text[start:place].strip())
                start = place + 1
    pieces.append(text[start:].strip())
    if len(pieces) > 1 and "" in pieces:
        raise DatasetListError("has an empty entry; remove the comma that is too much")
    return pieces


def _ends_name(before: str, following: str) -> bool:
    """Whether a comma between these texts ends a name; an address may go on behind it."""
    if "://" not in before or before.endswith('"'):
        return True
    return _NEXT_NAME.match(following) is not None or _name_and_weight(before, alone=False)[1] is not None


def _name_and_weight(piece: str, alone: bool) -> tuple[str, float | None]:
    """alone: the piece is no part of a list, so that an address with a colon is only that."""
    if (quoted := _QUOTED.fullmatch(piece)) is not None:
        return quoted[1].replace('""', '"'), None if quoted[2] is None else _number(quoted[2], piece)
    name, _, weight = (part.strip() for part in piece.rpartition(":"))
    is_port = re.fullmatch(r"\w+://[^/:]*", name) is not None and weight.isdigit()
    if not _WEIGHT.fullmatch(weight) or re.search(r"[/\\]", weight) or name in ("", "hub") or is_port or _exists(piece):
        return piece, None
    if alone and "://" in name:
        return piece, None
    return name, _number(weight, piece)


def _number(text: str, entry: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DatasetListError(f"the weight {text!r} in {entry!r} is not a number; write it as 0.7 or 7") from None


def _exists(name: str) -> bool:
    """Whether a name is that of a local file or folder, or a pattern that matches some."""
    try:
        path = expanded(name.removeprefix("file://"))
    except PathError:
        return False
    try:
        return os.path.lexists(path) or (glob.has_magic(path) and bool({",", ":"} & set(path) and glob.glob(path)))
    except (ValueError, OSError):
        return False


def _refuse_invalid(names_and_weights: list[tuple[str, float | None]]) -> None:
    """Raises DatasetListError: a weight is missing or not above 0, or a data set is named twice."""
    missing = [name for name, weight in names_and_weights if weight is None]
    if missing and len(missing) < len(names_and_weights):
        raise DatasetListError(
            f"no weight for {', '.join(missing)}, though others have one; give all a weight (NAME:0.2), or none (then sizes "
            'decide), and put a name with a comma into double quotes: "a,b":0.2'
        )
    for name, weight in names_and_weights:
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise DatasetListError(
                f"the weight {weight:g} of {name} must be a finite number above 0; leave {name} out, or raise it"
            )
    seen: dict[str, str] = {}
    for name, _ in names_and_weights:
        key = _place(name)
        if key in seen:
            raise DatasetListError(f"names {name} twice{_also(seen[key], name)}; name it once, with the sum of the weights")
        seen[key] = name


def _place(name: str) -> str:
    """Returns what tells a data set from others: a local one's real path, or its name or address without a last slash."""
    place = name.removeprefix("file://").removeprefix("local://")
    if "://" in place or name.startswith("hub:") or name in NAMED:
        return name.rstrip("/")
    try:
        return os.path.realpath(expanded(place))
    except PathError:
        return place


def _also(first: str, second: str) -> str:
    return "" if first == second else f" (also as {first})"
