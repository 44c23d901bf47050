"""Section env: versions, packages that cannot be imported, the card, the context's bytes, a trial of the Triton kernels."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from typing import Any

import torch

from gpu.record import Options, Record
from gpu.timing import card, context_bytes

PACKAGES = ("transformers", "bitsandbytes", "torchao", "triton", "sentencepiece", "datasets", "safetensors", "wandb", "pytest")
_TRIAL = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from sparse_lora import kernels
print(kernels.is_available(torch.device(sys.argv[2]), torch.bfloat16))
"""


def run(record: Record, options: Options) -> None:
    """Measures the section's steps."""
    device = torch.device(options.device)
    record.step("card", lambda: card(device))
    record.step("context", lambda: context_bytes(device))
    record.step("triton", lambda: triton_trial(options.device, record.seconds_left))
    # In tiny only packages that load in a moment.
    for name in ("pytest", "safetensors") if options.tiny else PACKAGES:
        record.step(f"import {name}", lambda name=name: imported(name))
    record.step("bfloat16", lambda: {"in_hardware": has_bfloat16(device)})


def triton_trial(device: str, seconds: float) -> dict[str, Any]:
    """Runs the kernels' trial in a process of its own, because an illegal access would lose the device for this one."""
    root = str(importlib.import_module("sparse_lora").__path__[0] + "/..")
    command = [sys.executable, "-c", _TRIAL, root, device]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds), check=False)
    except subprocess.TimeoutExpired:
        return {"works": False, "error": f"no result after {seconds:.0f} s"}
    answer = ended.stdout.strip().splitlines()[-1:] or ["nothing"]
    row: dict[str, Any] = {"works": answer == ["True"], "answer": answer[0], "exit_code": ended.returncode}
    return row | ({"stderr": ended.stderr[-1500:]} if ended.stderr else {})


def imported(name: str) -> dict[str, Any]:
    """Imports a package; returns its version and the seconds. Raises what the import raises."""
    start = time.perf_counter()
    module = importlib.import_module(name)
    return {"version": str(getattr(module, "__version__", "unknown")), "seconds": time.perf_counter() - start}


def has_bfloat16(device: torch.device) -> bool | None:
    """Tells whether a GPU computes in bfloat16 without emulation; None for a CPU."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False)) if device.type == "cuda" else None
