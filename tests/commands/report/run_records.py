"""Writes folders of runs as the trainer does, with given figures and without training."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_pretraining.config.arguments import as_dict
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[3]
UPDATES = 10


def write_run(
    folder: Path,
    *flags: str,
    method: str = "sltrain",
    model: str = "llama_60m",
    seed: int = 42,
    lr: float = 0.003,
    perplexity: float | None = 30.0,
    reached: int = UPDATES,
) -> Path:
    """Writes a run of UPDATES updates, `reached` of them made, with a final perplexity if it is given and the run finished."""
    argv = [
        *("--model_config", str(ROOT / "configs" / f"{model}.json"), "--peft_model", method, "--rank", "128"),
        *("--sp_ratio", "0.03", "--batch_size", "8", "--num_training_steps", str(UPDATES), "--warmup_steps", "1"),
        *("--dataset", "demo", "--lr", str(lr), "--seed", str(seed), "--save_dir", str(folder), *flags),
    ]
    args = parse_args(argv)
    plan = make_plan(args, World())
    document = {
        "arguments": as_dict(args),
        "plan": {**asdict(plan), "save_dir": str(folder)},
        "dataset": {"description": "demo (train)", "fingerprint": "f" * 32},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git_commit": "0" * 40,
        "world": {"processes": 1, "threads": 2},
        "machine": {"platform": "Linux", "gpu": None},
    }
    rows: list[dict[str, Any]] = [evaluation(0, 32_000.0)]
    rows += [update(step) for step in range(1, reached + 1)]
    if reached:
        names = ("parameters", "support", "optimizer", "peak")
        rows[1] |= {f"memory_{name}_{side}": plan.bytes[name] for name in names for side in ("predicted", "measured")}
    if perplexity is not None and reached == UPDATES:
        rows.append(evaluation(UPDATES, perplexity))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(document))
    write_rows(folder, rows)
    return folder


def update(step: int) -> dict[str, Any]:
    """Returns the row of an update: 1,000 tokens each, at 500 tokens per second."""
    row = {"update_step": step, "loss": 10.0 - 0.1 * step, "lr": 1e-3, "tokens_seen": 1_000 * step, "gradnorm": 1.0}
    return row | {"max_memory": 2**30 + step, "throughput_tokens": 500.0}


def evaluation(step: int, perplexity: float | None) -> dict[str, Any]:
    """Returns the row of an evaluation."""
    row = {
        "update_step": step,
        "final_eval_loss": 3.0,
        "final_eval_perplexity": perplexity,
        "final_eval_tokens": 20_000,
    }
    return row | {"final_eval_bits_per_byte": 1.5}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the rows of a run's metrics.jsonl."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def change_document(folder: Path, change: Any) -> None:
    """Applies `change` to a run's run.json."""
    document = json.loads((folder / "run.json").read_text())
    change(document)
    (folder / "run.json").write_text(json.dumps(document))
