"""Two processes with GaLore keep equal parameters, even if their SVDs differ."""

import itertools
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import SERVER, free_port
from torch import nn

from peft_pretraining.distributed.parallel import average_
from peft_pretraining.distributed.world import World, process_group
from peft_pretraining.optim.build import build_galore
from peft_pretraining.optim.galore import Subspace
from peft_pretraining.optim.updates import PerLayerUpdate, WholeUpdate

CPU = torch.device("cpu")


def with_other_signs(svd, calls, matrix, full_matrices):
    """Returns an SVD with other signs, as another machine's library may: a correct one, but another basis for the moments.

    The signs change in every second update only, since constant signs would have no effect.
    """
    left, values, right = svd(matrix, full_matrices=full_matrices)
    sign = 1 - 2 * (next(calls) // 2 % 2)
    return sign * left, values, sign * right


def trained(world: World, per_layer: bool) -> list[torch.Tensor]:
    """Returns the parameters after updates with two projections; each process has its own data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))
    build = partial(
        build_galore,
        "adamw",
        matrices=("0.weight", "2.weight"),
        subspace=Subspace(3, gap=2),
        world=world,
        lr=0.01,
        weight_decay=0.0,
    )
    updates = (PerLayerUpdate if per_layer else WholeUpdate)(build, dict(model.named_parameters()), world)
    for number in range(4):
        updates.begin(0.01)
        updates.before_backward(True)
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2 * number + world.rank))
        model(x).square().sum().backward()
        if not per_layer:  # as DistributedDataParallel does
            for parameter in model.parameters():
                average_(parameter.grad, world)
        updates.finish(torch.zeros(()))
    return [parameter.detach() for parameter in model.parameters()]


def in_both(rank: int, port: int, results: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    world = World(rank, 2, rank, 2)
    if rank == 1:
        torch.linalg.svd = partial(with_other_signs, torch.linalg.svd, itertools.count())
    with process_group(world, CPU, 60.0):
        found = {per_layer: trained(world, per_layer) for per_layer in (False, True)}
    torch.save(found, results / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    folder, port = tmp_path_factory.mktemp("galore"), free_port()
    processes = [SERVER.Process(target=in_both, args=(rank, port, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("per_layer", [False, True])
def test_all_processes_use_the_first_ones_projection(two_processes, per_layer):
    first, second = two_processes
    assert all(map(torch.equal, first[per_layer], second[per_layer]))


def test_per_layer_updates_are_bit_identical_to_whole_ones(two_processes):
    for found in two_processes:
        assert all(map(torch.equal, found[False], found[True]))
