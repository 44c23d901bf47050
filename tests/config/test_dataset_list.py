"""A list of data sets is split where its author means it, and every other reading is refused with the way out."""

import json

import pytest

from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.dataset_list import DatasetListError, dataset_names, joined_datasets, split_datasets
from peft_pretraining.config.files import read_mapping


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c4:0.7, /data/code:0.2, hub:NAME:0.1", [("c4", 0.7), ("/data/code", 0.2), ("hub:NAME", 0.1)]),
        ("c4:7,demo:.3", [("c4", 7.0), ("demo", 0.3)]),
        ("c4, demo", [("c4", None), ("demo", None)]),
        ("hub:a/b,hub:c/d/*.parquet", [("hub:a/b", None), ("hub:c/d/*.parquet", None)]),
        ("hub:a/b/{x,y}.parquet", [("hub:a/b/{x,y}.parquet", None)]),
        ("hub:a/b/{x,y}.parquet:2, c4:1", [("hub:a/b/{x,y}.parquet", 2.0), ("c4", 1.0)]),
        ("/data/[a,b]*.txt", [("/data/[a,b]*.txt", None)]),
        (r"C:\text\a:0.5, D:\text\b:0.5", [(r"C:\text\a", 0.5), (r"D:\text\b", 0.5)]),
        (r"C:\text", [(r"C:\text", None)]),
        ("http://host:8080/a,b.jsonl", [("http://host:8080/a,b.jsonl", None)]),
        ("http://host:8080", [("http://host:8080", None)]),
        ("http://host:8080/a,b.jsonl:0.5,c4:0.5", [("http://host:8080/a,b.jsonl", 0.5), ("c4", 0.5)]),
        ("https://h/a.jsonl, https://h/b.jsonl", [("https://h/a.jsonl", None), ("https://h/b.jsonl", None)]),
        ("https://h/a.jsonl,https://h/b.jsonl", [("https://h/a.jsonl", None), ("https://h/b.jsonl", None)]),
        ('"/data/a, b:1":0.5, c4:1e-1', [("/data/a, b:1", 0.5), ("c4", 0.1)]),
        ('"/a ""b"", c": 2, c4:1', [('/a "b", c', 2.0), ("c4", 1.0)]),
        ("hub:1", [("hub:1", None)]),
    ],
)
def test_names_and_weights(text, expected):
    assert split_datasets(text) == expected


@pytest.mark.parametrize("name", ["a, b", "a,b:0.5", "c4:0.5,demo:0.5", "x:3"])
def test_a_file_that_exists_is_one_data_set(tmp_path, monkeypatch, name):
    """Commas and colons in the name of a file or folder worked before lists did."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert split_datasets(name) == [(name, None)]
    assert split_datasets(str(tmp_path / name)) == [(str(tmp_path / name), None)]


def test_a_pattern_that_matches_is_one_data_set(tmp_path):
    (tmp_path / "a,1.txt").write_text("x")
    assert split_datasets(f"{tmp_path}/a,*.txt") == [(f"{tmp_path}/a,*.txt", None)]


def test_an_existing_name_with_a_number_after_a_colon_has_no_weight(tmp_path):
    (tmp_path / "run:5").mkdir()
    assert split_datasets(f"{tmp_path}/run:5:0.5, c4:0.5") == [(f"{tmp_path}/run:5", 0.5), ("c4", 0.5)]
    assert split_datasets(f"{tmp_path}/run:5, c4") == [(f"{tmp_path}/run:5", None), ("c4", None)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("c4:0, demo:1", "weight 0 of c4"),
        ("c4:-1, demo:1", "weight -1 of c4"),
        ("c4:nan, demo:1", "weight nan of c4"),
        ("c4:inf, demo:1", "weight inf of c4"),
        ("c4:70%, demo:30%", "'70%'"),
        ("c4:0.7, demo", "no weight for demo"),
        ("/data/a,b:0.5, c4:0.5", "double quotes"),
        ("c4, c4", "names c4 twice"),
        ("/data/a:1, /data/./a/:2", "/data/./a/ twice (also as /data/a)"),
        ("c4:0.7", "no second data set"),
        ("c4:0.5, demo:0.5,", "empty entry"),
        ("c4,, demo", "empty entry"),
    ],
)
def test_refusals_name_the_value_and_the_way_out(text, named):
    with pytest.raises(DatasetListError) as raised:
        split_datasets(text)
    assert named in str(raised.value)
    problem = parse_args(["--dataset", text]).refused["dataset"]
    assert problem.startswith(f"--dataset {text}: ")
    assert named in problem
    assert dataset_names(text) == [text]


@pytest.mark.parametrize(
    "value",
    [
        ["c4:0.7", "/data/a, b:0.3"],
        [{"c4": 0.7}, {"/data/a, b": 0.3}],
        {"c4": 0.7, "/data/a, b": 0.3},
        [{"dataset": "c4", "weight": 0.7}, {"dataset": "/data/a, b", "weight": 0.3}],
    ],
)
@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_config_file_takes_lists_and_mappings(tmp_path, value, kind):
    yaml = pytest.importorskip("yaml")
    path, values = tmp_path / f"run.{kind}", {"dataset": value, "eval_dataset": value}
    path.write_text(yaml.safe_dump(values, sort_keys=False) if kind == "yaml" else json.dumps(values))
    assert read_mapping(path)["dataset"] == value
    args = parse_args(["--config", str(path), "--batch_size", "1"])
    assert split_datasets(args.dataset) == split_datasets(str(args.eval_dataset)) == [("c4", 0.7), ("/data/a, b", 0.3)]


@pytest.mark.parametrize("value", [[], {}, [3], [["c4"]], {"c4": True}, {"c4": [1]}, [{"a": 1, "b": 2}], [{"": 1}]])
def test_other_shapes_in_a_config_file_are_refused(tmp_path, value):
    with pytest.raises(DatasetListError):
        joined_datasets(value)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"dataset": value}))
    assert f"--config {path}: dataset" in parse_args(["--config", str(path)]).refused["dataset"]


@pytest.mark.parametrize("names", [["a"], ["a,b"], ['say "a, b"', "c:0.5"], [" spaced ", r"C:\x"], ["[a", "b]"], ["{a,b}", "x"]])
def test_names_survive_being_joined(names):
    assert [name for name, _ in split_datasets(joined_datasets([{name: None} for name in names]))] == names
