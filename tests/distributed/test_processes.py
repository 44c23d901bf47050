"""Training in several processes equals training in one, on the same sequences."""

import json
import math
from pathlib import Path

import forked
import pytest

from benchmarks.compare_runs import deviations


def train(folder: Path, processes: int, *flags: str) -> list[dict]:
    argv = ["--save_dir", str(folder), "--wandb", "disabled", *flags]
    code, output = forked.run(argv, folder.with_suffix(".log"), processes=processes)
    assert code == 0, output[-3000:]
    assert "Warning" not in output  # a warning would be printed by each process
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_all(tmp_path: Path, settings: dict[str, tuple[int, list[str]]], common: list[str]) -> list[dict]:
    """Trains in every setting, and compares with the first: losses to 1e-5, gradient norms and parameters to 1e-4."""
    records = [train(tmp_path / name, processes, *common, *flags) for name, (processes, flags) in settings.items()]
    first, *others = settings
    for name, record in zip(others, records[1:], strict=True):
        apart = deviations(tmp_path / first, tmp_path / name)
        tolerances = {"loss": 1e-5, "gradnorm": 1e-4, "final_eval_loss": 1e-5, "parameters": 1e-4}
        assert all(apart[key] <= tolerance for key, tolerance in tolerances.items()), (name, apart)
        for key in ("lr", "tokens_seen", "final_eval_tokens"):
            assert [row.get(key) for row in record] == [row.get(key) for row in records[0]]
    return records[0]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_one_process_equals_two_and_three(tmp_path, tiny_run, layout):
    """Token counts per process are very unequal, so the mean must be over all tokens, not over processes."""
    common = [
        *tiny_run,
        *("--max_length", "48", "--total_batch_size", "12", "--data_lanes", "6"),
        *("--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--optimizer", "adamw"),
        *("--lr", "0.001", "--warmup_steps", "2", "--num_training_steps", "8", "--grad_clipping", "0.5"),
        *("--eval_every", "4", "--dtype", "float32", "--device", "cpu"),
    ]
    common += ["--packing", "--support", "block"] if layout == "packed" else []
    settings = {
        "one": (1, ["--batch_size", "12", "--workers", "0"]),
        "one-accumulating": (1, ["--batch_size", "3", "--workers", "2"]),
        "two": (2, ["--batch_size", "6", "--workers", "1", "--linear_cache", "weights", "--linear_path", "materialised"]),
        "three-accumulating": (3, ["--batch_size", "2", "--workers", "0"]),
    }
    run_all(tmp_path, settings, common)


@pytest.mark.parametrize(
    ("optimizer", "method"),
    [
        ("adamw", ["sltrain"]),
        ("adam8bit", ["sltrain"]),
        ("spectron8bit", ["sltrain", "--weight_dtype", "int8"]),
        ("galore_adamw", ["galore", "--update_proj_gap", "3"]),
    ],
)
def test_ddp_per_layer_updates_are_bit_identical_to_whole_ones(tmp_path, tiny_run, optimizer, method):
    """Bit-identical to whole updates, in one process and in two, also when resumed in the middle."""
    common = [
        *tiny_run,
        *("--max_length", "48", "--total_batch_size", "8", "--data_lanes", "6", "--batch_size", "2", "--workers", "0"),
        *("--peft_model", *method, "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--optimizer", optimizer),
        *(
            "--lr",
            "0.001",
            "--warmup_steps",
            "2",
            "--num_training_steps",
            "4",
            "--save_every",
            "2",
            "--eval_every",
            "4",
        ),
        *("--dtype", "float32", "--device", "cpu"),
    ]
    for processes in (1, 2):
        whole, layered, resumed = (tmp_path / f"{kind}-{processes}" for kind in ("whole", "layered", "resumed"))
        train(whole, processes, *common)
        train(layered, processes, *common, "--per_layer")
        train(resumed, processes, *common, "--per_layer", "--continue_from", str(layered / "step_00000002"))
        exact = {"loss": 0.0, "gradnorm": 0.0, "final_eval_loss": 0.0, "parameters": 0.0}
        assert deviations(whole, layered) == exact
        assert deviations(layered, resumed) == exact


@pytest.mark.full
def test_one_and_two_processes_train_equally_on_real_text(tmp_path, c4_sample, t5_model):
    """60 updates of llama_9m on real C4 text with the real T5 tokenizer."""
    common = [
        *("--model_config", "configs/llama_9m.json", "--tokenizer", str(t5_model), "--dataset", str(c4_sample)),
        *("--peft_model", "sltrain", "--rank", "32", "--lora_alpha", "8", "--sp_ratio", "0.03", "--optimizer", "adamw"),
        *("--lr", "0.001", "--warmup_steps", "6", "--num_training_steps", "60", "--total_batch_size", "16"),
        *("--dtype", "float32", "--device", "cpu", "--data_lanes", "24"),
    ]
    settings = {
        "one-16": (1, ["--batch_size", "16"]),
        "one-2x8": (1, ["--batch_size", "8"]),
        "two-8": (2, ["--batch_size", "8"]),
        "two-2x4": (2, ["--batch_size", "4"]),
    }
    losses = [row["loss"] for row in run_all(tmp_path, settings, common) if "loss" in row]
    assert math.isclose(losses[0], math.log(32000), rel_tol=0.02)
    assert losses[-1] < losses[0] - 2
