"""Runs with merges, restarts and optimizers that step whole matrices are equal in one process and in two."""

import json
import os
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from torch import nn

from benchmarks.compare_runs import deviations
from peft_pretraining.config.arguments import Arguments
from peft_pretraining.distributed.world import World, process_group
from peft_pretraining.export.load import load_model
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.updates import WholeUpdate
from peft_pretraining.training import restarts
from sparse_lora import attach_relora, merge

RELORA = ["--peft_model", "relora", "--relora", "2", "--restart_warmup_steps", "1"]
SLTRAIN = ["--peft_model", "sltrain", "--restart_every", "2", "--rebalance"]
PLAIN = ["--peft_model", "sltrain"]
TOLERANCES = {"loss": 1e-5, "gradnorm": 1e-4, "final_eval_loss": 1e-5}


@pytest.fixture
def common(tiny_run) -> list[str]:
    return [
        *tiny_run,
        *("--max_length", "48", "--total_batch_size", "8", "--data_lanes", "6", "--workers", "0"),
        *("--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--optimizer", "adamw", "--lr", "0.001"),
        *("--warmup_steps", "0", "--num_training_steps", "6", "--save_every", "3", "--eval_every", "6"),
        *("--dtype", "float32", "--device", "cpu", "--wandb", "disabled"),
    ]


def train(folder: Path, processes: int, *flags: str) -> None:
    argv = ["--save_dir", str(folder), *flags]
    code, output = forked.run(argv, folder.with_suffix(".log"), processes=processes)
    assert code == 0, output[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["update_step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    account = next(row for row in rows if "memory_parameters_measured" in row)
    for name in ("parameters", "optimizer"):
        assert account[f"memory_{name}_measured"] == account[f"memory_{name}_predicted"]


def assert_near(one: Path, other: Path) -> None:
    """Compares losses, norms and merged weights. B and A themselves may differ: signs of singular vectors are arbitrary, and just
    after a merge Adam turns rounding errors in gradients into full-size steps."""
    apart = deviations(one, other)
    assert all(apart[key] <= tolerance for key, tolerance in TOLERANCES.items()), apart
    models = [load_model(folder, torch.device("cpu"))[0] for folder in (one, other)]
    assert all(len(merge(model)) == 14 for model in models)
    expected, found = (dict(model.named_parameters()) for model in models)
    for name in expected:
        distance = float((expected[name] - found[name]).detach().norm() / expected[name].detach().norm())
        assert distance < 1e-4, name


@pytest.mark.parametrize(
    ("parallel", "method"),
    [
        pytest.param("ddp", RELORA, marks=pytest.mark.full),
        ("ddp", [*RELORA, "--optimizer_magnitude_pruning", "0.9", "--per_layer"]),
        ("ddp", [*SLTRAIN, "--init", "svd"]),
        ("ddp", [*SLTRAIN, "--weight_dtype", "int8"]),
        pytest.param("fsdp", RELORA, marks=pytest.mark.full),
        # Layers are still gathered by the evaluation just before each merge.
        ("fsdp", [*RELORA, "--reshard_after_forward", "false", "--eval_every", "2", "--eval_tokens", "200"]),
        ("fsdp", [*RELORA, "--optimizer_magnitude_pruning", "0.9", "--train_scaling"]),
        pytest.param("fsdp", [*RELORA, "--optimizer_random_pruning", "0.5", "--per_layer"], marks=pytest.mark.full),
        ("fsdp", [*SLTRAIN, "--init", "svd", "--per_layer"]),
        ("fsdp", [*SLTRAIN, "--peft_model", "lowrank", "--train_scaling"]),
        ("ddp", [*PLAIN, "--optimizer", "muon"]),
        ("ddp", [*PLAIN, "--optimizer", "spectron8bit_per_layer"]),
        ("ddp", [*PLAIN, "--optimizer", "stable_spam_per_layer", "--reset_moments_every", "4"]),
        ("ddp", [*PLAIN, "--optimizer", "muon_per_layer", "--condition_gradients", "--reset_moments_every", "4"]),
        pytest.param("ddp", [*PLAIN, "--optimizer", "spectron8bit", "--condition_gradients"], marks=pytest.mark.full),
        *(
            pytest.param("ddp", [*PLAIN, "--optimizer", name], marks=pytest.mark.full)
            for name in (
                "muon_per_layer",
                "muon8bit",
                "muon8bit_per_layer",
                "spectron",
                "spectron_per_layer",
                "spectron8bit",
                "stable_spam",
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(word.strip("-") for word in value[1::2]),
)
def test_two_processes_restart_as_one_does(tmp_path, common, parallel, method):
    """A run of two processes that is resumed in the middle of a cycle is bit-identical."""
    train(tmp_path / "one", 1, *common, "--batch_size", "8", *method)
    two = [*common, "--batch_size", "4", "--parallel", parallel, *method]
    train(tmp_path / "two", 2, *two)
    assert_near(tmp_path / "one", tmp_path / "two")
    train(tmp_path / "resumed", 2, *two, "--continue_from", str(tmp_path / "two" / "step_00000003"))
    assert set(deviations(tmp_path / "two", tmp_path / "resumed").values()) == {0.0}


def test_fsdp_accumulates_gradients_of_a_partly_frozen_model(tmp_path, common):
    """FSDP2 accumulates gradients over micro-batches although some parameters of a layer have none."""
    train(tmp_path / "one", 1, *common, "--batch_size", "8", *RELORA)
    train(tmp_path / "two", 2, *common, "--batch_size", "2", "--parallel", "fsdp", *RELORA)
    assert_near(tmp_path / "one", tmp_path / "two")


def add_product_as_elsewhere_(add_product_, layer, noise=None) -> None:
    """Merges with another rounding, as another machine's library may."""
    add_product_(layer, noise)
    layer.weight.mul_(1 + 2**-20)


def merging(rank: int, port: int, results: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    world = World(rank, 2, rank, 2)
    if rank == 1:
        restarts.add_product_ = partial(add_product_as_elsewhere_, restarts.add_product_)
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.Linear(12, 20)})
    attach_relora(model, rank=4)
    nn.init.normal_(model["mlp"].lora_B)
    start = model["mlp"].weight.clone()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    updates = WholeUpdate(partial(build_optimizer, "adamw", lr=0.0, weight_decay=0.0), trained, world)
    with process_group(world, torch.device("cpu"), 60.0):
        restarts.Restarts(Arguments(peft_model="relora", relora=1), model, updates, world).before_update(1)
    assert not torch.equal(start, model["mlp"].weight)
    torch.save(model["mlp"].weight, results / f"{rank}.pt")


def test_weights_stay_equal_if_machines_round_a_merge_differently(tmp_path):
    """No later step would make frozen weights equal again."""
    port = forked.free_port()
    processes = [forked.SERVER.Process(target=merging, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
