"""A signal requests a stop, interrupts only waiting code, and a second, later one ends the process."""

import os
import signal

import pytest

from peft_pretraining.training.stop import Stopped, StopRequest


class Clock:
    """A clock that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
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
