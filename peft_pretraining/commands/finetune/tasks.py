"""GLUE's tasks (arXiv 1804.07461): columns, meaning of the labels, metrics. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A task. columns: names of the one or two text columns. labels: class names in the order of their numbers, empty for a
    regression. metrics: names in metrics.METRICS, of which the first selects the best epoch. validation: names of the splits."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the model's head."""
        return max(1, len(self.labels))


# Labels above this are values of a regression, not classes.
_MOST_CLASSES = 1000
_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")

TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "mrpc": Task(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": Task(_PAIR, (), ("pearson", "spearman")),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": Task(("question", "sentence"), _ENTAILED),
    "rte": Task(_PAIR, _ENTAILED),
    "wnli": Task(_PAIR, ("not_entailment", "entailment")),
}


def task_of(table: Mapping[str, Sequence[Any]], where: str) -> Task:
    """The task of a training set that is not in GLUE but has the columns of a GLUE task; its labels determine the classes.

    Raises:
        ValueError: unknown columns, or labels that fit no task.
    """
    known = sorted(dict.fromkeys(task.columns for task in TASKS.values()), key=len, reverse=True)
    columns = next((columns for columns in known if set(columns) <= set(table)), None)
    if columns is None or "label" not in table:
        choices = "; ".join(", ".join(columns) for columns in known)
        raise ValueError(f"{where}: columns {', '.join(table)}; needs the column label and text columns, one of: {choices}")
    given = table["label"]
    if not given:
        raise ValueError(f"{where}: has no rows")
    if all(label == given[0] for label in given):
        raise ValueError(f"{where}: all labels are {given[0]!r}; at least two different labels are needed")
    if all(isinstance(label, str) for label in given):
        names = tuple(sorted(set(given)))
    elif all(isinstance(label, (int, float)) and math.isfinite(label) for label in given):
        if not all(label == int(label) and 0 <= label < _MOST_CLASSES for label in given):
            return Task(columns, (), ("pearson", "spearman"))
        names = tuple(str(number) for number in range(int(max(given)) + 1))
    else:
        raise ValueError(f"{where}: the column label must hold a word in every row, or a number in every row")
    return Task(columns, names, ("accuracy", "f1") if len(names) == 2 else ("accuracy",))
