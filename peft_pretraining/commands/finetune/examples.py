"""Reads texts with labels in GLUE's format, from local files or the hub, and checks every row before training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.commands.finetune.tasks import TASKS, Task, task_of
from peft_pretraining.config.files import beginning, encoding_problem, lfs_problem
from peft_pretraining.data import DataError, first_line
from peft_pretraining.data.tokenizer import hub_problem

HUB_NAME = "nyu-mll/glue"
_TEXT = (".json", ".jsonl", ".csv", ".tsv")
_FILES = ".json or .jsonl (a line for each example), .csv, .tsv, .parquet"


@dataclass(frozen=True)
class Examples:
    """Labelled texts. columns: one or two lists of texts of equal length. labels: class numbers, or values of a regression."""

    columns: tuple[list[str], ...]
    labels: list[float]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Training and validation examples of a task. validation: split name -> examples."""

    task: Task
    train: Examples
    validation: dict[str, Examples]


def load_files(task_name: str | None, train: Path, validation: Sequence[Path]) -> Dataset:
    """Reads a data set from files; without a task name the training file's columns determine the task. Raises DataError."""
    table = read_table(train)
    try:
        task = TASKS[task_name] if task_name else task_of(table, str(train))
    except ValueError as error:
        raise DataError(str(error)) from None
    names: Sequence[str] = task.validation
    if len(validation) != len(names):
        names = ["validation"] if len(validation) == 1 else [f"validation_{path.stem}" for path in validation]
        if len(set(names)) < len(names):
            names = [f"validation_{number}" for number in range(1, len(names) + 1)]
    splits = {name: checked(read_table(path), task, str(path)) for name, path in zip(names, validation, strict=True)}
    return Dataset(task, checked(table, task, str(train)), splits)


def load_glue(task_name: str) -> Dataset:
    """Reads a GLUE task from the hub or its local cache. Raises DataError."""
    import datasets
    from huggingface_hub import constants

    task, problem = TASKS[task_name], hub_problem()
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    # Without offline mode, datasets retries for half a minute before it reads the cache.
    if problem is not None:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        splits: Any = datasets.load_dataset(HUB_NAME, task_name)
    except Exception as error:
        # Connection errors come in many types, wrapped or not.
        raise DataError(
            f"--task {task_name}: {HUB_NAME} is available neither from the hub ({problem or first_line(error)}) nor in the "
            "local cache; check the network, or give --train_file and --validation_file"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
    tables = {name: {column: splits[name][column] for column in splits[name].column_names} for name in splits}
    examples = {name: checked(tables[name], task, f"{HUB_NAME} {task_name} {name}") for name in ("train", *task.validation)}
    return Dataset(task, examples.pop("train"), examples)


def read_table(path: Path) -> dict[str, list[Any]]:
    """Reads a local file as column name -> values. Raises DataError."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    kind, head = path.suffix.lower(), beginning(path)
    if (problem := lfs_problem(head) or (encoding_problem(head) if kind in _TEXT else None)) is not None:
        raise DataError(f"{path}: {problem}")
    try:
        if kind in (".csv", ".tsv"):
            # Text columns stay text where a value looks like a number or a date.
            texts = {column: pyarrow.string() for task in TASKS.values() for column in task.columns}
            table = pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",", newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(column_types=texts),
            )
        elif kind in (".json", ".jsonl"):
            table = pyarrow.json.read_json(path)
        elif kind == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            raise DataError(f"{path}: unknown file type; give {_FILES}")
        columns: dict[str, list[Any]] = table.to_pydict()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is empty or not a table ({first_line(error)}); give {_FILES}") from None
    return columns


def checked(table: Mapping[str, Sequence[Any]], task: Task, where: str) -> Examples:
    """Returns the texts and labels of a table after checking every row.

    Raises:
        DataError: a column is missing, the table is empty, or a row lacks a text or a valid label.
    """
    missing = [column for column in (*task.columns, "label") if column not in table]
    if missing:
        raise DataError(
            f"{where}: has no column {', '.join(missing)}, it has {', '.join(table)}; the task needs "
            f"{', '.join(task.columns)}, label"
        )
    if not len(table["label"]):
        raise DataError(f"{where}: has no rows")
    columns = tuple(list(table[column]) for column in task.columns)
    for name, texts in zip(task.columns, columns, strict=True):
        bad = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
        if bad is not None:
            raise DataError(f"{where}, row {bad + 1}: {name} is {texts[bad]!r}, but must be text")
    return Examples(columns, [_label(label, task, where, row) for row, label in enumerate(table["label"], 1)])


def _label(label: Any, task: Task, where: str, row: int) -> float:
    if task.labels:
        if label in task.labels:
            return task.labels.index(label)
        if isinstance(label, (int, float)) and label in range(len(task.labels)):
            return int(label)
        names = ", ".join(f"{number} ({name})" for number, name in enumerate(task.labels))
        hint = " (GLUE's test sets have no labels; use the validation set)" if label == -1 else ""
        raise DataError(f"{where}, row {row}: label {label!r} is not one of: {names}{hint}")
    if isinstance(label, (int, float)) and math.isfinite(label):
        return float(label)
    raise DataError(f"{where}, row {row}: label {label!r} is not a number, but the task is a regression")
