"""Handles requests to stop.

Ctrl-C, SIGTERM, SIGQUIT, SIGHUP (a closed terminal) and SIGUSR1 (sent by Slurm before a time limit) end the run between two
updates.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from peft_pretraining.distributed.world import stop_signals

MARKER_FILE = "stopped.json"
# A closed terminal signals a process more than once, and torchrun forwards signals: those within this time are one request.
_SAME_REQUEST_S = 5.0
_STDERR = 2


class Stopped(BaseException):
    """Raised inside `StopRequest.waiting` when a stop is requested while the process only waits for data.

    A BaseException, because libraries that read over a network catch Exception and retry.
    """


class StopRun(Exception):
    """Raised on all processes to end the run early; the state after the last update is saved."""

    def __init__(self, problem: str | None = None):
        """problem: the reason, or None if the stop was requested."""
        super().__init__(problem)
        self.problem = problem


class StopRequest:
    """Records whether this process was asked to stop. A second signal more than five seconds later ends it immediately."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        exit_now: Callable[[int], Any] = os._exit,
        speaks: bool = True,
    ):
        """clock, exit_now: replaced in tests. speaks: whether a signal is answered with a line; one process of a machine does."""
        self.signal_name: str | None = None
        self._speaks = speaks
        self._clock, self._exit_now = clock, exit_now
        self._since = 0.0
        self._waiting = False
        # What a signal lets the process finish, in the words of its answer.
        self.task = "stopping after this update"

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.signal_name is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Records stop signals during the block; does nothing outside the main thread, which receives all signals."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in stop_signals()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Raises Stopped in the block as soon as a stop is requested, or at its start if one was requested before."""
        self._waiting = True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self._waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            if self._clock() - self._since > _SAME_REQUEST_S:
                self._leave(name, number)
            return
        self.signal_name, self._since = name, self._clock()
        self._answer(f"{name}: {self.task}; send the signal again after {_SAME_REQUEST_S:g} seconds to end immediately")
        if self._waiting:
            self._waiting = False
            raise Stopped

    def _leave(self, name: str, number: int) -> None:
        self._answer(f"{name} again: ended immediately; to resume, run the command without --continue_from and --resume never")
        # Data workers ignore stop signals.
        for child in multiprocessing.active_children():
            child.kill()
        self._exit_now(128 + number)

    def _answer(self, text: str) -> None:
        # os.write instead of print, because the signal may interrupt a print. The terminal may be closed.
        if self._speaks:
            with contextlib.suppress(OSError):
                os.write(_STDERR, f"\n{text}\n".encode())
