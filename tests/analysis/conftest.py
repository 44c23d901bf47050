"""Checkpoints of tiny runs, trained once a session where a test asks for them."""

from collections.abc import Callable
from pathlib import Path

import pytest

import torchrun_main

METHODS = {
    "full": ["--peft_model", "full"],
    "full_bf16": ["--peft_model", "full", "--dtype", "bfloat16", "--stochastic_rounding"],
    "full_packed": ["--peft_model", "full", "--packing", "--document_mask"],
    "galore": ["--peft_model", "galore", "--rank", "8"],
    "lowrank": ["--peft_model", "lowrank", "--rank", "8", "--lora_alpha", "2"],
    "sltrain": ["--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1"],
    "sltrain_scaled": ["--peft_model", "sltrain", "--rank", "8", "--sp_ratio", "0.1", "--train_scaling"],
    "sltrain_block": ["--peft_model", "sltrain", "--rank", "8", "--sp_ratio", "0.1", "--support", "block"],
}


@pytest.fixture(scope="session")
def trained(tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of 8 updates, by its name in METHODS."""
    runs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name) / "run"
            flags = [
                *("--dtype", "float32", *tiny_run, "--optimizer", "adamw", "--lr", "0.01", "--warmup_steps", "2"),
                *("--num_training_steps", "8", "--batch_size", "8", "--max_length", "64", "--eval_every", "8"),
                *("--save_every", "8", "--wandb", "disabled", "--device", "cpu", "--workers", "0"),
            ]
            assert torchrun_main.main([*flags, *METHODS[name], "--save_dir", str(folder)]) == 0
            runs[name] = folder
        return runs[name]

    return run
