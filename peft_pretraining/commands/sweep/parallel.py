"""Runs of a sweep that run at the same time: which GPUs or how many threads each has, and how long the rest will take."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from peft_pretraining.commands.sweep.settings import PlannedRun


def run_environments(num_runs: int, processes: int, runs: Sequence[PlannedRun]) -> tuple[list[dict[str, str]], str | None]:
    """Returns the environment variables of each of `num_runs` runs that run at a time, and a notice about sharing GPUs or None.

    With GPUs, a run has `processes` of them to itself; where there are too few, several runs share them in turn. Otherwise, and
    for runs with --device cpu, a process has an equal share of the cores as threads, unless OMP_NUM_THREADS is set. One run at a
    time has the whole machine: nothing is set. processes: of each run.
    """
    if num_runs == 1:
        return [{}], None
    gpus = _visible_gpus() if all(run.args.device in ("auto", "cuda") for run in runs) else []
    groups = [",".join(gpus[first : first + processes]) for first in range(0, len(gpus) - processes + 1, processes)]
    if groups:
        text = f"{num_runs} runs at a time on {len(gpus)} GPUs, {processes} for each: some share a GPU, and its memory"
        in_turn = [{"CUDA_VISIBLE_DEVICES": groups[number % len(groups)]} for number in range(num_runs)]
        return in_turn, text if num_runs > len(groups) else None
    if "OMP_NUM_THREADS" in os.environ or any(run.args.device.startswith("cuda") for run in runs):
        return [{} for _ in range(num_runs)], None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{"OMP_NUM_THREADS": str(max(1, cores // (num_runs * processes)))} for _ in range(num_runs)], None


def _visible_gpus() -> list[str]:
    """Returns the names that CUDA_VISIBLE_DEVICES has for the GPUs of this process."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def work_of(planned: PlannedRun) -> float:
    """Returns the tokens that a run computes, padding included; of a run whose length is given in tokens, those."""
    if planned.plan.max_train_tokens is not None:
        return float(planned.plan.max_train_tokens)
    return float(planned.plan.num_training_steps) * planned.plan.tokens_per_update


class TimeLeft:
    """Estimates how long the rest of a sweep's runs takes, from those that were made: all are taken to be equally fast."""

    def __init__(self, num_runs: int):
        """num_runs: runs at a time."""
        self._num_runs, self._work, self._seconds = num_runs, 0.0, 0.0

    def add(self, work: float, seconds: float) -> None:
        """Adds a run that was made: its tokens, and the seconds that it took."""
        self._work += work
        self._seconds += seconds

    def text(self, waiting: Sequence[float], running: Mapping[str, tuple[float, float]]) -> str:
        """Returns "; about 2 h 10 min left"; "" if nothing is left, or no run was made yet.

        waiting: tokens of runs that have not begun. running: tokens and the seconds so far of those under way.
        """
        if not self._work or not (waiting or running):
            return ""
        rate = self._work / self._seconds if self._seconds else float("inf")
        seconds = [work / rate for work in waiting]
        under_way = [max(0.0, work / rate - so_far) for work, so_far in running.values()]
        left = max((sum(seconds) + sum(under_way)) / self._num_runs, *seconds, *under_way)
        hours, minutes = divmod(max(1, round(left / 60)), 60)
        return f"; about {f'{hours} h ' if hours else ''}{minutes} min left"
