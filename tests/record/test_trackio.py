"""What trackio gets: the rows of metrics.jsonl, each once, also after a kill or a return; its failures end no run."""

import json
import shutil
import sqlite3
import subprocess
import sys
import warnings

import pytest

from peft_pretraining.__main__ import main as command
from peft_pretraining.record.recorder import Recorder
from peft_pretraining.record.summary import read_metrics
from peft_pretraining.training.evaluate import EvalResult

DOCUMENT = {"arguments": {"lr": 0.003, "tags": "a,b"}, "plan": {"num_training_steps": 8}, "wandb_id": "abc"}
SUMMARY = "summary/updates"
CLASSES = {f"memory_{name}_{kind}": 5 for name in ("parameters", "support", "optimizer") for kind in ("predicted", "measured")}


def record(folder, start=0, name="run"):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(DOCUMENT))
    settings = {"tracker": "trackio", "mode": "auto", "id": "abc", "name": name, "tags": [], "config": DOCUMENT}
    return Recorder(folder, enabled=True, total_updates=8, start_step=start, tracker_settings=settings)


def write(folder, first, last, start=0, name="run"):
    """Updates first to last of a run of 8 that starts at update `start`; an evaluation after every fourth."""
    recorder = record(folder, start, name)
    for step in range(first, last + 1):
        row = {"loss": 1 / step, "lr": 0.1, "tokens_seen": 9 * step, "throughput_tokens": 1.0, "bad_records": 0, "gradnorm": None}
        row |= {"memory_peak_measured": 8, "memory_peak_predicted": 7} if step == 1 else {}
        row |= {
            f"memory_{name}_{kind}": 1 for name in ("parameters", "support", "optimizer") for kind in ("predicted", "measured")
        }
        recorder.log_update({"update_step": step, "max_memory": 5, **row})
        if step % 4 == 0:
            recorder.log_evaluation(step, EvalResult(loss=1.0, perplexity=2.7, tokens=5, bits_per_byte=None), 9 * step)
    recorder.close()


def test_without_the_package_a_line_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    write(tmp_path, 1, 4)
    said = capsys.readouterr().err
    assert "trackio is off (it is not installed: python -m pip install trackio); all metrics are still written" in said
    assert len(read_metrics(tmp_path)) == 5


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder of trackio's database; the package reads the variable TRACKIO_DIR when it is imported."""
    trackio = pytest.importorskip("trackio", reason="trackio is not installed (pip install trackio)")
    for name in ("SPACE_ID", "SERVER_URL", "STORAGE_MODE"):
        monkeypatch.delenv(f"TRACKIO_{name}", raising=False)
    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "store")
    shown = warnings.showwarning
    yield tmp_path / "store"
    assert warnings.showwarning is shown


def stored(store):
    """The rows in trackio's database, by run: (step, values)."""
    runs = {}
    with sqlite3.connect(store / "SLTrain.db") as database:
        for name, step, values in database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"):
            runs.setdefault(name, []).append((step, json.loads(values)))
    return runs


def sent(rows):
    """What trackio has of the rows of a record."""
    others = ("update_step", "bad_records", "gradnorm", "final_eval_bits_per_byte")
    keys = [[key for key in row if key not in others and not key.startswith("memory_")] for row in rows]
    return [(row["update_step"], {key: row[key] for key in kept}) for row, kept in zip(rows, keys, strict=True)]


@pytest.mark.parametrize("mode", ["sqlite", "jsonl"])
def test_a_resumed_run_goes_on_with_every_row_once(tmp_path, store, monkeypatch, capsys, mode):
    """Rows that a kill took are sent again, those that the run goes back on are removed, under the first start's name."""
    import trackio

    monkeypatch.setenv("TRACKIO_STORAGE_MODE", mode)
    write(tmp_path / "run", 1, 6)
    assert stored(store) == {"run-abc": sent(read_metrics(tmp_path / "run"))}
    with sqlite3.connect(store / "SLTrain.db") as database:
        database.execute("DELETE FROM metrics WHERE step IN (3, 4)")
    write(tmp_path / "run", 6, 8, start=5, name="other")
    assert "trackio: 3 earlier rows of metrics.jsonl that it lacks are sent" in capsys.readouterr().err
    ((name, rows),) = stored(store).items()
    assert name == "run-abc"
    results = rows.pop()
    assert sorted(rows, key=str) == sorted(sent(read_metrics(tmp_path / "run")), key=str)
    assert results[0] == 8
    assert results[1][SUMMARY] == 8
    assert results[1]["summary/final_perplexity"] == 2.7
    assert results[1]["summary/memory_peak_measured"] == 8
    (run,) = trackio.Api().runs("SLTrain")
    assert run.config["arguments"] == DOCUMENT["arguments"]


def test_rows_that_cannot_be_written_cost_a_line_and_are_sent_later(tmp_path, store, monkeypatch, capsys):
    from trackio.sqlite_storage import SQLiteStorage

    def full(**_):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(SQLiteStorage, "bulk_log", full)
        write(tmp_path / "run", 1, 8)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "disk is full" in line]
    assert line.startswith("warning: trackio failed to flush")
    assert line.endswith("training and metrics.jsonl continue")
    # The results of the run are a row too.
    assert "trackio did not finish (OSError: 11 rows are missing" in said
    assert len(read_metrics(tmp_path / "run")) == 10
    upload = ["wandb-upload", "--tracker", "trackio", str(tmp_path / "run")]
    for expected in ("10 of 10 rows sent as run run-abc", "0 of 10 rows sent as run run-abc; trackio has the others"):
        assert command(upload) == 0
        assert expected in capsys.readouterr().out
        assert [row for row in stored(store)["run-abc"] if SUMMARY not in row[1]] == sent(read_metrics(tmp_path / "run"))
        assert len(stored(store)["run-abc"]) == 11


@pytest.mark.parametrize("problem", ["damaged", "remote"])
def test_a_store_that_cannot_be_used_costs_a_line(tmp_path, store, monkeypatch, capsys, problem):
    if problem == "damaged":
        store.mkdir()
        (store / "SLTrain.db").write_bytes(b"not a database" * 1000)
    else:
        monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    write(tmp_path / "run", 1, 8)
    said = capsys.readouterr().err
    reason = {"damaged": "file is not a database", "remote": "TRACKIO_SPACE_ID names a server"}[problem]
    (line,) = [line for line in said.splitlines() if "trackio" in line]
    assert line.startswith("warning: trackio is off (")
    assert reason in line
    assert len(read_metrics(tmp_path / "run")) == 10


def test_processes_other_than_the_first_start_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    Recorder(tmp_path, enabled=False, total_updates=8, start_step=0, tracker_settings={}).close()


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="there is no browser to show the page (Debian: apt install chromium)"
)
def test_the_page_in_a_browser_has_the_runs_charts(tmp_path, store):
    import trackio

    write(tmp_path / "run", 1, 8)
    server, url, *_ = trackio.show(project="SLTrain", open_browser=False, block_thread=False, host="127.0.0.1")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    flags += ["--virtual-time-budget=20000", "--dump-dom", f"{url}?project=SLTrain"]
    try:
        page = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=120, check=True).stdout
    finally:
        server.close()
    for text in ("run-abc", "loss", "final_eval_perplexity", "throughput_tokens", "summary"):
        assert text in page
