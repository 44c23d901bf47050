"""Paths and files as people write them: ~ and variables, byte order marks, repeated names, other encodings."""

import json
from pathlib import Path

import pytest

from peft_pretraining.__main__ import main as command
from peft_pretraining.commands.sweep.settings import load_sweep
from peft_pretraining.config.arguments import ROWS, ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.files import PathError, expanded, read_mapping
from peft_pretraining.data import DataError
from peft_pretraining.data.source import open_source
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.checks import check

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "llama_60m.json")
BASE = ["--model_config", CONFIG, "--batch_size", "8"]
PATHS = [name for name, row in ROWS.items() if row.kind == "path"]
PLACES = [name for name, row in ROWS.items() if row.kind in ("place", "datasets")]
SWEEP = "folder: runs\nbase: {model_config: " + CONFIG + ", batch_size: 8}\nseeds: [1]\nsettings: [{peft_model: full}]\n"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("MISSING", raising=False)
    return tmp_path


@pytest.mark.parametrize("written", ["~/place/x", "${PLACE}/x", "$PLACE/x", "${HOME}/place/x"])
def test_home_and_variables_are_replaced(home, written):
    assert expanded(written) == str(home / "place" / "x")


@pytest.mark.parametrize("written", ["hub:owner/name", "a~b/c~", "s3://bucket/$x", "https://host/a?b=$c", "t5-base", "data/*.gz"])
def test_what_is_no_home_and_no_variable_stays(written):
    assert expanded(written) == written


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("${MISSING}/x", "variable MISSING is not set"),
        ("$MISSING/x", "variable MISSING is not set"),
        ("${EMPTY}/x", "variable EMPTY is not set or empty"),
        ("s3://${MISSING}/x", "variable MISSING is not set"),
        ("~nobody-of-this-name/x", "no home folder for ~nobody-of-this-name"),
    ],
)
def test_what_cannot_be_replaced_is_named(written, said):
    with pytest.raises(PathError, match=said):
        expanded(written)


def test_every_path_of_the_command_line_and_of_a_config_file_is_expanded(home):
    """Places keep their words, so that a run has the same hash on every machine, and are expanded where they are opened."""
    config = home / "run.yaml"
    config.write_text("".join(f"{name}: ${{PLACE}}/{name}\n" for name in [*PATHS, *PLACES] if name != "config"))
    for args in (
        parse_args([f"--{name}=~/place/{name}" for name in [*PATHS, *PLACES] if name != "config"]),
        parse_args(["--config=${HOME}/run.yaml"]),
    ):
        assert not any(f"--{name} is required" in problem for name in PATHS for problem in args.refused.values())
        for name in PATHS:
            assert name == "config" or getattr(args, name) == str(home / "place" / name)
    assert {"model_config", "save_dir", "continue_from", "warmed_up_model", "config"} <= set(PATHS)
    assert set(PLACES) == {"dataset", "eval_dataset", "tokenizer"}


@pytest.mark.parametrize("name", [*PATHS, *PLACES])
def test_a_missing_variable_is_refused_with_its_flag(name):
    given = BASE[2:] if name == "model_config" else BASE
    with pytest.raises(ConfigError, match=rf"--{name} \$\{{MISSING\}}/x: the environment variable MISSING is not set"):
        check(parse_args([*given, f"--{name}", "${MISSING}/x"]), World())


def test_data_is_found_below_home_and_variables(home):
    (home / "place").mkdir()
    (home / "place" / "a.jsonl").write_text('{"text": "x"}\n')
    for dataset in ("~/place", "${PLACE}", "$PLACE/*.jsonl", "file://${PLACE}/a.jsonl"):
        assert len(open_source(dataset, "train").shards) == 1
    with pytest.raises(DataError, match="MISSING is not set"):
        open_source("${MISSING}/x", "train")


def test_the_commands_expand_their_paths(home, capsys):
    assert command(["sweep", "~/no-such-sweep.yaml"]) == 2
    assert str(home / "no-such-sweep.yaml") in capsys.readouterr().err
    assert command(["report", "~/a", "${PLACE}"]) == 2
    said = capsys.readouterr().err
    assert str(home / "a") in said or str(home / "place") in said
    assert command(["export", "--checkpoint", "${MISSING}/x", "--out", "y"]) == 2
    assert "${MISSING}/x: the environment variable MISSING is not set" in capsys.readouterr().err


def test_a_sweep_expands_its_folder_and_its_flags(home):
    path = home / "sweep.yaml"
    path.write_text(SWEEP.replace("folder: runs", "folder: ~/runs"))
    sweep = load_sweep(path)
    assert sweep.folder == home / "runs"
    path.write_text(SWEEP.replace("folder: runs", "folder: ${MISSING}/runs"))
    with pytest.raises(ConfigError, match=r"folder .*MISSING is not set"):
        load_sweep(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.yaml", "lr: 1\nrank: 2\nlr: 3\n", r"given more than once: lr \(lines 1 and 3\)"),
        ("x.yml", '{lr: 1, "lr": 2}', r"given more than once: lr \(line 1\)"),
        ("x.YAML", "a: {b: {c: 1, c: 2}}", "given more than once: c"),
        ("x.json", '{"lr": 1, "lr": 2}', "given more than once: lr"),
        ("x.json", '{"a": {"b": 1, "b": 1}}', "given more than once: b"),
        ("x.json", "{", "not valid JSON"),
        ("x.yaml", "a: [", "not valid YAML"),
        ("x.yaml", "- a", "must hold names and values, not a list"),
    ],
)
def test_a_repeated_name_is_refused_at_any_depth(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_mapping(tmp_path / name)


def test_merged_keys_of_yaml_are_no_repetition(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "base: &base {lr: 1, rank: 2}\nmore: &more {<<: *base, lr: 3}\nlast: {<<: [*more, *base], lr: 4}\n"
    )
    assert read_mapping(tmp_path / "x.yaml")["last"] == {"lr": 4, "rank": 2}


def test_sweeps_and_config_files_refuse_repeated_names(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP + "seeds: [2]\n")
    with pytest.raises(ConfigError, match=r"sweep\.yaml: given more than once: seeds"):
        load_sweep(tmp_path / "sweep.yaml")
    (tmp_path / "run.yaml").write_text("lr: 1\nlr: 2\n")
    with pytest.raises(ConfigError, match=r"--config .*run\.yaml: given more than once: lr"):
        check(parse_args([*BASE, "--config", str(tmp_path / "run.yaml")]), World())


@pytest.mark.parametrize("name", ["x.yaml", "x.json"])
def test_a_byte_order_mark_and_carriage_returns_do_not_matter(tmp_path, name):
    text = json.dumps({"lr": 0.5, "rank": 2}, indent=1).replace("\n", "\r\n")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_mapping(tmp_path / name) == {"lr": 0.5, "rank": 2}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("name", ["x.yaml", "x.json"])
def test_another_encoding_is_named(tmp_path, name, encoding):
    (tmp_path / name).write_bytes('{"lr": 1}'.encode(encoding))
    with pytest.raises(ValueError, match=f"is {encoding.upper()[:6]} text, not UTF-8; convert it"):
        read_mapping(tmp_path / name)
