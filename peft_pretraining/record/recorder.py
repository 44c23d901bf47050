"""The record of a run: metrics.jsonl always, a progress bar, and wandb, which can never stop or block the training."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.record.summary import summary
from peft_pretraining.record.wandb_run import _one_line, start_wandb
from peft_pretraining.training.health import LossSpikes

if TYPE_CHECKING:
    import torch

    from peft_pretraining.training.evaluate import EvalResult

METRICS_FILE = "metrics.jsonl"


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held so far: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a crash is left out."""
    path = run_folder / METRICS_FILE
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


class _Lines:
    """A file of lines, open for more. A full disk costs no line as long as this lives: they are written once there is room."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting: list[str] = []
        self._failing = False

    def write(self, line: str) -> str | None:
        """Write a line, and those that wait. Returns what is wrong, once, where they cannot be written."""
        self._waiting.append(line + "\n")
        return self._try(self._write_waiting)

    def sync(self) -> str | None:
        """Write what waits, and have it on disk."""
        return self._try(self._write_waiting) or self._try(lambda: os.fsync(self._file.fileno()))

    def close(self) -> str | None:
        """Write what waits; the file takes no more."""
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

    def _try(self, act: Callable[[], object]) -> str | None:
        try:
            act()
        except OSError as error:
            told, self._failing = self._failing, True
            return None if told else f"{self._path} cannot be written ({error.strerror})"
        self._failing = False
        return None


class Recorder:
    """Writes what happened: one JSON line per logged update, the same to wandb, and a bar for whoever watches.

    Every process may hold one; only rank 0's does anything (`enabled`).
    """

    def __init__(
        self, run_folder: Path, *, enabled: bool, total_updates: int, start_step: int, wandb_settings: Mapping[str, Any]
    ):
        """Opens the run's record at `start_step`: lines past it (a crash after the checkpoint) are taken back."""
        self.enabled = enabled
        self.run_folder = run_folder
        rows = [row for row in read_metrics(run_folder) if row.get("update_step", 0) <= start_step]
        evaluated = [row["update_step"] for row in rows if "final_eval_loss" in row]
        self.last_evaluated_step: int | None = evaluated[-1] if evaluated else None
        self._spikes = LossSpikes(row["loss"] for row in rows if "loss" in row)
        self._wandb: Any = None
        self._last_perplexity = ""
        if not enabled:
            return
        self._rewrite(rows)
        self._file = _Lines(run_folder / METRICS_FILE)
        self._document = wandb_settings["config"]
        self._wandb = start_wandb(run_folder, wandb_settings)
        self._bar = _progress_bar(total_updates, start_step)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        path = self.run_folder / METRICS_FILE
        partial = path.with_name(f".partial-{path.name}")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    def sync(self) -> None:
        """Flush the record to disk, before a checkpoint: a run that goes on from there lacks no line, whatever stops it."""
        if self.enabled:
            self._tell(self._file.sync())

    def log_update(self, row: Mapping[str, Any]) -> None:
        """Record a logged update; the bar shows loss, perplexity, tokens/s and memory."""
        if not self.enabled:
            return
        self._write({**row, **self._spike(row)})
        if "memory_peak_measured" in row:
            self.say(_memory_text(row))
        bad_records = f"  {row['bad_records']:,} bad records" if row.get("bad_records") else ""
        self._bar.set_postfix_str(
            f"loss {row['loss']:.3f}  ppl {_perplexity_text(row['loss'])}  {row['throughput_tokens']:,.0f} tok/s  "
            f"{row['max_memory'] / 2**30:.2f} GiB{self._last_perplexity}{bad_records}",
            refresh=False,
        )

    def _spike(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The record's key of a loss that jumped, and a line about it."""
        usual = self._spikes.usual(row["loss"]) if math.isfinite(row["loss"]) else None
        if usual is None:
            return {}
        self.say(f"update {row['update_step']}: loss {row['loss']:.3f} jumped from about {usual:.3f}")
        return {"loss_spike": row["loss"] - usual}

    def advance(self) -> None:
        """One more update is finished: move the bar."""
        if self.enabled:
            self._bar.update(1)

    def log_evaluation(self, update_step: int, result: EvalResult, tokens_seen: int | None = None) -> None:
        """Record an evaluation, after so many tokens of training, and say its result above the bar."""
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
        self._last_perplexity = f"  eval ppl {result.perplexity:.4g}"
        bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        self.say(
            f"update {update_step}: evaluation loss {result.loss:.4f}, perplexity {result.perplexity:.4g}{bits}, "
            f"over {result.tokens:,} tokens"
        )

    def say(self, text: str) -> None:
        """A line for the person who watches, above the bar."""
        if self.enabled:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    def _write(self, values: Mapping[str, Any]) -> None:
        # JSON has no infinity and no NaN.
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        self._tell(self._file.write(json.dumps(row, allow_nan=False)))
        if self._wandb is None:
            return
        try:
            self._wandb.log(row)
        except Exception as error:  # whatever the dashboard suffers must not cost the run
            self.say(f"warning: wandb stopped recording ({_one_line(error)}); training and metrics.jsonl go on")
            self._wandb = None

    def _tell(self, problem: str | None) -> None:
        if problem is not None:
            self.say(f"warning: {problem}; training goes on, and the lines are kept until it can be written")

    def close(self, exit_code: int = 0) -> None:
        """Flush everything and end the wandb run."""
        if not self.enabled:
            return
        self._bar.close()
        self._tell(self._file.close())
        if self._wandb is not None:
            try:
                self._finish_wandb(exit_code)
            except Exception as error:
                print(f"warning: wandb did not finish ({_one_line(error)})", file=sys.stderr)

    def _finish_wandb(self, exit_code: int) -> None:
        """What the run reached becomes its summary there, for tables of runs and scatter plots."""
        try:
            figures = summary(self._document, read_metrics(self.run_folder))
            self._wandb.summary.update({name: value for name, value in figures.items() if value is not None})
        finally:
            self._wandb.finish(exit_code=exit_code)


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

    # A log file gets a line now and then instead of thousands of carriage returns.
    watched = sys.stderr.isatty()
    return tqdm(
        total=total_updates,
        initial=start_step,
        desc="updates",
        unit="update",
        dynamic_ncols=watched,
        mininterval=0.5 if watched else 15.0,
        smoothing=0.05,
    )
