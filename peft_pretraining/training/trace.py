"""Traces a few updates with torch's profiler: a Chrome trace, a table of the top operations, and on a GPU a memory snapshot."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

FOLDER = "trace"
# Updates before the first traced one: the first allocates moments and compiles; in the second the profiler is on, for its own
# start-up, and nothing is kept.
WARM_UP = 2
_ROWS, _NAME_WIDTH = 30, 60
# Allocations and frees that a snapshot can hold; one takes about a kilobyte with its stack.
_MOST_EVENTS = 100_000


class Trace:
    """Traces `num_updates` updates of this process, after WARM_UP others. Call `after_update` after each, `close` at the end.

    Every process writes its own files to trace/ in the run's folder; their names have the numbers of the traced updates, so that
    a resumed run adds to them. A trace that cannot be written costs a warning.
    """

    def __init__(
        self, run_folder: Path, num_updates: int, update_step: int, rank: int, device: torch.device, say: Callable[[str], object]
    ):
        """update_step: finished updates of the run. say: prints a line for the user, on one process."""
        self._folder, self._num_updates, self._rank, self._device, self._say = run_folder / FOLDER, num_updates, rank, device, say
        self._before, self._made = update_step + WARM_UP, -WARM_UP
        if device.type == "cuda":
            # From now on, so that the snapshot names what allocated the moments.
            torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
        # The profiler's own progress lines would tear the progress bar.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profiler: torch.profiler.profile | None = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=num_updates, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profiler.start()

    def after_update(self, paused: Callable[[], AbstractContextManager[None]]) -> None:
        """Counts an update; after the last traced one it writes the files, during `paused`: seconds that are not training."""
        if self._profiler is None:
            return
        self._made += 1
        if self._made < self._num_updates:
            self._profiler.step()
            return
        with paused():
            self._profiler.step()
            self._end()

    def close(self) -> None:
        """Ends a trace whose updates were not all made: writes those that were, and says how many are missing."""
        if self._profiler is None:
            return
        made = max(self._made, 0)
        self._say(
            f"notice: --trace {self._num_updates}: {made} of {self._num_updates} updates are traced; the run ended after "
            f"{self._made + WARM_UP} updates, of which the first {WARM_UP} are warm-up"
        )
        if made == 0:
            # Without updates there is nothing to write.
            self._profiler.on_trace_ready = None
        self._end()

    def _end(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
        self._profiler = None
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiler: Any) -> None:
        """Writes the files of the updates traced so far."""
        name = f"updates_{self._before + 1:08d}-{self._before + self._made:08d}.rank_{self._rank}"
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(f"{path}.json.gz")
            time = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=time, row_limit=_ROWS, max_name_column_width=_NAME_WIDTH)
            Path(f"{path}.txt").write_text(f"{self._made} updates\n{table}\n", encoding="utf-8")
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(f"{path}.memory.pickle")
        except (OSError, RuntimeError) as error:
            print(f"warning: the trace of process {self._rank} cannot be written ({error}); training continues", file=sys.stderr)
            return
        self._say(f"{self._made} updates traced: {path}.json.gz (docs/profiling.md)")
