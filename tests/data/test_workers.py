"""Worker processes always end when they are closed, or when their parent has ended."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from peft_pretraining.data import DataError
from peft_pretraining.data.workers import Workers


@dataclass(frozen=True)
class Counting:
    """Work whose item number n of worker w is "w.n"; it ends after `last` items, or never."""

    last: int | None = None

    def items(self, worker: int, workers: int) -> Iterator[str]:
        number = 0
        while self.last is None or number < self.last:
            yield f"{worker}.{number}"
            number += 1


def test_items_of_workers_come_in_turn_until_all_end():
    with_end = Workers(Counting(last=3), 2)
    assert list(with_end) == ["0.0", "1.0", "0.1", "1.1", "0.2", "1.2"]
    with_end.close()


def test_closing_does_not_wait_for_a_lock_that_a_killed_worker_held():
    """torch's event that ends workers has a lock, which a worker that is killed while it checks the event never releases."""
    workers = Workers(Counting(), 2)
    assert next(workers) == "0.0"
    lock = workers._running._iterator._workers_done_event._cond
    holder = multiprocessing.get_context("fork").Process(target=lock.acquire)  # ends without releasing it
    holder.start()
    holder.join()
    closing = threading.Thread(target=workers.close, daemon=True)
    closing.start()
    closing.join(timeout=60)  # not a limit on speed: a failure would wait for ever
    assert not closing.is_alive()


def test_a_dead_worker_is_an_error_and_closing_works():
    workers = Workers(Counting(), 2)
    next(workers)
    for process in workers._running._processes:
        process.kill()
    with pytest.raises(DataError, match="a data worker died"):
        for _ in workers:
            pass
    workers.close()


KILLED_WHILE_A_WORKER_STARTS = """
import os, signal, time
from torch.utils.data._utils import worker
from peft_pretraining.data.workers import Workers
from test_workers import Counting

state = worker._generate_state
worker._generate_state = lambda *seed: time.sleep(1) or state(*seed)  # called first by a worker
workers = Workers(Counting(), 1)
print(workers._running._processes[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_starts_after_its_parent_was_killed_ends():
    """torch's watchdog would mistake the process that adopted the worker for its parent, and wait for ever."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", KILLED_WHILE_A_WORKER_STARTS]
    # The standard output is shared with the worker, so it ends only when both have ended.
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_a_signal_before_workers_are_started_leaves_no_traceback_behind(monkeypatch):
    """Python prints what a destructor raises."""

    class Interrupted(BaseException):
        pass

    def interrupt(*_, **__):
        raise Interrupted

    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    monkeypatch.setattr(torch.multiprocessing, "Queue", interrupt)
    with pytest.raises(Interrupted):
        next(Workers(Counting(), 2))
    gc.collect()
    assert printed == []
