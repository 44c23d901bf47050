"""Runs with --parallel fsdp equal those of one process and of ddp, also when resumed with other numbers of processes."""

import itertools
import json
from pathlib import Path

import forked
import pytest
import torch
from outcomes import tensors_of
from tiny_model import TINY_MODEL

from benchmarks.compare_runs import deviations

ROUNDING = {"loss": 1e-5, "gradnorm": 1e-4, "final_eval_loss": 1e-5, "parameters": 1e-4}
EXACT = dict.fromkeys(ROUNDING, 0.0)


@pytest.fixture
def flags(tiny_run) -> list[str]:
    return [
        *tiny_run,
        *("--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--lr", "0.001", "--warmup_steps", "2"),
        *(
            "--max_length",
            "48",
            "--total_batch_size",
            "12",
            "--data_lanes",
            "12",
            "--workers",
            "0",
            "--eval_every",
            "4",
        ),
        *("--wandb", "disabled", "--device", "cpu", "--dtype", "float32", "--timeout_s", "60"),
    ]


def train(folder: Path, processes: int, flags: list[str], *more: str) -> str:
    argv = [*flags, "--save_dir", str(folder), *more]
    code, output = forked.run(argv, folder.with_suffix(".log"), processes=processes)
    assert code == 0, output
    assert "Warning" not in output
    return output


def first_row(folder: Path) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def assert_same_tensors(first: Path, second: Path) -> None:
    expected, found = tensors_of(first), tensors_of(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def assert_same(first: Path, second: Path, tolerances: dict[str, float]) -> None:
    apart = deviations(first, second)
    assert all(apart[key] <= tolerance for key, tolerance in tolerances.items()), (second.name, apart)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (first, second)]
    for key in ("lr", "tokens_seen", "final_eval_tokens"):
        assert [row.get(key) for row in rows[0]] == [row.get(key) for row in rows[1]]


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.full), "sltrain"])
def test_one_process_ddp_and_fsdp_train_equally(tmp_path, flags, method):
    """With padded micro-batches of very unequal token counts, with and without accumulation."""
    flags += ["--peft_model", method, "--optimizer", "adamw", "--num_training_steps", "20", "--grad_clipping", "0.5"]
    train(tmp_path / "one", 1, flags, "--batch_size", "3")
    settings = {
        "ddp-two": (2, ["--batch_size", "3"]),
        "fsdp-two": (2, ["--batch_size", "3", "--parallel", "fsdp"]),
        "fsdp-three-gathered": (3, ["--batch_size", "2", "--parallel", "fsdp", "--reshard_after_forward", "false"]),
        "ddp-four": (4, ["--batch_size", "3"]),
        "fsdp-four": (4, ["--batch_size", "3", "--parallel", "fsdp", "--activation_checkpointing"]),
    }
    for name, (processes, more) in settings.items():
        train(tmp_path / name, processes, flags, *more)
        assert_same(tmp_path / "one", tmp_path / name, ROUNDING)
        held = [first_row(tmp_path / run)["memory_parameters_measured"] for run in ("one", name)]
        assert held[1] == pytest.approx(held[0] / (processes if "fsdp" in name else 1), rel=0.05)


def test_gradient_norms_of_large_tensors_are_those_of_ddp(tmp_path, flags):
    """With 2 million elements in embedding and head each: the norm of the parts together is the norm of the whole."""
    wide = TINY_MODEL | {"vocab_size": 32_000, "hidden_size": 64}
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    flags += ["--model_config", str(tmp_path / "wide.json"), "--peft_model", "sltrain", "--optimizer", "adamw"]
    flags += ["--num_training_steps", "4", "--grad_clipping", "0.5", "--batch_size", "6"]
    for kind in ("ddp", "fsdp"):
        train(tmp_path / kind, 2, flags, "--parallel", kind)
    apart = deviations(tmp_path / "ddp", tmp_path / "fsdp")
    assert apart["gradnorm"] <= 2e-6
    assert apart["loss"] <= 1e-6


