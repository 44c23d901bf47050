"""What the device tells of an update, read one update late: the next one is queued before this process waits for anything."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from peft_pretraining.record.recorder import Recorder
from peft_pretraining.record.throughput import Counted, Throughput
from peft_pretraining.training.health import SkippedUpdates
from peft_pretraining.training.update import StepResult, TrainState


class Reading:
    """Scalars on their way from the device: copied without waiting, waited for where they are read."""

    def __init__(self, *scalars: torch.Tensor):
        """scalars: 0-D, of one dtype and device."""
        values = torch.stack(scalars)
        self._copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._copy.copy_(values, non_blocking=True)
        self._event = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        self._arrived_at = time.perf_counter() if self.arrived else None

    @property
    def arrived(self) -> bool:
        """Whether `read` need not wait."""
        return self._event is None or bool(self._event.query())

    def read(self) -> tuple[list[float], float]:
        """The values, and when all that was queued before them was done (time.perf_counter): as well as it was seen."""
        if self._event is not None:
            self._event.synchronize()
        if self._arrived_at is None:
            self._arrived_at = time.perf_counter()
        return self._copy.tolist(), self._arrived_at


@dataclass(frozen=True)
class Logged:
    """What is known of a logged update before the device has made it."""

    lr: float
    tokens_seen: int
    max_memory: int  # bytes
    bad_records: int
    memory: dict[str, int]  # measured beside predicted, of the first one


@dataclass(frozen=True)
class _Update:
    step: int
    reading: Reading
    logged: Logged | None
    counted: Counted | None


class LateRecord:
    """Between the loop and the record: takes every update, reads the one before it, counts what was skipped, writes its row.

    Every process has one; all of them see the same numbers.
    """

    def __init__(self, record: Recorder, state: TrainState, throughput: Throughput):
        """state: its count of skipped updates is brought up to date as updates are read."""
        self._record, self._state, self._throughput = record, state, throughput
        self._skipped = SkippedUpdates(state.skipped_updates)
        self._waiting: deque[_Update] = deque()

    def add(self, update_step: int, step: StepResult, logged: Logged | None) -> None:
        """An update is queued; the one before it is read. logged: where this one gets a row. Raises as `settle`."""
        reading = Reading(step.loss, step.gradnorm, step.skipped)
        self._throughput.add_update(step.num_tokens)
        counted = None if logged is None else self._throughput.take()
        self._waiting.append(_Update(update_step, reading, logged, counted))
        self._settle_all_but(1)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Settled first; time inside the block is not training."""
        self.settle()
        with self._throughput.paused():
            yield

    def settle(self) -> None:
        """Wait for the device, and have every row written. Raises TrainingError after too many skipped updates in a row."""
        self._settle_all_but(0)

    def _settle_all_but(self, newest: int) -> None:
        while len(self._waiting) > newest:
            update = self._waiting.popleft()
            (_, _, skipped), _ = update.reading.read()
            self._skipped.add(update.step, skipped)
            self._state.skipped_updates = self._skipped.total
            self._write(update)

    @property
    def last_one_skipped(self) -> bool:
        """Whether the newest update that was read was skipped."""
        return self._skipped.last_one

    def close(self) -> None:
        """Write what has arrived, and wait for nothing: the run may have failed, and what is missing may never come."""
        with contextlib.suppress(RuntimeError):  # a device that has failed answers every question with its error
            while self._waiting and self._waiting[0].reading.arrived:
                self._write(self._waiting.popleft())

    def _write(self, update: _Update) -> None:
        logged, counted = update.logged, update.counted
        if logged is None or counted is None:
            return
        (loss, gradnorm, _), arrived_at = update.reading.read()
        row: dict[str, Any] = {"update_step": update.step, "loss": loss, "lr": logged.lr}
        row |= {"tokens_seen": logged.tokens_seen, "gradnorm": gradnorm, "max_memory": logged.max_memory}
        row |= self._throughput.rates(counted, arrived_at) | {"bad_records": logged.bad_records}
        row |= {"skipped_updates": self._skipped.total} if self._skipped.total else {}
        self._record.log_update(row | logged.memory)
