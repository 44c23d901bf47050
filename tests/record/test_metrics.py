"""The record has the published keys and no repeated updates after a crash, and a failing dashboard does not end a run."""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import types

import pytest

from peft_pretraining.record.recorder import Recorder, Throughput, _Lines
from peft_pretraining.record.summary import METRICS_FILE, keep_record, read_metrics
from peft_pretraining.record.wandb_run import _has_wandb_key
from peft_pretraining.training.evaluate import EvalResult

ROW = {
    "loss": 2.5,
    "lr": 1e-3,
    "tokens_seen": 100,
    "throughput_tokens": 10.0,
    "throughput_examples": 1.0,
    "throughput_batches": 0.5,
    "gradnorm": 0.7,
    "max_memory": 2**20,
}


def recorder(folder, *, start_step=0, mode="disabled", enabled=True):
    settings = {"mode": mode, "id": "abc", "name": "run", "tags": [], "config": {}}
    return Recorder(folder, enabled=enabled, total_updates=10, start_step=start_step, tracker_settings=settings)


def write_steps(folder, steps):
    record = recorder(folder)
    for step in steps:
        record.log_update({"update_step": step, **ROW})
        record.advance()
    record.close()


def test_every_logged_update_is_one_json_object(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert rows == [{"update_step": step, **ROW} for step in (1, 2, 3)]


def test_rows_after_the_checkpoint_are_removed(tmp_path):
    """After a crash at update 5 with a checkpoint at 3, the resumed run must neither repeat nor miss an update."""
    write_steps(tmp_path, [1, 2, 3, 4, 5])
    record = recorder(tmp_path, start_step=3)
    record.log_update({"update_step": 4, **ROW})
    record.close()
    assert [row["update_step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_truncated_last_line_is_ignored_when_read(tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"update_step": 3, "lo')
    assert [row["update_step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("torn", [b'{"update_step": 3, "lo', b"\0" * 40, b'{"update_step": \xff', b"3", b"[]"])
def test_a_damaged_last_line_is_replaced_by_the_next_start(tmp_path, torn):
    """The last line may be truncated by a kill, or zeros after a power failure; the next start writes the update again."""
    write_steps(tmp_path, [1, 2])
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(torn)
    record = recorder(tmp_path, start_step=2)
    record.log_update({"update_step": 3, **ROW})
    record.close()
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row["update_step"] for row in rows] == [1, 2, 3]


DAMAGED = {
    "cut short": b'{"update_step": 2, "lo',
    "two lines glued together": b'{"update_step": 2, "loss": 1.0}{"update_step": 3, "loss": 1.0}',
    "a flipped bit": b'{"update_step": 2, "loss": 2.5, "lr": 0.001, "tokens_seen"; 100}',
    "zeros": b"\0" * 40,
    "bytes that are not UTF-8": b'{"update_step": 2, "note": \xff}',
    "not an object": b"[2]",
    "no update": b'{"loss": 2.5}',
    "an update in words": b'{"update_step": "2", "loss": 2.5}',
    "a figure in words": b'{"update_step": 2, "loss": "high"}',
    "nested too deeply": b"[" * 100_000,
    "a line separator inside": b'{"update_step": 2, "lo\xe2\x80\xa8ss',
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_costs_itself_and_no_later_line(tmp_path, capsys, line):
    write_steps(tmp_path, [1, 2, 3, 4])
    path = tmp_path / METRICS_FILE
    lines = path.read_bytes().split(b"\n")
    content = b"\n".join([lines[0], line, *lines[2:]])
    path.write_bytes(content)
    assert [row["update_step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
    record = recorder(tmp_path, start_step=4)
    record.log_update({"update_step": 5, **ROW})
    record.close()
    assert [json.loads(line)["update_step"] for line in path.read_text().splitlines()] == [1, 3, 4, 5]
    assert "metrics.jsonl: line 2 is damaged and left out; the file as it was is kept as" in capsys.readouterr().err
    assert (tmp_path / "metrics.old-1.jsonl").read_bytes() == content
    recorder(tmp_path, start_step=5).close()
    assert "damaged" not in capsys.readouterr().err
    assert not (tmp_path / "metrics.old-2.jsonl").exists()


def test_an_old_record_is_kept_once(tmp_path):
    """A resume that sets later checkpoints aside keeps the record, and so does one that finds a damaged line in it."""
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes() + b"damaged\n")
    kept = keep_record(path)
    recorder(tmp_path, start_step=2).close()
    assert [kept] == sorted(tmp_path.glob("*.old-*"))
    assert keep_record(path).name == "metrics.old-2.jsonl"


def test_a_record_saved_by_another_editor_is_read_whole(tmp_path, capsys):
    """With a byte order mark and Windows' line ends."""
    write_steps(tmp_path, [1, 2])
    path = tmp_path / METRICS_FILE
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    recorder(tmp_path, start_step=2).close()
    assert [row["update_step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert "damaged" not in capsys.readouterr().err


def test_the_record_is_on_disk_before_a_checkpoint_and_before_it_gets_its_name(tmp_path, monkeypatch):
    """A run resumed from that checkpoint lacks no line of it after a power failure."""
    write_steps(tmp_path, [1, 2, 3])
    done = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda *paths, **more: (done.append("rename"), rename(*paths, **more)))
    record = recorder(tmp_path, start_step=2)
    inode = (tmp_path / METRICS_FILE).stat().st_ino
    assert done == [inode, "rename"]
    record.log_update({"update_step": 3, **ROW})
    record.sync()
    assert done == [inode, "rename", inode]
    record.close()


def test_every_process_knows_the_last_finished_evaluation(tmp_path):
    """Otherwise a resumed run would evaluate again, or only one rank would."""
    record = recorder(tmp_path)
    record.log_evaluation(3, EvalResult(loss=1.0, perplexity=2.718, tokens=10, bits_per_byte=None))
    record.close()
    assert recorder(tmp_path, start_step=3).last_evaluated_step == 3
    assert recorder(tmp_path, start_step=3, enabled=False).last_evaluated_step == 3
    assert recorder(tmp_path, start_step=2, enabled=False).last_evaluated_step is None


class _BrokenRun:
    def define_metric(self, *_, **__):
        pass

    def log(self, _):
        raise ConnectionError("the dashboard is gone")

    def finish(self, **_):
        raise ConnectionError("the dashboard is gone")


@pytest.fixture
def broken_wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.init = lambda **_: _BrokenRun()
    module.Settings = lambda **_: None
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_dashboard_that_fails_gives_one_warning(tmp_path, broken_wandb, capsys):
    record = recorder(tmp_path, mode="offline")
    for step in (1, 2, 3):
        record.log_update({"update_step": step, **ROW})
    record.close()
    assert len(read_metrics(tmp_path)) == 3
    assert capsys.readouterr().err.count("wandb stopped recording") == 1


def test_a_dashboard_that_does_not_start_gives_a_warning(tmp_path, monkeypatch, capsys):
    module = types.ModuleType("wandb")

    def refuse(**_):
        raise RuntimeError("no service")

    module.init, module.Settings = refuse, lambda **_: None
    monkeypatch.setitem(sys.modules, "wandb", module)
    write_record = recorder(tmp_path, mode="offline")
    write_record.log_update({"update_step": 1, **ROW})
    write_record.close()
    assert "wandb is off (RuntimeError: no service)" in capsys.readouterr().err
    assert len(read_metrics(tmp_path)) == 1


def test_offline_wandb_receives_the_same_keys(tmp_path, monkeypatch):
    """The real package writes a run folder, without key and without network."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    record = recorder(tmp_path, mode="auto")
    record.log_update({"update_step": 1, **ROW})
    record.close()
    assert list(tmp_path.glob("wandb/offline-run-*-abc"))


@pytest.mark.parametrize("machine", ["api.wandb.ai", "the installed version's"])
def test_a_stored_wandb_key_is_found(tmp_path, monkeypatch, machine):
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    if machine != "api.wandb.ai":
        machine = wandb.Settings().base_url.removeprefix("https://").split("/")[0]
    path = tmp_path / "netrc"
    path.write_text(f"machine {machine}\n  login user\n  password {'x' * 40}\n")
    path.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not _has_wandb_key()
    monkeypatch.setenv("NETRC", str(path))
    assert _has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://dashboard.example.org")
    assert not _has_wandb_key()


def test_throughput_excludes_pauses(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("peft_pretraining.record.recorder.time.perf_counter", lambda: clock.now)
    throughput = Throughput(sequences_per_update=8, micro_batches_per_update=2)
    clock.now = 4.0
    with throughput.paused():
        clock.now = 104.0
    assert throughput.rates(1600, 2, done_at=106.0) == pytest.approx(
        {"throughput_tokens": 1600 / 6, "throughput_examples": 16 / 6, "throughput_batches": 4 / 6}
    )
    assert throughput.rates(500, 1, done_at=108.0)["throughput_tokens"] == pytest.approx(500 / 2)


def test_lines_that_cannot_be_written_are_written_later(tmp_path, monkeypatch):
    """On a full disk there is one message and no half-written line, and all lines are written once there is space."""
    path = tmp_path / "metrics.jsonl"
    lines = _Lines(path)
    assert lines.write("first") is None
    original = lines._file

    class Full:
        fileno = original.fileno

        def write(self, content: bytes) -> int:
            return original.write(content[:3])  # as a disk with only three bytes left

    lines._file = Full()
    assert "metrics.jsonl cannot be written (No space left on device)" in lines.write("second")
    assert lines.write("third") is None
    assert path.read_text() == "first\n"
    lines._file = original
    assert lines.write("fourth") is None
    assert lines.sync() is None
    assert path.read_text() == "first\nsecond\nthird\nfourth\n"
    lines.close()


class _KeptRun:
    """A wandb run that stores what it is given."""

    def __init__(self):
        self.rows, self.metrics, self.summary, self.exit_code = [], {}, {}, None

    def define_metric(self, name, **settings):
        self.metrics[name] = settings

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.exit_code = exit_code


def kept_by_dashboard(monkeypatch):
    """The run that a wandb without a network would get, and the settings it is opened with."""
    kept, given = _KeptRun(), {}
    module = types.ModuleType("wandb")
    module.init, module.Settings = lambda **settings: given.update(settings) or kept, lambda **_: None
    monkeypatch.setitem(sys.modules, "wandb", module)
    return kept, given


def test_dashboard_of_a_stopped_run_has_no_final_figure(tmp_path, monkeypatch):
    """Not the untrained model's, nor that of the run's former end, where it is longer now."""
    kept, _ = kept_by_dashboard(monkeypatch)
    kept.summary["final_perplexity"] = 5.0
    settings = {"mode": "offline", "id": "a", "name": "run", "tags": [], "config": {"plan": {"num_training_steps": 10}}}
    record = Recorder(tmp_path, enabled=True, total_updates=10, start_step=0, tracker_settings=settings)
    record.log_evaluation(0, EvalResult(loss=9.0, perplexity=8103.0, tokens=10, bits_per_byte=2.5))
    record.log_update({"update_step": 4, **ROW})
    # Update 5 is not logged.
    (tmp_path / "stopped.json").write_text(json.dumps({"signal": "SIGINT", "update_step": 5, "tokens_seen": 125}))
    record.close()
    assert kept.summary["status"] == "stopped at update 5 of 10"
    assert kept.summary["updates"] == 4
    assert all(kept.summary.get(name) is None for name in kept.summary if name.startswith("final_"))


@pytest.mark.parametrize("columns", [0, 60, 80, 200])
def test_the_bar_fits_its_terminal_and_shows_what_matters(tmp_path, monkeypatch, columns):
    """A bar of ten columns or more, whole figures, and room for the `^C` that a terminal writes behind the bar. A terminal of
    unknown width, 0, counts as one of 80 columns."""
    other_side, terminal = pty.openpty()
    fcntl.ioctl(other_side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with open(terminal, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        settings = {"mode": "disabled", "id": "abc", "name": "run", "tags": [], "config": {}}
        record = Recorder(tmp_path, enabled=True, total_updates=20_000, start_step=12_345, tracker_settings=settings)
        record.log_evaluation(12_345, EvalResult(loss=2.0, perplexity=7.389, tokens=10, bits_per_byte=0.5))
        record.log_update({"update_step": 12_346, **ROW, "throughput_tokens": 123_456.0})
        record.close()
        print("end", file=stream)
        shown = ""
        while "end" not in shown:
            shown += os.read(other_side, 4096).decode()
    os.close(other_side)
    bar = [line for line in re.split(r"[\r\n]+", shown) if "loss 2.500" in line][-1]
    columns = columns or 80
    assert len(bar) <= columns - 2
    if columns >= 80:
        assert bar.count("|") == 2
        assert len(bar.split("|")[1]) >= 10
    figures = ["loss 2.500", "123,456 tok/s", "ppl 12.18", "eval ppl 7.389", "0.00 GiB"]
    assert [figure for figure in figures if figure in bar] == figures[: {60: 1, 80: 2, 200: 5}[columns]]
    assert bar.endswith("]")


def test_wandb_gets_group_and_summary(tmp_path, monkeypatch):
    """wandb compares runs by their final figures, and by tokens, which every row has, also those of evaluations."""
    kept, given = kept_by_dashboard(monkeypatch)
    config = {"plan": {"parameters": {"total": 7}, "full_rank_parameters": 9}}
    settings = {"mode": "offline", "id": "a", "name": "run", "tags": [], "config": config, "group": "llama_60m-sltrain"}
    record = Recorder(tmp_path, enabled=True, total_updates=2, start_step=0, tracker_settings=settings)
    record.log_update({"update_step": 1, **ROW})
    record.log_update({"update_step": 2, **ROW, "throughput_tokens": 20.0, "tokens_seen": 300, "max_memory": 2**21})
    record.log_evaluation(2, EvalResult(loss=1.0, perplexity=2.718, tokens=10, bits_per_byte=0.5), tokens_seen=300)
    record.close()
    assert given["group"] == "llama_60m-sltrain"
    assert [row["tokens_seen"] for row in kept.rows] == [100, 300, 300]
    assert kept.metrics["final_eval_perplexity"]["step_metric"] == "update_step"
    expected = {"parameters": 7, "full_rank_parameters": 9, "updates": 2, "tokens": 300, "final_perplexity": 2.718}
    expected |= {"final_bits_per_byte": 0.5, "tokens_per_second": 15.0, "peak_memory_bytes": 2**21}
    expected["training_seconds"] = 100 / 10 + 200 / 20
    assert expected.items() <= kept.summary.items()
    assert "states_bytes" not in kept.summary  # not measured in this run
    assert kept.exit_code == 0
