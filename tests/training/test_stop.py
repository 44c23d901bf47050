"""A signal requests a stop, interrupts only waiting code, and a second, later one ends the process."""

import io
import os
import pty
import signal
import sys

import pytest

from peft_pretraining.distributed.launch import torchrun_ignores_nohup
from peft_pretraining.distributed.world import World, lasting_output
from peft_pretraining.training.stop import Stopped, StopRequest


class Clock:
    """A clock that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_requests_a_stop_and_the_handlers_are_restored(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    request = StopRequest()
    with request.listening():
        os.kill(os.getpid(), number)
        assert request.requested
        assert request.signal_name == name
    assert signal.getsignal(number) is before


def wait_for(request: StopRequest, happening) -> None:
    with request.waiting():
        happening()


def test_a_request_interrupts_waiting_code_only():
    reached = []

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("the end of the wait")

    request = StopRequest()
    with request.listening():
        with pytest.raises(Stopped):
            wait_for(request, interrupted)
        with pytest.raises(Stopped):  # requested before the wait began
            wait_for(request, lambda: reached.append("a wait after the request"))
    assert reached == []


def test_code_that_catches_exceptions_cannot_suppress_a_request():
    """Libraries catch Exception around a network read and retry, so Stopped must not be an Exception."""

    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            raise RuntimeError("the server does not answer") from error

    request = StopRequest()
    with request.listening(), pytest.raises(Stopped):
        wait_for(request, interrupted)


def test_only_a_later_second_signal_ends_the_process():
    """With Ctrl-C a process gets two signals, from the terminal and from torchrun, which count as one request."""
    clock, ended = Clock(), []
    request = StopRequest(clock, exit_now=ended.append)
    with request.listening():
        os.kill(os.getpid(), signal.SIGINT)
        clock.now = 4.9
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == []
        clock.now = 5.1
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [128 + signal.SIGTERM]


@pytest.fixture
def hangup_ignored():
    """SIGHUP as nohup leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_an_ignored_hangup_stays_ignored(hangup_ignored):
    request = StopRequest()
    with request.listening():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_one_process_of_a_machine_answers(capfd):
    for speaks in (True, False):
        with StopRequest(speaks=speaks).listening():
            os.kill(os.getpid(), signal.SIGQUIT)
    assert capfd.readouterr().err.count("SIGQUIT: stopping") == 1


def test_a_run_under_plain_torchrun_and_nohup_is_told_that_a_hangup_stops_it(monkeypatch):
    """torchrun replaces the ignored SIGHUP by its handler, and its processes cannot see that it was ignored."""
    monkeypatch.setenv("_", "/usr/bin/nohup")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert "SIGHUP" in (torchrun_ignores_nohup(World(0, 2)) or "")
    assert torchrun_ignores_nohup(World(1, 2)) is None
    monkeypatch.setenv("_", "/usr/bin/torchrun")
    assert torchrun_ignores_nohup(World(0, 2)) is None


def closed_terminal() -> int:
    """A terminal's descriptor, closed on the other side: writing to it fails with EIO."""
    other_side, terminal = pty.openpty()
    os.close(other_side)
    return terminal


def closed_pipe() -> int:
    """A pipe's descriptor, with no reader: writing to it fails with EPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("gone", [closed_terminal, closed_pipe])
def test_output_that_nobody_can_read_ends_nothing(gone, monkeypatch):
    descriptor = gone()
    with pytest.raises(OSError):
        os.write(descriptor, b"a line")
    with open(descriptor, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with lasting_output():
            print("a line")
            print("another", file=sys.stderr, flush=True)
        assert os.write(descriptor, b"a library's line") > 0


def test_output_that_somebody_reads_is_whole(monkeypatch):
    """Streams that were never opened (`>&-`) do not matter."""
    read = io.StringIO()
    monkeypatch.setattr(sys, "stdout", read)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_output():
        print("a line")
        print("no line", file=sys.stderr)
    assert read.getvalue() == "a line\n"
