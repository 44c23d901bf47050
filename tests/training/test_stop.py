"""Signals: noted once, obeyed at once only while waiting, and a second one that means it."""

import os
import signal

import pytest

from peft_pretraining.training.stop import Stopped, StopRequest


class Clock:
    """Seconds that a test turns itself."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_noted_and_the_handlers_come_back(name):
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


def test_a_request_ends_waiting_at_once_and_nothing_else():
    reached = []

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("the end of the wait")

    request = StopRequest()
    with request.listening():
        with pytest.raises(Stopped):
            wait_for(request, interrupted)
        with pytest.raises(Stopped):  # asked for before the wait began
            wait_for(request, lambda: reached.append("a wait after the request"))
    assert reached == []


def test_what_reads_the_data_cannot_swallow_a_request():
    """Libraries catch every Exception around a network read and try again."""

    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            raise RuntimeError("the server does not answer") from error

    request = StopRequest()
    with request.listening(), pytest.raises(Stopped):
        wait_for(request, interrupted)


def test_only_a_later_second_signal_ends_the_process():
    """torchrun passes on the Ctrl-C that its processes got from the terminal too: that is one request."""
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