def test_document_masks_work_in_several_processes(tmp_path, flags):
    """In one process, ddp and fsdp; layers recomputed in the backward pass use the same masks."""
    flags += ["--peft_model", "sltrain", "--optimizer", "adamw", "--num_training_steps", "6", "--packing"]
    train(tmp_path / "unmasked", 1, flags, "--batch_size", "6")
    flags += ["--document_mask"]
    train(tmp_path / "one", 1, flags, "--batch_size", "6")
    settings = {"ddp-two": [], "fsdp-two": ["--parallel", "fsdp", "--activation_checkpointing", "selective"]}
    for name, more in settings.items():
        train(tmp_path / name, 2, flags, "--batch_size", "3", *more)
        assert_same(tmp_path / "one", tmp_path / name, ROUNDING)
    assert deviations(tmp_path / "one", tmp_path / "unmasked")["loss"] > ROUNDING["loss"]


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.full), "adamw-rounded", "adam8bit", "adamw4bit"])
def test_fsdp_per_layer_updates_and_resuming_are_bit_identical(tmp_path, flags, optimizer):
    """Per-layer updates are bit-identical to whole ones, also when resumed in the middle by as many processes."""
    rounding = ["--dtype", "bfloat16", "--stochastic_rounding"] if optimizer == "adamw-rounded" else []
    flags += ["--peft_model", "sltrain", "--train_scaling", "--optimizer", optimizer.split("-")[0], *rounding]
    flags += ["--num_training_steps", "6", "--support", "block" if optimizer == "adamw" else "uniform"]
    flags += ["--parallel", "fsdp", "--batch_size", "3", "--save_every", "3"]
    flags += ["--embedding_states", "8bit"] if "bit" in optimizer else []  # nothing else is large enough to be quantised
    train(tmp_path / "whole", 2, flags)
    train(tmp_path / "layered", 2, flags, "--per_layer")
    assert_same(tmp_path / "whole", tmp_path / "layered", EXACT)
    for kind, more in (("whole", []), ("layered", ["--per_layer", "--async_save", "--linear_cache", "positions"])):
        output = train(tmp_path / f"{kind}-resumed", 2, flags, *more, "--continue_from", str(tmp_path / kind / "step_00000003"))
        assert "quantised again" not in output
        assert_same(tmp_path / kind, tmp_path / f"{kind}-resumed", EXACT)
        assert_same_tensors(tmp_path / kind, tmp_path / f"{kind}-resumed")


CHAINS = {
    "ddp2-fsdp2-one": [(2, "ddp"), (2, "fsdp"), (1, "ddp")],
    "fsdp2-fsdp4-one": [(2, "fsdp"), (4, "fsdp"), (1, "ddp")],
    "one-fsdp3-ddp2": [(1, "ddp"), (3, "fsdp"), (2, "ddp")],
}
CROSSINGS = list(itertools.product(("adamw", "adam8bit"), CHAINS))
COVER = [("adamw", "fsdp2-fsdp4-one"), ("adam8bit", "ddp2-fsdp2-one")]


@pytest.mark.parametrize(
    ("optimizer", "chain"),
    [*COVER, *(pytest.param(*case, marks=pytest.mark.full) for case in CROSSINGS if case not in COVER)],
)
def test_checkpoints_are_resumed_by_other_kinds_and_numbers_of_processes(tmp_path, flags, optimizer, chain):
    """Between ddp and fsdp and numbers of processes: equal except for the order of sums, and for 8-bit moments' rounding."""
    flags += ["--peft_model", "sltrain", "--optimizer", optimizer, "--num_training_steps", "9", "--save_every", "3"]
    # Only embedding and head have the 4,096 elements from which moments are quantised; shards of two processes do, of four not.
    flags += ["--batch_size", "1", *(["--embedding_states", "8bit"] if optimizer == "adam8bit" else [])]
    train(tmp_path / "undisturbed", 1, flags)
    before: Path | None = None
    for number, (processes, kind) in enumerate(CHAINS[chain]):
        here = tmp_path / str(number)
        goes_on = ["--continue_from", str(before / f"step_{3 * number:08d}")] if before else []
        output = train(here, processes, flags, "--parallel", kind, *goes_on)
        assert ("quantised again" in output) == (optimizer == "adam8bit" and before is not None)
        before = here
    tolerances = ROUNDING if optimizer == "adamw" else {"loss": 1e-3, "gradnorm": 1e-3, "parameters": 5e-3}
    assert_same(tmp_path / "undisturbed", before, tolerances)


