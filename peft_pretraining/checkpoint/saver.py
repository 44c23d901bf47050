"""When a run is saved, and what happens where that fails: in the background or not, once more, and not for ever.

Every process of a run has one, and all of them call it alike. It knows no component: `collect` gives what is to be saved.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from peft_pretraining.checkpoint import step_folder as checkpoint
from peft_pretraining.checkpoint.step_folder import Content
from peft_pretraining.distributed.parallel import local, on_cpu
from peft_pretraining.distributed.world import World, gather_objects, own_group

MOST_FAILURES = 5  # saves that fail one after another before the run is given up


class SavingFailed(RuntimeError):
    """The run's state cannot be saved, and going on would only lose more."""


class Saver:
    """Saves a run: `due` after every update, `save` where it says so or at any other time, `finish` at the end or before a stop.

    A save that fails does not end the run: it is told, and made again after the next update.
    """

    def __init__(
        self,
        run_folder: Path,
        collect: Callable[[], Content],
        world: World,
        *,
        keep: int | None = None,
        asynchronous: bool = False,
        saved_step: int | None = None,
        timeout_s: float = 1800.0,
    ):
        """Every process calls it.

        Args:
            collect: the run's content as it stands now; its tensors may be the run's own.
            keep: how many of the newest checkpoints stay; None keeps all.
            asynchronous: copy the state, and write the copy while the run goes on; at most one such save is under way.
            timeout_s: how long processes wait for one another in an asynchronous save.
            saved_step: the checkpoint that the run has come from, where it lies in the run's folder.
        """
        self._run_folder, self._collect, self._world, self._keep = run_folder, collect, world, keep
        self._asynchronous = asynchronous
        # Collectives of a thread on the group that training uses would meet those of the main thread, and both would wait.
        self._group = own_group(world, timeout_s) if asynchronous else None
        self._snapshot = _Snapshot()
        self._in_flight: _Background | None = None
        self._saved_step = saved_step
        self._failures = 0

    def due(self, scheduled: bool) -> bool:
        """After an update: whether to save now, because it is `scheduled` or because the last save failed.

        Raises:
            SavingFailed: as `save`.
        """
        if self._in_flight is not None and all(gather_objects(self._in_flight.done, self._world)):
            self._settle()
        return scheduled or self._failures > 0

    def save(self) -> None:
        """Save the run as it stands; nothing to do where that is saved already. Returns at once if asynchronous.

        Raises:
            SavingFailed: this was one failure too many.
        """
        self._settle()  # one at a time
        content = self._collect()
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

    def finish(self) -> None:
        """Wait for what is under way, and make up for a save that failed.

        Raises:
            SavingFailed: the run's last state is not saved.
        """
        self._settle()
        if self._failures:
            self.save()
            self._settle()
        if self._failures:
            raise SavingFailed(f"the run ends without its last state: {self._last_failure}; {self._what_is_left()}")

    def close(self) -> None:
        """Wait for what is under way, without a word on how it ended beyond a warning: the run has failed already."""
        if self._in_flight is not None and (error := self._in_flight.wait()) is not None:
            self._say(f"warning: {error}")
        self._in_flight = None

    def _write(self, content: Content) -> None:
        checkpoint.save_checkpoint(self._run_folder, content, self._world, keep=self._keep, group=self._group)

    def _settle(self) -> None:
        """Wait for the save under way and take note of how it ended, which is the same on every process."""
        if self._in_flight is None:
            return
        background, self._in_flight = self._in_flight, None
        error = background.wait()
        if error is None:
            self._failures, self._saved_step = 0, background.step
        elif isinstance(error, OSError):
            self._note_failure(str(error))
        else:
            raise error

    def _note_failure(self, text: str) -> None:
        self._failures += 1
        self._last_failure = text
        if self._failures >= MOST_FAILURES:
            raise SavingFailed(f"{text} ({self._failures} attempts failed, one after another); {self._what_is_left()}")
        self._say(
            f"warning: {text}; training goes on, and after the next update it is tried again (failure {self._failures}, the run "
            f"ends at {MOST_FAILURES})"
        )

    def _what_is_left(self) -> str:
        found = checkpoint.list_checkpoints(self._run_folder)
        left = f"the last checkpoint is {found[-1].name}" if found else "there is no checkpoint"
        return f"{left}; once {self._run_folder} can be written to, the same command goes on from there"

    def _say(self, text: str) -> None:
        if self._world.is_main:
            print(text, file=sys.stderr, flush=True)


class _Background(threading.Thread):
    """A save that may run in a thread; the interpreter waits for it at its end."""

    def __init__(self, write: Callable[[], None], step: int):
        super().__init__(name=f"save-step-{step}")
        self.step, self._write = step, write
        self._error: BaseException | None = None
        self.done = False

    def run(self) -> None:
        try:
            self._write()
        except KeyboardInterrupt:
            raise  # not in a thread: someone presses Ctrl-C while this is called directly
        except BaseException as error:  # told where the save is waited for
            self._error = error
        self.done = True

    def wait(self) -> BaseException | None:
        """How it ended: None if all went well."""
        if self.ident is not None:
            self.join()
        return self._error


class _Snapshot:
    """A copy of the tensors of a save in memory of the CPU, in buffers that stay from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, content: Content) -> Content:
        """The same content, which later updates do not change."""
        tensors = {name: self._copy(name, tensor) for name, tensor in content.tensors.items()}
        own = {name: self._copy(name, tensor) for name, tensor in content.own.items()}
        if any(tensor.is_cuda for tensor in (*content.tensors.values(), *content.own.values())):
            torch.cuda.synchronize()
        self._buffers = {name: self._buffers[name] for name in (*tensors, *own)}
        return replace(content, tensors=tensors, own=own, documents=copy.deepcopy(dict(content.documents)))

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, perhaps not complete yet; of a part of a tensor, the same part of one in memory of the CPU."""
        source = local(tensor.detach())
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(source, non_blocking=True)
        return on_cpu(tensor, buffer) if isinstance(tensor, DTensor) else buffer
