"""Tiny runs of every method: 8 updates, which take a second or two."""

from pathlib import Path

METHODS = {
    "full": ["--peft_model", "full"],
    "full_bf16": ["--peft_model", "full", "--dtype", "bfloat16", "--stochastic_rounding"],
    "full_packed": ["--peft_model", "full", "--packing", "--document_mask"],
    "galore": ["--peft_model", "galore", "--rank", "8"],
    "lowrank": ["--peft_model", "lowrank", "--rank", "8", "--lora_alpha", "2"],
    "relora": ["--peft_model", "relora", "--rank", "8", "--lora_alpha", "2", "--relora", "4"],
    "sltrain": ["--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1"],
    "sltrain_scaled": ["--peft_model", "sltrain", "--rank", "8", "--sp_ratio", "0.1", "--train_scaling"],
    "sltrain_block": ["--peft_model", "sltrain", "--rank", "8", "--sp_ratio", "0.1", "--support", "block"],
    "sltrain_bf16": ["--peft_model", "sltrain", "--rank", "8", "--sp_ratio", "0.1", "--dtype", "bfloat16"],
    "sltrain_packed": ["--peft_model", "sltrain", "--rank", "8", "--sp_ratio", "0.1", "--packing"],
}


def train(name: str, tiny_run: list[str], folder: Path) -> Path:
    """Train the run METHODS[name] in this process; its folder."""
    import torchrun_main

    flags = [
        *("--dtype", "float32", *tiny_run, "--optimizer", "adamw", "--lr", "0.01", "--warmup_steps", "2"),
        *("--num_training_steps", "8", "--batch_size", "8", "--max_length", "64", "--eval_every", "8"),
        *("--save_every", "8", "--wandb", "disabled", "--device", "cpu", "--workers", "0"),
    ]
    assert torchrun_main.main([*flags, *METHODS[name], "--save_dir", str(folder)]) == 0
    return folder
