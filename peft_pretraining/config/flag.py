"""A flag's row: everything the program knows about one flag, carried by its dataclass field."""

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
    """One flag.

    help: what it does; unit: of its value, shown as the value's name in --help.
    required: whether a run cannot start without it; choices: the names it can be, by what they mean; const: its value where it
    is given bare; kind: "tokens" for counts such as 150M, "path" for a path, expanded when it is read, "place" for a path or a
    name, expanded where it is opened.
    minimum, maximum: the smallest and largest value; above, below: limits that are excluded themselves.
    defines_run: whether the default save_dir depends on it.
    on_resume: whether a resumed run may have another value: "never" (the checkpoint would not fit), "if_allowed" (where
    --allow_changes names it), "freely" (it is not compared).
    warm_start: whether it may differ from the full-rank run that --warmed_up_model starts from.
    methods: names of the methods that read it; None for all.
    no_effect: returns why the flag has no effect beside the other arguments, None where it has one.
    synonyms: names of the same thing in other programs, for "did you mean".
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
    warm_start: bool = False
    methods: tuple[str, ...] | None = None
    no_effect: Callable[[Any], str | None] | None = None
    synonyms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for a class of flag that does not exist."""
        if self.on_resume not in ON_RESUME:
            raise ValueError(f"on_resume {self.on_resume!r}: must be one of {', '.join(ON_RESUME)}")

    def out_of_range(self, value: Any) -> str | None:
        """What the value must be, if it is not; None for a good value, and for None and text."""
        if not isinstance(value, (int, float)):
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        too_low = (self.minimum is not None and value < self.minimum) or (self.above is not None and value <= self.above)
        too_high = (self.maximum is not None and value > self.maximum) or (self.below is not None and value >= self.below)
        if self.minimum is not None and self.maximum is not None and (too_low or too_high):
            return f"must lie between {self.minimum} and {self.maximum}"
        if too_low:
            return "must not be negative" if self.minimum == 0 else f"must be {self._lower_limit()}"
        if too_high:
            return f"must be below {'2^63' if self.below == 2**63 else self.below}"
        return None

    def _lower_limit(self) -> str:
        return f"above {self.above}" if self.minimum is None else f"at least {self.minimum}"


def never(*, defines_run: bool = True, **row: Any) -> dict[str, Any]:
    """The class of a flag that a resumed run cannot change, with the other entries of its row."""
    return {"on_resume": "never", "defines_run": defines_run, **row}


def if_allowed(*, defines_run: bool = True, **row: Any) -> dict[str, Any]:
    """The class of a flag that a resumed run may change where --allow_changes names it, with the other entries of its row."""
    return {"on_resume": "if_allowed", "defines_run": defines_run, **row}


def freely(*, defines_run: bool = False, **row: Any) -> dict[str, Any]:
    """The class of a flag that a resumed run may change, with the other entries of its row."""
    return {"on_resume": "freely", "defines_run": defines_run, **row}


def flag(default: Any, help: str, row: Mapping[str, Any] | None = None) -> Any:
    """A dataclass field that is a flag, with its row.

    row: made by `never`, `if_allowed` or `freely` (the default: most flags are of that class), from the entries of Row that
    differ from their defaults. There choices may be names without their meanings, and synonyms are separated by spaces.
    """
    entries = dict(freely() if row is None else row)
    choices = entries.get("choices")
    if choices is not None and not isinstance(choices, Mapping):
        entries["choices"] = {name: name for name in choices}
    entries["synonyms"] = tuple(entries.get("synonyms", "").split())
    return dataclasses.field(default=default, metadata={"row": Row(help, **entries)})


def rows_of(groups: Iterable[type]) -> dict[str, Row]:
    """The rows of all fields of these dataclasses, by flag name. Raises TypeError for a field without a row."""
    rows: dict[str, Row] = {}
    for group in groups:
        for field in dataclasses.fields(group):
            if "row" not in field.metadata:
                raise TypeError(f"{group.__name__}.{field.name}: a flag needs a row; declare it as flag(default, help, ...)")
            rows[field.name] = field.metadata["row"]
    return rows


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown name: the known name closest to it, if any."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def suggested_flag(name: str, rows: Mapping[str, Row]) -> str | None:
    """The flag that an unknown name probably means, by its synonyms or by its spelling; None where nothing is close."""
    meant = {synonym: flag_name for flag_name, row in rows.items() for synonym in (flag_name, *row.synonyms)}
    name = name.lstrip("-").replace("-", "_").lower()
    close = [name] if name in meant else difflib.get_close_matches(name, list(meant), n=1)
    return meant[close[0]] if close else None
