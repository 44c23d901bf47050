"""What wandb gets: every row once, also after a kill; settings from its environment variables; the published programs' keys."""

import importlib.metadata
import json
import subprocess
import sys
import time
import types

import pytest
from wandb_server import serving

from peft_pretraining.__main__ import main as command
from peft_pretraining.record.recorder import Recorder
from peft_pretraining.record.wandb_files import read_history
from peft_pretraining.record.wandb_run import start_wandb, wandb_config, wandb_mode, wandb_settings
from peft_pretraining.training.evaluate import EvalResult

VARIABLES = ["MODE", "DISABLED", "NAME", "RUN_GROUP", "DIR", "RUN_ID", "PROJECT", "TAGS", "JOB_TYPE", "RESUME"]
VARIABLES += ["API_KEY", "BASE_URL"]
CLASSES = [f"memory_{name}_{kind}" for name in ("parameters", "support", "optimizer") for kind in ("predicted", "measured")]
MEMORY = {**dict.fromkeys(CLASSES, 5), "memory_peak_predicted": 7, "memory_peak_measured": 8}


DOCUMENT = {
    "arguments": {
        "lr": 0.003,
        "rank": 128,
        "sp_ratio": 0.03,
        "dataset": "c4",
        "name": None,
        "tags": None,
        "peft_model": "sltrain",
    },
    "plan": {"model": {"name": "llama_60m", "hidden_size": 512}, "parameters": {"total": 43_529_832}, "dtype": "bfloat16"},
    "wandb_id": "abc",
    "world": {"processes": 4},
    "dataset": {"fingerprint": "f"},
}


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """No settings, keys or files of whoever runs the tests."""
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "none"))


def write(folder, first, last, *, mode="offline", start=0):
    """Updates first to last, recorded as a run of id abc that starts at update `start`."""
    folder.mkdir(exist_ok=True)
    settings = {"mode": mode, "id": "abc", "name": "run", "tags": [], "config": {}}
    record = Recorder(folder, enabled=True, total_updates=20, start_step=start, tracker_settings=settings)
    for step in range(first, last + 1):
        row = {"loss": 1 / step, "lr": 0.1, "tokens_seen": 9 * step, "throughput_tokens": 1.0, "bad_records": 0}
        record.log_update({"update_step": step, "max_memory": 5, "skipped_updates": 0, **row, **(MEMORY if step == 1 else {})})
        if step % 4 == 0:
            record.log_evaluation(step, EvalResult(loss=1.0, perplexity=2.7, tokens=5, bits_per_byte=None), 9 * step)
    record.close()
    settle()
    if mode != "disabled":
        # wandb names a folder by the second of its start.
        time.sleep(1 - time.time() % 1)


def settle():
    """wandb's service writes its files late, but before it ends."""
    import wandb

    wandb.teardown()


