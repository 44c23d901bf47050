"""The row of a flag: all its properties, stored in the metadata of its dataclass field."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Whether a flag may differ from the checkpoint's value when a run is resumed.
ON_RESUME = ("never", "if_allowed", "freely")


@dataclass(frozen=True)
class Row:
    """The properties of one flag.

    help: what the flag does. unit: the value's unit, shown as the value's name in --help.
    required: True if a run cannot start without the flag. choices: accepted names -> the value each stands for.
    const: the value of the flag given without a value. kind: "tokens" for counts such as 150M, "memory"
    for bytes such as 80GB, "path" for a path, expanded when it is read, "place" for a path or a name, expanded where it is
    opened, "datasets" for one such name or a list of them with weights.
    minimum, maximum: the smallest and largest value. above, below: limits that are not allowed themselves.
    defines_run: True if the default save_dir depends on the flag.
    added_later: True if runs were made before the flag existed; the default save_dir does not depend on it at its default.
    on_resume: whether a resumed run may change the flag: "never" (the checkpoint would not fit), "if_allowed" (if
    --allow_changes names it) or "freely" (not compared).
    warm_start: True if the flag may differ from that of the full-rank run that --warmed_up_model starts from.
    methods: names of the methods that read the flag; None for all.
    no_effect: returns the reason why the flag has no effect with the given arguments, or None if it has one.
    synonyms: the flag's names in other programs, for "did you mean".
    """

    help: str
    defines_run: bool
    on_resume: str
    unit: str | None = None
    required: bool = False
    choices: Mapping[str, str] | None = None
    const: str | None = None
    kind: str | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    added_later: bool = False
    warm_start: bool = False
    methods: tuple[str, ...] | None = None
    no_effect: Callable[[Any], str | None] | None = None
    synonyms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown value of on_resume."""
        if self.on_resume not in ON_RESUME:
            raise ValueError(f"on_resume {self.on_resume!r}: must be one of {', '.join(ON_RESUME)}")

    def out_of_range(self, value: Any) -> str | None:
        """Returns the requirement that a number violates; None if it violates none, and for other values."""
        if not isinstance(value, (int, float)):
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        too_low = (self.minimum is not None and value < self.minimum) or (self.above is not None and value <= self.above)
        too_high = (self.maximum is not None and value > self.maximum) or (self.below is not None and value >= self.below)
        if self.maximum is not None and (too_low or too_high):
            between = f"lie between {self.minimum}" if self.above is None else f"be {self._lower_limit()}"
            return f"must {between} and {'at most ' if self.above is not None else ''}{self.maximum}"
        if too_low:
            return "must not be negative" if self.minimum == 0 else f"must be {self._lower_limit()}"
        if too_high:
            return f"must be below {'2^63' if self.below == 2**63 else self.below}"
        return None

    def _lower_limit(self) -> str:
        return f"above {self.above}" if self.minimum is None else f"at least {self.minimum}"


def never(*, defines_run: bool = True, **row: Any) -> dict[str, Any]:
    """Returns the row entries of a flag that a resumed run cannot change."""
    return {"on_resume": "never", "defines_run": defines_run, **row}


def if_allowed(*, defines_run: bool = True, **row: Any) -> dict[str, Any]:
    """Returns the row entries of a flag that a resumed run may change if --allow_changes names it."""
    return {"on_resume": "if_allowed", "defines_run": defines_run, **row}


def freely(*, defines_run: bool = False, **row: Any) -> dict[str, Any]:
    """Returns the row entries of a flag that a resumed run may change."""
    return {"on_resume": "freely", "defines_run": defines_run, **row}


def flag(default: Any, help: str, row: Mapping[str, Any] | None = None) -> Any:
    """Returns a dataclass field for a flag, with its row.

    row: entries of Row that differ from its defaults, made by `never`, `if_allowed` or `freely` (default: `freely()`). Choices
    that stand for themselves may be a sequence of names; synonyms are one string, separated by spaces.
    """
    entries = dict(freely() if row is None else row)
    choices = entries.get("choices")
    if choices is not None and not isinstance(choices, Mapping):
        entries["choices"] = {name: name for name in choices}
    entries["synonyms"] = tuple(entries.get("synonyms", "").split())
    return dataclasses.field(default=default, metadata={"row": Row(help, **entries)})


def rows_of(groups: Iterable[type]) -> dict[str, Row]:
    """Returns the rows of all fields of these dataclasses, by flag name. Raises TypeError for a field without a row."""
    rows: dict[str, Row] = {}
    for group in groups:
        for field in dataclasses.fields(group):
            if "row" not in field.metadata:
                raise TypeError(f"{group.__name__}.{field.name}: a flag needs a row; declare it as flag(default, help, ...)")
            rows[field.name] = field.metadata["row"]
    return rows


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: the known name with the most similar spelling, or ""."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def suggested_flag(name: str, rows: Mapping[str, Row]) -> str | None:
    """Returns the flag that an unknown name probably means, by synonym or spelling; None if no flag is similar."""
    meant = {synonym: flag_name for flag_name, row in rows.items() for synonym in (flag_name, *row.synonyms)}
    name = name.lstrip("-").replace("-", "_").lower()
    close = [name] if name in meant else difflib.get_close_matches(name, list(meant), n=1, cutoff=0.8)
    return meant[close[0]] if close else None
