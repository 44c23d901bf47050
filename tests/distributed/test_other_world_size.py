"""A run resumed with other numbers of processes and workers has the same documents, order and losses."""

import json
from pathlib import Path

import forked
import pytest

SHARDS = 3  # of the tiny corpus, 40 documents in each


@pytest.fixture
def flags(tiny_run) -> list[str]:
    return [
        *tiny_run,
        *("--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--optimizer", "adamw"),
        *("--lr", "0.003", "--warmup_steps", "2", "--batch_size", "1", "--max_length", "64", "--eval_every", "100"),
        *("--wandb", "disabled", "--device", "cpu", "--dtype", "float32"),
    ]


def train(folder: Path, processes: int, argv: list[str]) -> tuple[list[str], list[dict]]:
    """Trains; returns the run's sequences in the order of their positions, and the rows of metrics.jsonl."""
    folder.mkdir()
    code, output = forked.run([*argv, "--save_dir", str(folder)], folder / "log", processes=processes, sequences=folder)
    assert code == 0, output
    ranks = [(folder / f"{rank}.txt").read_text().splitlines() for rank in range(processes)]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for turn in zip(*ranks, strict=True) for line in turn], rows


def first_documents(corpus: Path, folder: Path, each: int) -> Path:
    """Copies the corpus with only `each` documents per shard, so that its lanes are equally long."""
    (folder / "corpus").mkdir()
    for shard in corpus.iterdir():
        lines = shard.read_text().splitlines(keepends=True)
        (folder / "corpus" / shard.name).write_text("".join(lines[:each]))
    return folder / "corpus"


@pytest.mark.parametrize(
    ("lanes", "batch", "updates", "stages"),
    [
        ("20", 8, 15, [(1, "2"), (2, "1"), (1, "0")]),  # processes, workers of each
        ("4", 8, 15, [(2, "0"), (4, "1")]),
        ("12", 12, 9, [(4, "1"), (3, "0"), (2, "2")]),
        pytest.param("8", 8, 15, [(4, "1"), (1, "3"), (2, "2")], marks=pytest.mark.full),
    ],
    ids=lambda value: "-".join(str(processes) for processes, _ in value) if isinstance(value, list) else value,
)
def test_other_process_counts_keep_the_order_of_documents(tmp_path, flags, lanes, batch, updates, stages):
    """Over one epoch, with another number of processes and workers after each checkpoint."""
    stage = updates // len(stages)
    corpus = first_documents(Path(flags[flags.index("--dataset") + 1]), tmp_path, updates * batch // SHARDS)
    flags += ["--dataset", str(corpus)]
    flags += ["--data_lanes", lanes, "--total_batch_size", str(batch), "--num_training_steps", str(updates)]
    flags += ["--save_every", str(stage)]
    expected, whole = train(tmp_path / "whole", 1, [*flags, "--workers", "0"])
    assert len(set(expected)) == len(expected) == updates * batch  # all documents
    sequences: list[str] = []
    for number, (processes, workers) in enumerate(stages):
        last = number == len(stages) - 1
        goes_on = ["--continue_from", str(tmp_path / str(number - 1) / f"step_{number * stage:08d}")] if number else []
        saving = ["--async_save"] if number % 2 == 0 else []
        found, rows = train(tmp_path / str(number), processes, [*flags, *goes_on, *saving, "--workers", workers])
        sequences += found if last else found[: stage * batch]
    assert sequences == expected
    for key in ("update_step", "lr", "tokens_seen", "final_eval_tokens"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in whole]
    for key in ("loss", "final_eval_loss"):
        values = [[row[key] for row in record if key in row] for record in (rows, whole)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