def unsent(folder, wandb_id):
    """The folder of a run that was made without wandb."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({**DOCUMENT, "wandb_id": wandb_id}))
    write(folder, 1, 8, mode="disabled")
    return folder


def keys(rows):
    return [(row["update_step"], "final_eval_loss" in row) for row in rows]


def recorded(folder):
    files = sorted((folder / "wandb").glob("*run-*/*.wandb"))
    return [list(read_history(path)) for path in files]


def record_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kept", [0.2, 0.7, 1.0])
def test_rows_that_a_kill_took_from_wandb_are_sent_again(tmp_path, kept):
    """wandb writes its file in blocks, so a kill loses the last ones; here the file is cut at some byte."""
    write(tmp_path, 1, 8)
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    write(tmp_path, 9, 12, start=8)
    first, second = recorded(tmp_path)
    assert keys(first + second) == keys(record_of(tmp_path))  # none missing, none twice
    assert (len(first) < 10) == (kept < 1)
    steps = [row["_step"] for row in first + second]
    assert steps == sorted(set(steps))  # wandb's own numbers go on too


def test_what_is_logged_once_is_in_the_summary_and_what_is_zero_nowhere(tmp_path):
    write(tmp_path, 1, 4)
    (rows,) = recorded(tmp_path)
    shown = {key for row in rows for key in row if not key.startswith("_")}
    assert shown == {
        *("update_step", "loss", "lr", "tokens_seen", "throughput_tokens", "max_memory"),
        *("final_eval_loss", "final_eval_perplexity", "final_eval_tokens"),
    }
    assert record_of(tmp_path)[0]["memory_peak_measured"] == 8
    assert record_of(tmp_path)[0]["bad_records"] == 0


@pytest.fixture
def server(monkeypatch):
    settle()
    with serving() as server, monkeypatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", server.url)
        patch.setenv("WANDB_API_KEY", "a" * 40)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        yield server
        settle()


def test_a_run_at_the_server_gets_the_rows_that_it_lacks(tmp_path, server, capsys):
    write(tmp_path, 1, 8, mode="online")
    assert f"wandb: {server.url}/me/SLTrain/runs/abc" in capsys.readouterr().err
    assert keys(server.rows) == keys(record_of(tmp_path))
    for line in sorted(server.history)[-3:]:
        del server.history[line]
    assert keys(server.rows)[-1] == (6, False)
    write(tmp_path, 9, 12, mode="online", start=8)
    assert "wandb: 3 earlier rows of metrics.jsonl that it lacks are sent" in capsys.readouterr().err
    assert keys(server.rows) == keys(record_of(tmp_path))
    # All of a run that is not there yet, and nothing of one that is.
    run = unsent(tmp_path / "other", "other")
    server.history.clear()
    assert command(["wandb-upload", str(run), "--wandb", "online"]) == 0
    assert keys(server.rows) == keys(record_of(run))
    assert server.config["max_lr"]["value"] == server.config["arguments"]["value"]["lr"]
    assert command(["wandb-upload", str(run), "--wandb", "online"]) == 0
    assert keys(server.rows) == keys(record_of(run))


@pytest.mark.skipif(
    not importlib.metadata.version("wandb").startswith("0.31."), reason="what `wandb sync` does depends on its version"
)
def test_syncing_the_offline_folders_of_a_run_gives_every_row_once(tmp_path, server):
    """Folders of one id become one run, each after the rows of the one before; the first was cut short by a kill."""
    write(tmp_path, 1, 8)
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    path.write_bytes(path.read_bytes()[: int(0.7 * path.stat().st_size)])
    write(tmp_path, 9, 12, start=8)
    folders = sorted(map(str, (tmp_path / "wandb").glob("offline-run-*")))
    assert len(folders) == 2
    subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], check=True, capture_output=True)
    assert keys(server.rows) == keys(record_of(tmp_path))


def test_a_record_is_uploaded_with_the_keys_of_training(tmp_path, capsys):
    run = unsent(tmp_path / "run", "other")
    intact = record_of(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("damaged\n")
    assert command(["wandb-upload", str(tmp_path), "--wandb", "offline"]) == 0
    settle()
    (rows,) = recorded(run)
    write(tmp_path / "trained", 1, 8)
    assert [{key: row[key] for key in row if key[0] != "_"} for row in rows] == [
        {key: row[key] for key in row if key[0] != "_"} for row in recorded(tmp_path / "trained")[0]
    ]
    said = capsys.readouterr()
    assert f"{run}: 10 of {len(intact)} rows sent as run other" in said.out
    assert "damaged and left out" in said.err
    assert command(["wandb-upload", str(run), "--wandb", "offline"]) == 0
    assert f"{run}: 0 of 10 rows sent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WANDB_MODE": "disabled"}, "unset it"),
        ({"WANDB_DISABLED": "true"}, "unset it"),
        ({"WANDB_RUN_ID": "x"}, "WANDB_RUN_ID=x names one run, and 2 are given"),
    ],
)
def test_an_upload_that_the_environment_forbids_is_refused(tmp_path, monkeypatch, capsys, variables, words):
    runs = [str(unsent(tmp_path / name, name)) for name in ("a", "b")]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command(["wandb-upload", *runs]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def given(monkeypatch):
    """What wandb.init is given; the package itself is not started."""
    given = {}
    module = types.ModuleType("wandb")
    module.init = lambda **settings: (
        given.update(settings) or types.SimpleNamespace(define_metric=lambda *_, **__: None, url=None)
    )
    module.Settings = lambda **settings: given.update(settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return given


@pytest.mark.parametrize(
    ("variable", "value", "key", "default"),
    [
        ("WANDB_NAME", "mine", "name", "run"),
        ("WANDB_RUN_GROUP", "ablation", "group", "llama_60m-sltrain"),
        ("WANDB_TAGS", "a, b", "tags", None),
        ("WANDB_PROJECT", "other", "project", "SLTrain"),
        ("WANDB_JOB_TYPE", "debug", "job_type", "train"),
    ],
)
def test_environment_variables_apply_where_no_flag_does(tmp_path, monkeypatch, given, variable, value, key, default):
    start_wandb(tmp_path / "run", {"mode": "offline", **wandb_settings(DOCUMENT, tmp_path / "run")})
    assert given[key] == default
    monkeypatch.setenv(variable, value)
    start_wandb(tmp_path / "run", {"mode": "offline", **wandb_settings(DOCUMENT, tmp_path / "run")})
    assert given[key] == (["a", "b"] if key == "tags" else value)


def test_without_an_answer_of_the_server_the_run_is_recorded_offline(tmp_path, monkeypatch, given, capsys):
    """After at most some 20 seconds for each of the two things that wandb waits for."""
    accept, modes = sys.modules["wandb"].init, []

    def init(**settings):
        modes.append(settings["mode"])
        if settings["mode"] == "online":
            raise TimeoutError("no answer")
        return accept(**settings)

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    assert start_wandb(tmp_path, {"mode": "online", **wandb_settings(DOCUMENT, tmp_path)}) is not None
    assert modes == ["online", "offline"]
    assert (given["login_timeout"], given["init_timeout"]) == (20, 20)
    assert "wandb cannot be reached (TimeoutError: no answer); recording offline" in capsys.readouterr().err


def test_a_flag_wins_over_its_environment_variable_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_NAME", "mine")
    document = {**DOCUMENT, "arguments": {**DOCUMENT["arguments"], "name": "of-the-flag"}}
    assert wandb_settings(document, tmp_path)["name"] == "of-the-flag"
    assert "WANDB_NAME=mine has no effect: --name of-the-flag" in capsys.readouterr().err


def test_wandbs_folder_is_where_its_variable_says(tmp_path, monkeypatch, given, capsys):
    settings = {"mode": "offline", **wandb_settings(DOCUMENT, tmp_path)}
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "new" / "folder"))
    start_wandb(tmp_path, settings)
    assert given["dir"] == tmp_path / "new" / "folder"
    assert given["dir"].is_dir()
    assert f"recording offline in {given['dir'] / 'wandb'}" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "file" / "inside"))
    start_wandb(tmp_path, settings)
    assert given["dir"] == tmp_path
    assert "WANDB_DIR=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "variables", "mode", "words"),
    [
        ("auto", {}, "offline", "no key found"),
        ("auto", {"API_KEY": "a" * 40}, "online", ""),
        ("auto", {"MODE": "dryrun"}, "offline", ""),
        ("auto", {"MODE": "run"}, "online", ""),
        ("auto", {"MODE": "disabled"}, "disabled", ""),
        ("auto", {"MODE": "loud", "API_KEY": "a" * 40}, "online", "WANDB_MODE=loud has no effect"),
        ("auto", {"DISABLED": "true", "MODE": "online"}, "disabled", ""),
        ("auto", {"DISABLED": "false", "MODE": "online"}, "online", ""),
        ("offline", {"DISABLED": "1"}, "offline", "WANDB_DISABLED=1 has no effect: --wandb offline"),
        ("online", {"MODE": "offline"}, "online", "WANDB_MODE=offline has no effect: --wandb online"),
        ("disabled", {"MODE": "disabled"}, "disabled", ""),
    ],
)
def test_the_mode_follows_the_environment_unless_a_flag_is_given(monkeypatch, capsys, flag, variables, mode, words):
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert wandb_mode(flag) == mode
    said = capsys.readouterr().err
    assert words in said
    assert bool(said) == bool(words)


@pytest.mark.parametrize("value", ["loud", "OFFLINE"])
def test_wandb_starts_under_a_mode_that_its_library_does_not_know(tmp_path, monkeypatch, capsys, value):
    monkeypatch.setenv("WANDB_MODE", value)
    run = start_wandb(tmp_path, {"mode": "auto", **wandb_settings(DOCUMENT, tmp_path)})
    said = capsys.readouterr().err
    assert run is not None, said
    run.finish()
    assert "warning" not in said


def test_the_published_programs_keys_stand_beside_the_record(tmp_path):
    """So that saved views, filters and groups of their users work; nothing that was nested before is gone."""
    config = wandb_config(DOCUMENT)
    published = {"lr": 0.003, "max_lr": 0.003, "rank": 128, "sp_ratio": 0.03, "dataset": "c4", "dtype": "bfloat16"}
    published |= {"total_params_M": 43.529832, "world_size": 4, "device": "cpu", "model": DOCUMENT["plan"]["model"]}
    assert published.items() <= config.items()
    assert config["arguments"] == DOCUMENT["arguments"]
    assert config["plan"] == DOCUMENT["plan"]
    assert config["data"] == DOCUMENT["dataset"]
