"""Section updates: whole updates of the trainer on random tokens: tokens/s, kernels, busy seconds, waits and peak memory."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import predicted_peak, time_steps, updater
from memory_table import HERE
from torch import nn
from train import trainer_flags

from gpu.quick import quick_initial_values
from gpu.record import Options, Record
from gpu.timing import free, kernels_of, memory_of, pipelined_seconds, repeats_for
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.distributed.device import device_memory, resolve_dtype
from peft_pretraining.distributed.world import World
from peft_pretraining.model.loss import chunked_cross_entropy
from peft_pretraining.plan.plan import make_plan

LENGTH = 256
TINY_MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 320, "max_sequence_length": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "initializer_range": 0.02,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1,
}  # fmt: skip
TINY_LAYER = ("--rank", "4", "--sp_ratio", "0.1")


@dataclass(frozen=True)
class Case:
    """A kind of update: config, tokens per update, method of benchmarks/train.py, optimizer, whether compiled, further flags."""

    config: str
    tokens: int
    method: str
    optimizer: str = "adamw"
    compile: bool = False
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the case's row."""
        compiled = "compile" if self.compile else "eager"
        return " ".join([self.config, f"{self.tokens} tokens", self.method, self.optimizer, compiled, *self.flags])


def cases() -> list[Case]:
    """Returns all cases, those that decide most first."""
    sizes, methods = {"350m": 16384, "60m": 65536, "1b": 16384}, ("full", "uniform", "block")
    whole = [[Case(c, t, m, compile=x) for m in methods] for x in (False, True) for c, t in sizes.items()]
    others = [
        *(Case("350m", 16384, "uniform", name) for name in ("adam8bit", "adam8bit_per_layer", "adamw_per_layer", "adamw4bit")),
        Case("350m", 16384, "uniform", "adamw", flags=("--stochastic_rounding",)),
        *(Case("350m", 16384, "uniform", flags=("--linear_cache", kept)) for kept in ("none", "weights")),
        Case("350m", 16384, "lowrank"),
        *(Case("60m", 16384, method) for method in ("full", "uniform")),
    ]
    eager, compiled = whole[:3], whole[3:]
    return [*eager[0], *eager[1], *eager[2], *compiled[0], *others, *compiled[1], *compiled[2]]


def tiny_cases() -> list[Case]:
    """Returns a case of every kind, of the smallest size."""
    kinds = [Case("60m", 32, method) for method in ("full", "uniform", "block", "lowrank")]
    optimizers = ("adam8bit", "adam8bit_per_layer", "adamw_per_layer", "adamw4bit")
    kinds += [Case("60m", 32, "uniform", optimizer) for optimizer in optimizers]
    rounded = Case("60m", 32, "uniform", flags=("--stochastic_rounding",))
    return [*kinds, rounded, Case("60m", 32, "uniform", compile=True)]


def run(record: Record, options: Options) -> None:
    """Measures the section's steps."""
    # The trainer's flags name configs relative to the checkout.
    os.chdir(HERE.parent)
    device = torch.device(options.device)
    with tiny_config() as config:
        for case in tiny_cases() if options.tiny else cases():
            smaller = ["--model_config", config, *TINY_LAYER] if options.tiny and case.method != "full" else []
            smaller = ["--model_config", config] if options.tiny and not smaller else smaller
            record.step(case.name, lambda c=case, s=smaller: measured(c, device, s, options.tiny))
    record.step("350m loss", lambda: loss_alone(device, *((64, 32, 320) if options.tiny else (16384, 1024, 32000))))


def measured(case: Case, device: torch.device, smaller: list[str], tiny: bool) -> Iterator[dict[str, Any]]:
    """Makes updates of a case and yields the parts of its row. smaller: flags that make it tiny."""
    length = 16 if tiny else LENGTH
    own = argparse.Namespace(
        batch_size=max(1, case.tokens // length),
        max_length=length,
        device=device.type,
        dtype="bfloat16",
        sp_ratio=None,
        compile=case.compile,
        linear_cache="auto",
    )
    argv = [*trainer_flags(case.config, case.method, case.optimizer, own), *case.flags, *smaller]
    args = parse_args(argv)
    # With the device's memory, so that --linear_cache auto chooses as in a user's run.
    plan = make_plan(args, World(), resolve_dtype(args.dtype, device), device.type, device_memory(device, World()))
    free(device)
    try:
        with quick_initial_values(), _quick_compiler(tiny and case.compile):
            parts, update = updater(args, plan, device)
            yield {"arguments": argv, "tokens": case.tokens, "parameters": plan.parameters["total"], "first_seconds": update()}
            update(2)
        yield _timed(update, time_steps(parts, device), case.tokens, 0.0 if tiny else 1.5)
        # Before the profiler, which takes memory too.
        yield {"peak_predicted": predicted_peak(plan, device), **memory_of(device)}
        kernels = kernels_of(update, device)
        yield {"kernels": kernels.count, "busy_seconds": kernels.busy_seconds, "waits": kernels.waits, "top": kernels.top}
        yield {"tensors": len(parts.updates.stepped)}
    finally:
        torch._dynamo.reset()


def _timed(update: Any, stopwatch: Any, tokens: int, seconds: float) -> dict[str, Any]:
    """Times three rounds of as many updates as take `seconds`."""
    count = max(1, min(50, int(seconds / update())))
    stopwatch.take()
    rounds = [update(count) for _ in range(3)]
    median = statistics.median(rounds)
    return {
        "seconds": rounds,
        "updates_per_round": count,
        "tokens_per_second": tokens / median,
        "step_seconds": stopwatch.take() / (3 * count),
    }


def loss_alone(device: torch.device, rows: int, width: int, vocabulary: int) -> dict[str, Any]:
    """Times forward and backward pass of the loss alone."""
    hidden, weight = (
        torch.randn(size, width, device=device, dtype=torch.bfloat16).requires_grad_() for size in (rows, vocabulary)
    )
    labels = torch.randint(vocabulary, (rows,), device=device)

    def step() -> None:
        chunked_cross_entropy(hidden, weight, labels, num_counted=rows).backward()

    seconds = pipelined_seconds(step, device, repeats_for(step, device, 0.3, most=20))
    kernels = kernels_of(step, device)
    return {"seconds": seconds, "kernels": kernels.count, "busy_seconds": kernels.busy_seconds, "rows": rows}


@contextmanager
def tiny_config() -> Iterator[str]:
    """Yields the path of the smallest model's JSON, which is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.json"
        path.write_text(json.dumps(TINY_MODEL), encoding="utf-8")
        load_model_config(str(path))
        yield str(path)


@contextmanager
def _quick_compiler(enabled: bool) -> Iterator[None]:
    """Makes compilation leave out generating code, which takes half a minute for a tiny model."""
    original = nn.Module.compile
    if enabled:
        nn.Module.compile = partial_method(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.compile = original  # type: ignore[method-assign]


def partial_method(compile: Any) -> Any:
    """Returns `compile` with a backend that traces only."""

    def traced(module: nn.Module, *args: Any, **options: Any) -> None:
        partial(compile, module)(*args, **{**options, "backend": "aot_eager"})

    return traced
