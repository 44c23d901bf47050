"""Asked to stop: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C are noted, and obeyed where nothing is half done."""

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

MARKER_FILE = "stopped.json"
_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
# A terminal sends Ctrl-C to torchrun and its processes, and torchrun passes it on: that is one request, not two.
_SAME_REQUEST_S = 5.0
_STDERR = 2


class Stopped(BaseException):
    """Raised out of `StopRequest.waiting` where a request comes while nothing is going on but waiting.

    No Exception: libraries that read over a network would take it for a failure of theirs.
    """


class StopRun(Exception):
    """The run ends before its time, with everything up to the last update kept; raised on all processes together."""

    def __init__(self, problem: str | None = None):
        """problem: why, where it was not asked for."""
        super().__init__(problem)
        self.problem = problem


class StopRequest:
    """Whether this process was asked to stop. The first signal is noted; one more, five seconds later, ends it at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, exit_now: Callable[[int], Any] = os._exit):
        """clock, exit_now: for tests."""
        self.signal_name: str | None = None
        self._clock, self._exit_now = clock, exit_now
        self._since = 0.0
        self._waiting = False

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.signal_name is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Note the signals during the block. Only the main thread of a program gets any."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """In the block a request raises Stopped at once, also one that came before it."""
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
        # os.write: the signal may have come in the midst of a print.
        os.write(_STDERR, f"\n{name}: stopping after this update; once more ends it at once\n".encode())
        if self._waiting:
            self._waiting = False
            raise Stopped

    def _leave(self, name: str, number: int) -> None:
        text = f"\n{name} again: ended at once; the same command goes on from the newest checkpoint\n"
        os.write(_STDERR, text.encode())
        for child in multiprocessing.active_children():  # data workers, which ignore these signals
            child.kill()
        self._exit_now(128 + number)
