"""Fine-tuning examples from files: every format gives the same texts, and bad rows are named."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from small_task import rows, write_json

from peft_pretraining.commands.finetune.examples import load_files, load_glue, read_table
from peft_pretraining.commands.finetune.tasks import TASKS
from peft_pretraining.data import DataError

PAIRS = [
    {"sentence1": "12", "sentence2": 'says "no, never"', "label": 1, "idx": 0},
    {"sentence1": "NA", "sentence2": "on\n2020-01-01", "label": 0, "idx": 1},
]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_texts(tmp_path: Path, kind: str) -> None:
    """Including texts that look like a number, a date or a missing value."""
    path, table = tmp_path / f"train.{kind}", pyarrow.Table.from_pylist(PAIRS)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind in ("csv", "tsv"):
        options = pyarrow.csv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
        pyarrow.csv.write_csv(table, path, options)
    else:
        write_json(path, PAIRS)
    data = load_files("mrpc", path, [path])
    assert data.train.columns == (["12", "NA"], ['says "no, never"', "on\n2020-01-01"])
    assert data.train.labels == [1, 0]
    assert list(data.validation) == ["validation"]


def test_labels_may_be_names(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "m.json",
        [{"premise": "a", "hypothesis": "b", "label": name} for name in ("contradiction", "entailment", "neutral")],
    )
    data = load_files("mnli", path, [path, path])
    assert data.train.labels == [2, 0, 1]
    assert list(data.validation) == ["validation_matched", "validation_mismatched"]


@pytest.mark.parametrize(
    ("labels", "names", "metrics"),
    [
        ([0, 1, 1], ("0", "1"), ("accuracy", "f1")),
        ([2, 0, 1], ("0", "1", "2"), ("accuracy",)),
        (["yes", "no", "yes"], ("no", "yes"), ("accuracy", "f1")),
        ([0.5, 2.0, 4.0], (), ("pearson", "spearman")),
    ],
)
def test_a_task_without_name_is_derived_from_the_file(tmp_path: Path, labels: list[Any], names: Any, metrics: Any) -> None:
    path = write_json(tmp_path / "x.json", [{"sentence": "a", "label": label} for label in labels])
    task = load_files(None, path, [path]).task
    assert (task.columns, task.labels, task.metrics) == (("sentence",), names, metrics)


BAD: dict[str, tuple[str | None, list[dict[str, Any]], str]] = {
    "columns": ("rte", rows(4, 0), "no column sentence1, sentence2, it has sentence, label, idx"),
    "any columns": (
        None,
        [{"text": "a", "label": 0}],
        "columns text, label; needs the column label and text columns, one of",
    ),
    "label beyond": (
        "sst2",
        [{"sentence": "a", "label": 2}],
        r"row 1: label 2 is not one of: 0 \(negative\), 1 \(positive\)",
    ),
    "hidden label": ("sst2", [{"sentence": "a", "label": -1}], r"label -1 .*test sets have no labels"),
    "no number": ("stsb", [{"sentence1": "a", "sentence2": "b", "label": "high"}], "label 'high' is not a number"),
    "no label": ("stsb", [{"sentence1": "a", "sentence2": "b", "label": None}], "label None is not a number"),
    "no text": ("sst2", [{"sentence": "a", "label": 0}, {"sentence": None, "label": 0}], "row 2: sentence is None"),
    "one class": (None, [{"sentence": "a", "label": 0}], "at least two different labels are needed"),
    "one value": (
        None,
        [{"sentence": "a", "label": -1}, {"sentence": "b", "label": -1}],
        "all labels are -1; at least two",
    ),
    "mixed": (
        None,
        [{"sentence": "a", "label": "x"}, {"sentence": "a", "label": None}],
        "must hold a word in every row, or a number in every row",
    ),
    "lists": (
        None,
        [{"sentence": "a", "label": [1]}, {"sentence": "b", "label": [2]}],
        "must hold a word in every row, or a number in every row",
    ),
    "empty": ("sst2", [], "is empty"),
}


@pytest.mark.parametrize(("task", "table", "message"), BAD.values(), ids=BAD.keys())
def test_an_invalid_training_set_is_refused(tmp_path: Path, task: str | None, table: list[dict[str, Any]], message: str) -> None:
    path = write_json(tmp_path / "train.json", table)
    with pytest.raises(DataError, match=message):
        load_files(task, path, [path])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 99\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a", "unknown file type"),
        ("a.csv", "sentence,label\na,1\nb\n", "not a table"),
        ("a.json", json.dumps({"sentence": "a"})[:-1], "not a table"),
        ("a.csv", "sentence,label\n", "has no rows"),
        ("a.json", '{"sentence": "a", "label": 0, "label": 1}', "not a table"),
        ("a.parquet", "PAR1", "not a table"),
        ("missing.json", None, "cannot be read"),
        *((f"a.{kind}", POINTER, "a git-lfs pointer, not the file of 99 bytes") for kind in ("csv", "tsv", "json", "parquet")),
    ],
)
def test_an_invalid_table_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_files("sst2", path, [path])


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_file_with_a_byte_order_mark_is_read_and_utf_16_is_named(tmp_path: Path, kind: str, encoding: str) -> None:
    separator = {"csv": ",", "tsv": "\t"}.get(kind)
    text = f"sentence{separator}label\na{separator}1\n" if separator else '{"sentence": "a", "label": 1}\n'
    path = tmp_path / f"a.{kind}"
    path.write_text(text, encoding=encoding)
    if encoding == "utf-8-sig":
        assert load_files("sst2", path, [path]).train.columns == (["a"],)
    else:
        with pytest.raises(DataError, match="is UTF-16 text, not UTF-8; convert it"):
            load_files("sst2", path, [path])


def test_a_file_with_only_a_header_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sentence,label\n")
    with pytest.raises(DataError, match=r"a.csv: has no rows"):
        load_files(None, path, [path])


def test_validation_files_of_the_same_name_are_all_used(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write_json(tmp_path / folder / "dev.json", [{"sentence": folder, "label": n} for n in (0, 1)]))
    found = load_files(None, paths[0], paths).validation
    assert [examples.columns[0][0] for examples in found.values()] == ["a", "b"]


def test_the_hubs_splits_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and validation splits of the `datasets` package are used; test splits, whose labels are hidden, are not."""
    import datasets

    def split(count: int, label: int) -> Any:
        return datasets.Dataset.from_list([{"premise": "a", "hypothesis": "b", "label": label, "idx": 0}] * count)

    names = {"train": (3, 2), "validation_matched": (2, 0), "validation_mismatched": (1, 1), "test_matched": (4, -1)}
    glue = datasets.DatasetDict({name: split(*made) for name, made in names.items()})
    monkeypatch.setattr("peft_pretraining.commands.finetune.examples.hub_problem", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: glue if name == ("nyu-mll/glue", "mnli") else None)
    data = load_glue("mnli")
    assert (data.train.columns, data.train.labels) == ((["a"] * 3, ["b"] * 3), [2, 2, 2])
    assert {name: found.labels for name, found in data.validation.items()} == {
        "validation_matched": [0, 0],
        "validation_mismatched": [1],
    }


def test_all_tasks_of_glue_are_defined() -> None:
    assert list(TASKS) == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    assert {name: task.num_outputs for name, task in TASKS.items() if task.num_outputs != 2} == {"stsb": 1, "mnli": 3}


def test_columns_are_returned_as_lists(tmp_path: Path) -> None:
    assert read_table(write_json(tmp_path / "x.json", rows(2, 0)))["label"] == [0, 1]
