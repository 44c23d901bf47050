"""Saves checkpoints during a run, directly or in a background thread, and retries failed saves a limited number of times.

Every process of a run has one Saver, and all processes make the same calls. `collect` supplies the content; the saver itself
knows nothing of models or optimizers.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from peft_pretraining.checkpoint import step_folder as checkpoint
from peft_pretraining.checkpoint.step_folder import Content
from peft_pretraining.distributed.parallel import local, on_cpu
from peft_pretraining.distributed.world import World, gather_objects, own_group

# Consecutive failed saves after which the run ends.
MOST_FAILURES = 5


class SavingFailed(RuntimeError):
    """Raised when the run's state cannot be saved; the run ends, because further training would be lost too."""


class Saver:
    """Saves a run's checkpoints. Call `due` after every update, `save` when it returns True, and `finish` at the end.

    A failed save does not end the run: the user is warned, and the save is repeated after the next update.
    """

    def __init__(
        self,
        run_folder: Path,
        collect: Callable[[], Content],
        world: World,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        asynchronous: bool = False,
        saved_step: int | None = None,
        timeout_s: float = 1800.0,
    ):
        """Creates a saver; every process calls it.

        Args:
            run_folder: the folder in which checkpoints are created.
            collect: returns the run's current content; its tensors may share storage with the run's.
            world: this process's rank among all processes.
            keep: how many of the newest checkpoints are kept; None keeps all.
            keep_every: checkpoints after multiples of this many updates are kept too.
            minutes: a save is due by time when so many have passed since the last one; None for never.
            clock: seconds that passed since some moment; replaced in tests.
            asynchronous: copy the state and write the copy in a background thread; at most one such save runs at a time.
            saved_step: update step of the checkpoint that the run was resumed from, if it lies in run_folder; else None.
            timeout_s: how long processes wait for one another in an asynchronous save, seconds.
        """
        self._run_folder, self._collect, self._world = run_folder, collect, world
        self._keep, self._keep_every = keep, keep_every
        self._minutes, self._clock, self._last_save = minutes, clock, clock()
        self._time_is_up = False
        self._asynchronous = asynchronous
        # The background thread needs its own group: on training's group its collectives would deadlock with the main thread's.
        self._group = own_group(world, timeout_s) if asynchronous else None
        self._snapshot = _Snapshot()
        self._in_flight: _Background | None = None
        self._saved_step = saved_step
        self._failures = 0

    def due_by_time(self) -> bool:
        """Tells whether rank 0's clock calls for a save that is not under way; always False on other processes."""
        if self._minutes is None or not self._world.is_main or (self._in_flight is not None and not self._in_flight.done):
            return False
        return self._clock() - self._last_save >= 60 * self._minutes

    def save_by_time(self) -> None:
        """Makes a save due after the current update; every process calls it where `due_by_time` is True on rank 0."""
        self._time_is_up = True

    def due(self, scheduled: bool) -> bool:
        """Tells, after an update, whether to save now: the save is `scheduled`, its time has come, or the last save failed.

        Raises:
            SavingFailed: a background save failed for the last permitted time.
        """
        if self._in_flight is not None and all(gather_objects(self._in_flight.done, self._world)):
            self._settle()
        return scheduled or self._time_is_up or self._failures > 0

    def save(self) -> None:
        """Saves the run's current state unless this step is saved already. Returns without waiting if asynchronous.

        Raises:
            SavingFailed: the save failed for the last permitted time.
        """
        self._settle()
        content = self._collect()
        self._time_is_up = False
        if content.step == self._saved_step:
            return
        if self._asynchronous:
            content = self._snapshot.take(content)
        self._in_flight = _Background(lambda: self._write(content), content.step)
        if self._asynchronous:
            self._in_flight.start()
        else:
            self._in_flight.run()
            self._settle()
        # The interval starts after the save; otherwise a save that takes longer than it would be due again at once.
        self._last_save = self._clock()

    def finish(self) -> None:
        """Waits for a running save, and repeats the last save if it failed.

        Raises:
            SavingFailed: the run's last state could not be saved.
        """
        self._settle()
        if self._failures:
            self.save()
            self._settle()
        if self._failures:
            raise SavingFailed(f"the run's last state is not saved: {self._last_failure}; {self._what_is_left()}")

    def close(self) -> None:
        """Waits for a running save after the run has failed; a failure of the save is a warning only."""
        if self._in_flight is not None and (error := self._in_flight.wait()) is not None:
            self._world.say(f"warning: {error}")
        self._in_flight = None

    def _write(self, content: Content) -> None:
        kept = {"keep": self._keep, "keep_every": self._keep_every}
        checkpoint.save_checkpoint(self._run_folder, content, self._world, **kept, group=self._group)

    def _settle(self) -> None:
        """Waits for a running save and records its outcome, which is the same on every process."""
        if self._in_flight is None:
            return
        background, self._in_flight = self._in_flight, None
        error = background.wait()
        if error is None:
            self._failures, self._saved_step = 0, background.step
            self._world.say(f"saved {checkpoint.step_folder(self._run_folder, background.step).name}")
        elif isinstance(error, OSError):
            self._note_failure(str(error))
        else:
            raise error

    def _note_failure(self, text: str) -> None:
        self._failures += 1
        self._last_failure = text
        if self._failures >= MOST_FAILURES:
            raise SavingFailed(f"{text} ({self._failures} consecutive attempts failed); {self._what_is_left()}")
        self._world.say(
            f"warning: {text}; training continues and the save is repeated after the next update "
            f"(failure {self._failures}; the run ends after {MOST_FAILURES} in a row)"
        )

    def _what_is_left(self) -> str:
        checkpoints = checkpoint.list_checkpoints(self._run_folder)
        newest = f"the newest checkpoint is {checkpoints[-1].name}" if checkpoints else "there is no checkpoint"
        return f"{newest}; free disk space or restore write permission in {self._run_folder}, then run the same command to resume"


class _Background(threading.Thread):
    """A single save, run in a thread by `start` or directly by `run`; not a daemon, so the interpreter waits for it at exit."""

    def __init__(self, write: Callable[[], None], step: int):
        super().__init__(name=f"save-step-{step}")
        self.step, self._write = step, write
        self._error: BaseException | None = None
        self.done = False

    def run(self) -> None:
        try:
            self._write()
        except KeyboardInterrupt:
            # Only possible when `run` is called directly: Ctrl-C reaches the main thread alone.
            raise
        except BaseException as error:
            # Reported by `wait`, which the main thread calls.
            self._error = error
        self.done = True

    def wait(self) -> BaseException | None:
        """Waits for the save to end; returns its error, or None if it succeeded."""
        if self.ident is not None:
            self.join()
        return self._error


class _Snapshot:
    """Copies a save's tensors to host memory, into buffers that are reused by the next save."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, content: Content) -> Content:
        """Returns a copy of the content that later updates do not change."""
        tensors = {name: self._copy(name, tensor) for name, tensor in content.tensors.items()}
        own = {name: self._copy(name, tensor) for name, tensor in content.own.items()}
        if any(tensor.is_cuda for tensor in (*content.tensors.values(), *content.own.values())):
            torch.cuda.synchronize()
        self._buffers = {name: self._buffers[name] for name in (*tensors, *own)}
        return replace(content, tensors=tensors, own=own, documents=copy.deepcopy(dict(content.documents)))

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Starts copying a tensor to host memory and returns the copy; of a DTensor, the DTensor of this process's part."""
        source = local(tensor.detach())
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(source, non_blocking=True)
        return on_cpu(tensor, buffer) if isinstance(tensor, DTensor) else buffer
