"""The world a process finds in its environment, and how torchrun is started."""

import os
import signal

import pytest
from tiny_runs import flags_of
from torch.distributed.elastic.multiprocessing import SignalException

import torchrun_main
from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.distributed import launch
from peft_pretraining.distributed.world import World, stop_signals

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def set_only(monkeypatch):
    """Sets these of the rank variables and no others."""

    def change(values: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    ("values", "world"),
    [
        ({}, World()),
        (dict.fromkeys(NAMES, ""), World()),
        ({"RANK": " ", "WORLD_SIZE": ""}, World()),
        ({"RANK": "0"}, World()),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": ""}, World()),
        ({"RANK": "1", "WORLD_SIZE": "4", **PLACE}, World(1, 4, 0, 1)),  # one process on each machine
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **PLACE}, World(3, 4, 1, 2)),
    ],
)
def test_world_is_read_from_the_environment_and_empty_variables_count_as_not_set(set_only, values, world):
    set_only(values)
    assert World.from_environment() == world
    assert "" not in [os.environ.get(name) for name in NAMES]  # libraries read them too


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "MASTER_ADDR and MASTER_PORT"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": "1"}, ["MASTER_ADDR not set"]),
        ({"RANK": "0", "WORLD_SIZE": "2", **PLACE, "MASTER_PORT": "70000"}, ["MASTER_PORT=70000"]),
        ({"RANK": "0", "WORLD_SIZE": "2", **PLACE, "MASTER_PORT": "http"}, ["MASTER_PORT=http"]),
        ({"WORLD_SIZE": "2", **PLACE}, ["RANK (not set)", "WORLD_SIZE=2"]),
        ({"RANK": "", "WORLD_SIZE": "2"}, ["RANK (not set)", "WORLD_SIZE=2"]),
        ({"RANK": "3"}, ["RANK=3", "WORLD_SIZE (not set)"]),
        ({"RANK": "2", "WORLD_SIZE": "2", **PLACE}, ["RANK=2", "WORLD_SIZE=2"]),
        ({"RANK": "zero", "WORLD_SIZE": "1"}, ["RANK=zero"]),
        ({"RANK": "-1", "WORLD_SIZE": "-1"}, ["RANK=-1"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1"]),
        ({"LOCAL_RANK": "-1"}, ["LOCAL_RANK=-1"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **PLACE}, ["LOCAL_WORLD_SIZE (not set)"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", **PLACE}, ["LOCAL_WORLD_SIZE=4"]),
    ],
)
def test_contradicting_rank_variables_are_refused_with_the_way_out(set_only, values, named, tiny_run, capsys):
    set_only(values)
    assert torchrun_main.main([*tiny_run, "--dry_run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(text in line for text in named)
    assert "torchrun" in line
    assert f"unset {' '.join(name for name in NAMES if values.get(name))}" in line
    with pytest.raises(ConfigError):
        World.from_environment()


def test_processes_that_do_not_meet_say_where(set_only, tiny_run, tmp_path, capsys):
    set_only({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    flags = [*flags_of("full", tiny_run), "--timeout_s", "1", "--save_dir", str(tmp_path / "run")]
    assert torchrun_main.main(flags) == 1
    assert "did not meet at 127.0.0.1:1" in capsys.readouterr().err


@pytest.fixture
def hangup_ignored():
    """SIGHUP as nohup leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def launched(monkeypatch, argv: list[str], error: Exception | None = None) -> tuple[int, list[str]]:
    """The exit code of the launcher, and the arguments that torchrun gets."""
    given: list[str] = []

    def torchrun(arguments):
        given.extend(arguments)
        if error is not None:
            raise error

    for name in launch._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.run.main", torchrun)
        code = launch.main(argv)
    for name in launch._ENVIRONMENT:
        monkeypatch.delenv(name)
    return code, given


def test_torchrun_passes_stop_signals_on(monkeypatch):
    code, given = launched(monkeypatch, ["--standalone", "program.py"])
    assert code == 0
    assert set(given[given.index("--signals-to-handle") + 1].split(",")) == {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"}
    assert given[-2:] == ["--standalone", "program.py"]


def test_torchrun_leaves_an_ignored_hangup_ignored(monkeypatch, hangup_ignored):
    assert "SIGHUP" not in launched(monkeypatch, [])[1][1].split(",")
    assert signal.SIGHUP not in stop_signals()


def test_torchrun_ends_without_a_traceback_after_a_signal(monkeypatch):
    assert launched(monkeypatch, [], SignalException("process got a signal", signal.SIGINT))[0] == 1
