"""Writes tiny inputs and trains tiny runs of every method; 8 updates take one or two seconds."""

import json
from pathlib import Path

from tiny_model import TINY_MODEL

TEXT = "Fox {} jumps over dog {} in month {}. "

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
    "sltrain_int8": [
        *("--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--weight_dtype", "int8")
    ],
    "sltrain_packed": ["--peft_model", "sltrain", "--rank", "8", "--sp_ratio", "0.1", "--packing"],
}


def write_corpus(folder: Path) -> list[str]:
    """Writes 120 training documents of very unequal lengths in 3 shards, and 12 held-out ones; returns the training texts."""
    documents = ["".join(TEXT.format(number, number * 7 % 101, line) for line in range(1 + number % 5)) for number in range(132)]
    for shard in range(3):
        lines = [json.dumps({"text": text}) for text in documents[shard:120:3]]
        (folder / f"words-train.{shard}.jsonl").write_text("\n".join(lines) + "\n")
    held_out = "\n".join(json.dumps({"text": text}) for text in documents[120:])
    (folder / "words-validation.jsonl").write_text(held_out + "\n")
    return documents[:120]


def write_inputs(folder: Path) -> list[str]:
    """Writes a model's JSON, a corpus and a tokenizer trained on it; returns the flags that name them."""
    import sentencepiece

    (folder / "corpus").mkdir()
    texts = write_corpus(folder / "corpus")
    (folder / "tiny.json").write_text(json.dumps(TINY_MODEL))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tiny"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return [
        *("--model_config", str(folder / "tiny.json"), "--tokenizer", str(folder / "tiny.model")),
        *("--dataset", str(folder / "corpus")),
    ]


def flags_of(name: str, tiny_run: list[str]) -> list[str]:
    """Returns the command line of the run METHODS[name], without its folder."""
    return [
        *("--dtype", "float32", *tiny_run, "--optimizer", "adamw", "--lr", "0.01", "--warmup_steps", "2"),
        *("--num_training_steps", "8", "--batch_size", "8", "--max_length", "64", "--eval_every", "8"),
        *("--save_every", "8", "--wandb", "disabled", "--device", "cpu", "--workers", "0"),
        *METHODS[name],
    ]


def train(name: str, tiny_run: list[str], folder: Path) -> Path:
    """Trains the run METHODS[name] in this process; returns its folder."""
    import torchrun_main

    assert torchrun_main.main([*flags_of(name, tiny_run), "--save_dir", str(folder)]) == 0
    return folder
