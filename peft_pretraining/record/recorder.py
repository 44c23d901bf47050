"""The record of a run: metrics.jsonl, a progress bar, and a dashboard (`--tracker`), whose failures never stop the training.

An update's numbers are read from the device one update late (LateRecord), so that the next update is queued before this process
waits for anything.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_pretraining.distributed.parallel import local, stored_parts
from peft_pretraining.record.summary import METRICS_FILE, keep_record, read_metrics, read_record, read_stop, status, summary
from peft_pretraining.record.tracker import Tracker, start_tracker
from peft_pretraining.record.wandb_run import one_line
from peft_pretraining.training.evaluate import EvalResult
from peft_pretraining.training.update import SkippedUpdates, StepResult, TrainState
from sparse_lora import Support

# A loss is a spike where it exceeds the median of the last _WINDOW by _SIGMAS standard deviations and by _MIN_JUMP nats.
_WINDOW, _MIN_LOSSES = 100, 20
_SIGMAS, _MIN_JUMP = 6.0, 0.2
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} updates [{elapsed}<{remaining}{postfix}]"


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held so far: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


class _Lines:
    """A file of lines, open for appending. On a full disk lines are kept in memory and written once there is room."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting: list[str] = []
        self._failing = False

    def write(self, line: str) -> str | None:
        """Write the lines kept so far and this one. Returns the problem at the first of several failures, else None."""
        self._waiting.append(line + "\n")
        return self._try(self._write_waiting)

    def sync(self) -> str | None:
        """Write the lines kept so far, and flush them to disk."""
        return self._try(self._write_waiting) or self._try(lambda: os.fsync(self._file.fileno()))

    def close(self) -> str | None:
        """Write the lines kept so far, and close the file."""
        problem = self._try(self._write_waiting)
        self._file.close()
        return problem

    def _write_waiting(self) -> None:
        content = "".join(self._waiting).encode()
        end = os.fstat(self._file.fileno()).st_size
        if content and self._file.write(content) != len(content):
            os.truncate(self._path, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting.clear()

    def _try(self, operation: Callable[[], object]) -> str | None:
        try:
            operation()
        except OSError as error:
            reported, self._failing = self._failing, True
            return None if reported else f"{self._path} cannot be written ({error.strerror})"
        self._failing = False
        return None


class LossSpikes:
    """Detects a logged loss far above the last 100 losses: by 6 standard deviations and at least 0.2 nats above their median.

    The standard deviation is estimated as 1.4826 times the median absolute deviation, its value for a normal distribution.
    """

    def __init__(self, losses: Iterable[float | None] = ()):
        """losses: losses logged before the run was resumed, oldest first."""
        self._recent = deque((loss for loss in losses if loss is not None), maxlen=_WINDOW)

    def usual(self, loss: float) -> float | None:
        """Adds a loss; returns the median of the earlier losses if `loss` is a spike, else None (also with too few losses)."""
        usual = None
        if len(self._recent) >= _MIN_LOSSES:
            median = statistics.median(self._recent)
            deviation = 1.4826 * statistics.median(abs(value - median) for value in self._recent)
            if loss > median + max(_MIN_JUMP, _SIGMAS * deviation):
                usual = median
        self._recent.append(loss)
        return usual


class Recorder:
    """Writes one JSON line per logged update and evaluation, the same to the dashboard, and moves the progress bar.

    Every process has one; only rank 0's does anything (`enabled`).
    """

    def __init__(
        self, run_folder: Path, *, enabled: bool, total_updates: int, start_step: int, tracker_settings: Mapping[str, Any]
    ):
        """Open the run's record at `start_step`, and remove later lines, which a crash after the checkpoint left."""
        self.enabled = enabled
        self.run_folder = run_folder
        earlier = read_record(run_folder)
        rows = [row for row in earlier.rows if row["update_step"] <= start_step]
        evaluated = [row["update_step"] for row in rows if "final_eval_loss" in row]
        self.last_evaluated_step: int | None = evaluated[-1] if evaluated else None
        self._spikes = LossSpikes(row["loss"] for row in rows if "loss" in row)
        self._tracker: Tracker | None = None
        self._last_perplexity = ""
        if not enabled:
            return
        if earlier.problem is not None:
            path = run_folder / METRICS_FILE
            old = keep_record(path)
            print(f"notice: {run_folder}: {earlier.problem}; the file as it was is kept as {old.name}", file=sys.stderr)
        self._rewrite(rows)
        self._file = _Lines(run_folder / METRICS_FILE)
        self._document = tracker_settings["config"]
        self._tracker = start_tracker(run_folder, tracker_settings)
        self._bar = _progress_bar(total_updates, start_step)
        self._tell_tracker(lambda tracker: self._catch_up(tracker, rows))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        path = self.run_folder / METRICS_FILE
        partial = path.with_name(f".partial-{path.name}")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    def sync(self) -> None:
        """Flush the record to disk, before a checkpoint, so that a run resumed from it lacks no line."""
        if self.enabled:
            self._tell(self._file.sync())

    def log_update(self, row: Mapping[str, Any]) -> None:
        """Record a logged update; the bar shows loss, perplexity, tokens/s and memory."""
        if not self.enabled:
            return
        self._write({**row, **self._spike(row)})
        if "memory_peak_measured" in row:
            self.say(_memory_text(row))
        figures = [
            f"loss {row['loss']:.3f}",
            f"{row['throughput_tokens']:,.0f} tok/s",
            f"ppl {_perplexity_text(row['loss'])}",
            self._last_perplexity,
            f"{row['bad_records']:,} bad records" if row.get("bad_records") else "",
            f"{row['max_memory'] / 2**30:.2f} GiB",
            f"mfu {row['mfu']:.0%}" if "mfu" in row else "",
        ]
        _show(self._bar, [figure for figure in figures if figure])

    def _spike(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The row's key `loss_spike` for a loss that jumped, and a line about it for the user; empty otherwise."""
        usual = self._spikes.usual(row["loss"]) if math.isfinite(row["loss"]) else None
        if usual is None:
            return {}
        self.say(f"update {row['update_step']}: loss {row['loss']:.3f} jumped from about {usual:.3f}")
        return {"loss_spike": row["loss"] - usual}

    def advance(self) -> None:
        """Move the bar by one finished update."""
        if self.enabled:
            self._bar.update(1)

    def log_evaluation(self, update_step: int, result: EvalResult, tokens_seen: int | None = None) -> None:
        """Record an evaluation after `tokens_seen` tokens of training, and print its result above the bar."""
        self.last_evaluated_step = update_step
        if not self.enabled:
            return
        row = {
            "update_step": update_step,
            "final_eval_loss": result.loss,
            "final_eval_perplexity": result.perplexity,
            "final_eval_tokens": result.tokens,
            "final_eval_bits_per_byte": result.bits_per_byte,
        }
        row |= {} if tokens_seen is None else {"tokens_seen": tokens_seen}
        self._write(row)
        self._last_perplexity = f"eval ppl {result.perplexity:.4g}"
        bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        self.say(
            f"update {update_step}: evaluation loss {result.loss:.4f}, perplexity {result.perplexity:.4g}{bits}, "
            f"over {result.tokens:,} tokens"
        )

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.enabled:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    def _write(self, values: Mapping[str, Any]) -> None:
        # JSON has no infinity and no NaN.
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        self._tell(self._file.write(json.dumps(row, allow_nan=False)))
        self._tell_tracker(lambda tracker: tracker.log(row))

    def _catch_up(self, tracker: Tracker, rows: list[dict[str, Any]]) -> None:
        if count := tracker.send_missing(rows):
            self.say(f"{tracker.name}: {count:,} earlier rows of metrics.jsonl that it lacks are sent")

    def _tell_tracker(self, act: Callable[[Tracker], object]) -> None:
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:
            # No failure of the dashboard may end the run.
            name, self._tracker = self._tracker.name, None
            self.say(f"warning: {name} stopped recording ({one_line(error)}); training and metrics.jsonl continue")

    def _tell(self, problem: str | None) -> None:
        if problem is not None:
            self.say(f"warning: {problem}; training continues, lines are kept in memory until the file can be written")

    def close(self, exit_code: int = 0) -> None:
        """Flush everything and end the run at the dashboard."""
        if not self.enabled:
            return
        self._bar.close()
        self._tell(self._file.close())
        if self._tracker is not None:
            try:
                rows = read_metrics(self.run_folder)
                state = status(self._document, rows, read_stop(self.run_folder))
                self._tracker.finish({"status": state, **summary(self._document, rows)}, exit_code)
            except Exception as error:
                print(f"warning: {self._tracker.name} did not finish ({one_line(error)})", file=sys.stderr)


def _perplexity_text(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 50 else "inf"


def _memory_text(row: Mapping[str, Any]) -> str:
    pairs = [
        f"{name} {row[f'memory_{name}_predicted'] / 2**30:.2f} / {row[f'memory_{name}_measured'] / 2**30:.2f}"
        for name in ("parameters", "support", "optimizer", "peak")
    ]
    return f"memory in GiB, predicted / measured: {', '.join(pairs)}"


def _progress_bar(total_updates: int, start_step: int) -> Any:
    from tqdm import tqdm

    # A log file gets a line every 15 seconds instead of thousands of carriage returns.
    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=total_updates,
        initial=start_step,
        unit="update",
        bar_format=_BAR,
        ncols=_columns(),
        mininterval=0.5 if is_terminal else 15.0,
        smoothing=0.05,
    )


def _columns() -> int | None:
    """Returns the columns that the bar may fill, with room for the terminal's `^C`; None where lines may have any length."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return None
    # Serial consoles and terminals of programs may report 0 columns.
    return max((columns or 80) - 3, 1)


def _show(bar: Any, figures: list[str]) -> None:
    """Shows as many of the figures, the most important first, as leave a bar of ten columns."""
    bar.ncols = _columns()
    # Without ncols, tqdm's bar has ten columns.
    state = {**bar.format_dict, "ncols": None, "postfix": None}
    room = math.inf if bar.ncols is None else bar.ncols - len(bar.format_meter(**state)) - len(", ")
    shown = figures[:1]
    for figure in figures[1:]:
        if len("  ".join([*shown, figure])) > room:
            break
        shown.append(figure)
    bar.set_postfix_str("  ".join(shown), refresh=False)


class PendingUpdate:
    """An update whose loss, gradient norm and number of skipped tensors are being copied from the device."""

    def __init__(self, step: int, result: StepResult, known: dict[str, Any] | None, num_tokens: int, num_updates: int):
        """Start the copy without waiting for it.

        step: number of finished updates. known: fields of the update's row that are already known; None if it gets no row.
        num_tokens, num_updates: work since the last row.
        """
        self.step, self.known, self.num_tokens, self.num_updates = step, known, num_tokens, num_updates
        values = torch.stack((result.loss, result.gradnorm, result.skipped))
        self._copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._copy.copy_(values, non_blocking=True)
        self._event = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        self._arrived_at = time.perf_counter() if self.arrived else None

    @property
    def arrived(self) -> bool:
        """Whether `read` returns without waiting."""
        return self._event is None or bool(self._event.query())

    def read(self) -> tuple[float, float, float, float]:
        """Wait for (loss, gradnorm, skipped), and the time (time.perf_counter) at which they were first seen to have arrived."""
        if self._event is not None:
            self._event.synchronize()
        if self._arrived_at is None:
            self._arrived_at = time.perf_counter()
        loss, gradnorm, skipped = self._copy.tolist()
        return loss, gradnorm, skipped, self._arrived_at


class Throughput:
    """Tokens, sequences and micro-batches per second of training; evaluation and saving do not count."""

    def __init__(
        self, sequences_per_update: int, micro_batches_per_update: int, flops: Mapping[str, tuple[float, float]] | None = None
    ):
        """Counts are per update, over all processes. flops: see mfu.flop_rates."""
        self._flops = flops or {}
        self._per_update = {"examples": sequences_per_update, "batches": micro_batches_per_update}
        self._start = time.perf_counter()

    def rates(self, num_tokens: int, num_updates: int, done_at: float) -> dict[str, float]:
        """The published throughput keys, per second, of work that ended at `done_at` (time.perf_counter).

        The work is assumed to have begun when the work before it ended.
        """
        seconds = max(done_at - self._start, 1e-9)
        self._start = done_at
        rates = {f"throughput_{name}": num_updates * count / seconds for name, count in self._per_update.items()}
        rates["throughput_tokens"] = num_tokens / seconds
        sequences, tokens = rates["throughput_examples"], rates["throughput_tokens"]
        return rates | {name: layers * sequences + head * tokens for name, (layers, head) in self._flops.items()}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the rates; all updates before it must be finished."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before


class LateRecord:
    """Takes every update from the loop, reads the one before it, counts skipped updates, and writes rows to the Recorder.

    Every process has one; all of them see the same numbers.
    """

    def __init__(self, record: Recorder, state: TrainState, throughput: Throughput):
        """state: its count of skipped updates is kept up to date as updates are read."""
        self._record, self._state, self._throughput = record, state, throughput
        self._skipped = SkippedUpdates(state.skipped_updates)
        self._waiting: deque[PendingUpdate] = deque()
        # Sums since the last row.
        self._num_tokens = self._num_updates = 0

    def add(self, update_step: int, result: StepResult, known: dict[str, Any] | None) -> None:
        """Take an update that is queued on the device, and read the one before it.

        known: fields of the update's row that are already known; None if it gets no row. Raises TrainingError, as `settle`.
        """
        self._num_tokens += result.num_tokens
        self._num_updates += 1
        self._waiting.append(PendingUpdate(update_step, result, known, self._num_tokens, self._num_updates))
        if known is not None:
            self._num_tokens = self._num_updates = 0
        self._read_all_but(1)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Settle first, and leave the time of the block out of the throughput."""
        self.settle()
        with self._throughput.paused():
            yield

    def settle(self) -> None:
        """Wait for the device, and write every row. Raises TrainingError after too many skipped updates in a row."""
        self._read_all_but(0)

    def _read_all_but(self, newest: int) -> None:
        while len(self._waiting) > newest:
            update = self._waiting.popleft()
            _, _, skipped, _ = update.read()
            self._skipped.add(update.step, skipped)
            self._state.skipped_updates = self._skipped.total
            self._write(update)

    @property
    def last_one_skipped(self) -> bool:
        """Whether the newest update that was read was skipped."""
        return self._skipped.last_one

    def close(self) -> None:
        """Write what has arrived without waiting: the run may have failed, and the rest may never arrive."""
        # A device that has failed raises its error at every call.
        with contextlib.suppress(RuntimeError):
            while self._waiting and self._waiting[0].arrived:
                self._write(self._waiting.popleft())

    def _write(self, update: PendingUpdate) -> None:
        if update.known is None:
            return
        loss, gradnorm, _, arrived_at = update.read()
        row = {"update_step": update.step, "loss": loss, "gradnorm": gradnorm, **update.known}
        row |= self._throughput.rates(update.num_tokens, update.num_updates, arrived_at)
        row |= {"skipped_updates": self._skipped.total} if self._skipped.total else {}
        self._record.log_update(row)


def measured_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Returns bytes of parameters, support, currently allocated gradients and optimizer states.

    Shared storage is counted once. Of sharded parameters this process's parts are counted.
    """
    parameters = [part for parameter in model.parameters() for part in stored_parts("", parameter.detach()).values()]
    gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    codes = [module.code for module in model.modules() if isinstance(module, Support)]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "parameters": _storage_bytes(parameters),
        "support": _storage_bytes(code for code in codes if code is not None),
        "gradients": _storage_bytes(gradients),
        "optimizer": _storage_bytes(value for value in states if isinstance(value, torch.Tensor)),
    }


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    parts = [local(tensor) for tensor in tensors]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts if part.numel()}
    return sum(storages.values())


def comparison(predicted: Mapping[str, int], measured: Mapping[str, int], peak: int, device_type: str) -> dict[str, int]:
    """Returns predicted and measured bytes under the record's keys memory_<class>_predicted and memory_<class>_measured.

    On a GPU the measured peak is torch's allocations only, so the CUDA context ("runtime") is subtracted from the prediction.
    """
    row: dict[str, int] = {}
    for name in ("parameters", "support", "optimizer"):
        row |= {f"memory_{name}_predicted": predicted[name], f"memory_{name}_measured": measured[name]}
    not_measured = predicted["runtime"] if device_type == "cuda" else 0
    return row | {"memory_peak_predicted": predicted["peak"] - not_measured, "memory_peak_measured": peak}
