"""Section learn: trains LLaMA 60M with SLTrain on real text, for as many updates as fit, and keeps the record."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

from memory_table import HERE

import torchrun_main
from gpu.record import Options, Record
from gpu.updates import TINY_LAYER, tiny_config

# Seconds before the end at which the run is asked to stop: it finishes its update and saves.
_TO_SAVE = 12.0
_KEYS = ("update_step", "loss", "gradnorm", "lr", "tokens_seen", "throughput_tokens", "max_memory", "skipped_updates")
_EVALUATION = ("update_step", "final_eval_perplexity", "final_eval_tokens")


def run(record: Record, options: Options) -> None:
    """Measures the section's step."""
    os.chdir(HERE.parent)
    record.step("60m SLTrain", lambda: trained(record, options))


def flags(options: Options, folder: Path, config: str) -> list[str]:
    """Returns the trainer's flags."""
    argv = [
        *("--model_config", "configs/llama_60m.json", "--peft_model", "sltrain", "--rank", "128", "--sp_ratio", "0.03"),
        *("--lora_alpha", "32", "--optimizer", "adamw", "--lr", "0.003", "--warmup_steps", "100", "--packing"),
        *("--num_training_steps", "11000", "--batch_size", "128", "--max_length", "256", "--dtype", "bfloat16"),
        *("--eval_every", "250", "--eval_tokens", "200000", "--log_every", "10", "--save_every", "1000000"),
        *("--wandb", "disabled", "--workers", "2", "--device", options.device, "--save_dir", str(folder)),
        *("--dataset", options.dataset, *(["--tokenizer", options.tokenizer] if options.tokenizer else [])),
    ]
    if options.tiny:
        argv += ["--model_config", config, *TINY_LAYER, "--num_training_steps", "3", "--warmup_steps", "1", "--log_every", "1"]
        argv += ["--batch_size", "2", "--max_length", "16", "--eval_tokens", "64", "--workers", "0"]
    return argv


def trained(record: Record, options: Options) -> dict[str, Any]:
    """Trains until the section's time is nearly over. Raises RuntimeError with the trainer's exit code if it fails."""
    with tempfile.TemporaryDirectory() as folder, tiny_config() as config:
        run_folder, ended = Path(folder) / "run", threading.Event()
        argv = flags(options, run_folder, config)
        # Ignored while the trainer does not listen, instead of ending this process.
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        watcher = threading.Thread(target=watch, args=(record, run_folder, ended), daemon=True)
        watcher.start()
        try:
            code = torchrun_main.main(argv)
        finally:
            ended.set()
            watcher.join()
            signal.signal(signal.SIGUSR1, before)
        if code:
            raise RuntimeError(f"the trainer ended with exit code {code}; its message is in `output`")
        return {"arguments": argv, **rows_of(run_folder)}


def watch(record: Record, folder: Path, ended: threading.Event) -> None:
    """Writes the rows so far to the section's file every few seconds, and asks the trainer to stop when time is nearly over."""
    asked = False
    while not ended.wait(2.0):
        record.rows[-1].update(rows_of(folder))
        record.write()
        # Once, when the trainer listens: a second signal would end it without a save.
        if not asked and record.seconds_left < _TO_SAVE and signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN:
            os.kill(os.getpid(), signal.SIGUSR1)
            asked = True


def rows_of(folder: Path) -> dict[str, Any]:
    """Returns what a run's record holds so far."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    # The file does not exist yet, or its last line is incomplete.
    except (OSError, ValueError):
        return {}
    updates = [{key: row[key] for key in _KEYS if key in row} for row in rows if "loss" in row]
    evaluations = [{key: row[key] for key in _EVALUATION if key in row} for row in rows if "final_eval_perplexity" in row]
    return {"updates": updates, "evaluations": evaluations}