def test_an_optimizer_that_cannot_be_sharded_is_refused(tmp_path, flags):
    flags += ["--save_dir", str(tmp_path / "run"), "--batch_size", "3", "--parallel", "fsdp"]
    code, output = forked.run([*flags, "--optimizer", "adafactor"], tmp_path / "log", processes=2)
    assert code == 2
    assert "adafactor" in output
    assert not (tmp_path / "run").exists()


def test_reduce_dtype_and_compute_dtype_take_effect(tmp_path, flags):
    """bfloat16 gradients summed in float32, and float32 parameters gathered in bfloat16, stay close to their reference runs."""
    flags += ["--peft_model", "sltrain", "--optimizer", "adamw", "--num_training_steps", "6", "--batch_size", "3"]
    settings = {
        "float32": [],
        "ddp-summed-wide": ["--dtype", "bfloat16", "--reduce_dtype", "float32"],
        "ddp-summed-wide-per-layer": ["--dtype", "bfloat16", "--reduce_dtype", "float32", "--per_layer"],
        "fsdp-summed-wide": ["--dtype", "bfloat16", "--reduce_dtype", "float32", "--parallel", "fsdp"],
        "fsdp-computed-narrow": ["--compute_dtype", "bfloat16", "--parallel", "fsdp"],
    }
    for name, more in settings.items():
        train(tmp_path / name, 2, flags, *more)
    assert_same(tmp_path / "ddp-summed-wide", tmp_path / "ddp-summed-wide-per-layer", EXACT)
    # FSDP2 also accumulates the micro-batches' gradients in that dtype.
    assert_same(tmp_path / "ddp-summed-wide", tmp_path / "fsdp-summed-wide", {"loss": 1e-4, "parameters": 1e-2})
    # A sum of two numbers is rounded once in either dtype, so only three processes show a difference.
    for name, more in (("bfloat16", ["--dtype", "bfloat16"]), ("ddp-summed-wide", settings["ddp-summed-wide"])):
        train(tmp_path / f"{name}-three", 3, flags, *more, "--batch_size", "2")
    assert deviations(tmp_path / "ddp-summed-wide-three", tmp_path / "bfloat16-three")["parameters"] > 0
    narrow = deviations(tmp_path / "float32", tmp_path / "fsdp-computed-narrow")
    assert 0 < narrow["loss"] < 1e-2
    # Relative distance of a tensor: a few roundings of bfloat16 (2^-8 each); SSE4.1 kernels gave 0.0102, AVX-512 ones below 0.01.
    assert narrow["parameters"] < 4 * 2**-8
    tensors = tensors_of(tmp_path / "fsdp-computed-narrow")
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("lora_A")} == {torch.float32}


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_layers_train_equally_in_two_processes(tmp_path, flags, parallel):
    flags += ["--peft_model", "sltrain", "--optimizer", "adamw", "--num_training_steps", "3", "--batch_size", "3"]
    train(tmp_path / "eager", 2, flags, "--parallel", parallel)
    train(tmp_path / "compiled", 2, flags, "--parallel", parallel, "--compile")
    assert_same(tmp_path / "eager", tmp_path / "compiled", {"loss": 1e-4, "gradnorm": 1e-3, "parameters": 1e-3})
