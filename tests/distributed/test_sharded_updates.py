"""Updates of parameters that FSDP2 shards over two processes: whole, and per layer in the backward pass."""

import itertools
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import SERVER, free_port
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from peft_pretraining.distributed.world import World, process_group
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.updates import GrowthLimit, PerLayerUpdate, WholeUpdate
from peft_pretraining.training.update import train_step
from sparse_lora import SparseLowRankLinear

CPU = torch.device("cpu")
OPTIMIZERS = ["adam", "adamw", "sgd", "adafactor", "adam8bit", "adamw4bit"]
NUM_UPDATES, WIDTH = 3, 64


def aligned() -> nn.Module:
    """Returns a network with shards of complete quantisation blocks, the last of which is empty in process 1."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 1, bias=False))


def odd() -> nn.Module:
    """Returns a network with shard boundaries inside blocks, small shards of large tensors, and values of odd length."""
    torch.manual_seed(0)
    sparse = SparseLowRankLinear(WIDTH, 151, rank=7, sparsity=0.61, alpha=8.0, seed=3)
    assert sparse.sparse_value.numel() % 2 == 1
    return nn.Sequential(sparse, nn.Tanh(), nn.Linear(151, 33), nn.Tanh(), nn.Linear(33, 1))


def updates_of(model, optimizer, world, per_layer, growth=None, grad_clipping=None):
    parameters = dict(model.named_parameters())
    build = partial(build_optimizer, optimizer, lr=0.0, weight_decay=0.01, beta1=0.9)
    limit = None if growth is None else GrowthLimit(growth, len(parameters), CPU)
    if per_layer:
        return PerLayerUpdate(build, parameters, world, growth=limit)
    return WholeUpdate(build, parameters, world, growth=limit, grad_clipping=grad_clipping)


def micro_batch(update: int, number: int, rank: int) -> torch.Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(100 * update + 10 * number + rank))


def loss_of(model: nn.Module, update: int, number: int, rank: int) -> torch.Tensor:
    return (model(micro_batch(update, number, rank)) * (1 + update)).square().sum()


def sharded_run(network, optimizer, world, accumulation, **options) -> tuple[list[float], list[torch.Tensor]]:
    """Trains a sharded network; returns gradient norms and the unsharded final parameters."""
    model = network()
    for layer in [module for module in model if list(module.parameters())]:
        fully_shard(layer)
    fully_shard(model)
    updates = updates_of(model, optimizer, world, **options)
    norms = []
    for update in range(NUM_UPDATES):
        updates.begin(lr=0.01 * (update + 1))
        for number in range(accumulation):
            last = number == accumulation - 1
            model.set_requires_gradient_sync(last)
            updates.before_backward(last)
            loss_of(model, update, number, world.rank).backward()
        assert options["per_layer"] == all(parameter.grad is None for parameter in model.parameters())
        norms.append(float(updates.finish(torch.zeros(())).gradnorm))
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    return norms, [parameter.full_tensor().detach() for parameter in parameters]


def averaged_run(network, optimizer, accumulation, **options) -> tuple[list[float], list[torch.Tensor]]:
    """Trains the same way in one process without sharding, with the mean of both processes' gradients."""
    model = network()
    updates = updates_of(model, optimizer, World(), per_layer=False, **options)
    parameters, norms = list(model.parameters()), []
    for update in range(NUM_UPDATES):
        updates.begin(lr=0.01 * (update + 1))
        gradients = []
        for rank in range(2):
            for number in range(accumulation):
                loss_of(model, update, number, rank).backward()
            gradients.append([parameter.grad for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None
        for parameter, first, second in zip(parameters, *gradients, strict=True):
            parameter.grad = (first + second) / 2
        norms.append(float(updates.finish(torch.zeros(())).gradnorm))
    return norms, [parameter.detach() for parameter in parameters]


def one_bad_gradient(optimizer: str, world: World, per_layer: bool) -> tuple[int, list[bool]]:
    """Makes an update in which process 1's part of a gradient is non-finite; returns tensors skipped, and which changed."""
    model = aligned()
    fully_shard(model)
    updates = updates_of(model, optimizer, world, per_layer=per_layer)
    before = [parameter.full_tensor().detach().clone() for parameter in model.parameters()]
    updates.begin(lr=0.01)
    updates.before_backward(last=True)
    (loss_of(model, 0, 0, world.rank) + model[2].weight[40, 0] * (torch.nan if world.rank else 0.0)).backward()
    skipped = int(updates.finish(torch.zeros(())).skipped)
    return skipped, [not torch.equal(a, b.full_tensor()) for a, b in zip(before, model.parameters(), strict=True)]


@dataclass
class Numbers:
    """A micro-batch for `train_step`, with the factor of its loss as labels."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    num_tokens: int = 1
    num_targets: int = 1
    num_bad_records: int = 0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = odd()

    def forward(self, x: torch.Tensor, factor: torch.Tensor, num_targets: int) -> torch.Tensor:
        return (self.network(x) * factor).square().sum()


def stepped_through(optimizer: str, world: World, per_layer: bool, poisoned: list[bool]) -> list[torch.Tensor]:
    """Returns parameters after an update per item; in poisoned ones, a micro-batch of process 1 has a non-finite loss."""
    module = Scaled()
    fully_shard(module)
    updates = updates_of(module, optimizer, world, per_layer)
    good = 0
    for bad in poisoned:
        factors = [torch.nan if bad and number == 0 and world.rank == 1 else 1.0 for number in range(2)]
        batches = [Numbers(micro_batch(good, n, world.rank), torch.tensor(f)) for n, f in enumerate(factors)]
        step = train_step(module, updates, batches, lr=0.01, world=world, device=CPU)
        assert bool(step.skipped) == bad
        good += not bad
    return [parameter.full_tensor().detach() for parameter in module.parameters()]


def in_both(rank: int, port: int, optimizer: str, results: Path) -> None:
    """Makes all runs in process `rank` of two, and saves the results to rank.pt."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world, found = World(rank, 2, rank, 2), {}
    with process_group(world, CPU, timeout_s=60):
        for network, accumulation, growth in itertools.product([aligned, odd], [1, 2], [None, 1.01]):
            whole, layered = (
                sharded_run(network, optimizer, world, accumulation, per_layer=per_layer, growth=growth)
                for per_layer in (False, True)
            )
            found[network.__name__, accumulation, growth] = whole, layered
        found["clipped"] = sharded_run(aligned, optimizer, world, 2, per_layer=False, grad_clipping=0.5)
        for per_layer in (False, True):
            found["passed over", per_layer] = stepped_through(optimizer, world, per_layer, [False, True, False])
            found["without it", per_layer] = stepped_through(optimizer, world, per_layer, [False, False])
        found["bad whole"] = one_bad_gradient(optimizer, world, per_layer=False)
        found["bad per layer"] = one_bad_gradient(optimizer, world, per_layer=True)
    torch.save(found, results / f"{rank}.pt")


@pytest.fixture(scope="module", params=OPTIMIZERS)
def two_processes(request, tmp_path_factory) -> tuple[str, list[dict]]:
    """Returns the optimizer's name and the results of each process."""
    pytest.importorskip({"adam8bit": "bitsandbytes", "adamw4bit": "torchao"}.get(request.param, "torch"))
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    processes = [SERVER.Process(target=in_both, args=(rank, port, request.param, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return request.param, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def same(left, right) -> bool:
    return left[0] == right[0] and all(map(torch.equal, left[1], right[1]))


def relative_distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Returns the relative L2 distance of all parameters together."""
    a, b = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (left, right))
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def test_per_layer_updates_are_bit_identical_to_whole_ones(two_processes):
    _, (first, second) = two_processes
    settings = [key for key in first if len(key) == 3]
    assert len(settings) == 8
    for key in settings:
        whole, layered = first[key]
        assert same(whole, layered), key
        assert same(whole, second[key][0])
        assert same(layered, second[key][1])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stepping_shards_equals_stepping_whole_tensors_by_the_mean_gradient(two_processes, accumulation):
    optimizer, (first, _) = two_processes
    if optimizer == "adafactor":
        return  # its second moments are means over rows and columns of the whole matrix
    norms, parameters = averaged_run(aligned, optimizer, accumulation)
    found = first["aligned", accumulation, None][1]
    assert all(map(torch.equal, parameters, found[1]))
    assert found[0] == pytest.approx(norms, rel=1e-6)


def test_norm_limits_use_the_norms_of_whole_tensors(two_processes):
    """Up to rounding: the norm of shards is summed in another order, which may change 8-bit codes by one of 256."""
    optimizer, (first, _) = two_processes
    if optimizer == "adafactor":
        return
    limits = {"growth": first["aligned", 2, 1.01][1], "grad_clipping": first["clipped"]}
    free = averaged_run(aligned, optimizer, 2)[1]
    for name, (norms, parameters) in limits.items():
        expected = averaged_run(aligned, optimizer, 2, **{name: 1.01 if name == "growth" else 0.5})
        assert norms == pytest.approx(expected[0], rel=1e-5)
        assert relative_distance(parameters, expected[1]) < 1e-4
        assert relative_distance(parameters, free) > 1e-3  # the limit does something


def test_a_non_finite_shard_of_a_gradient_is_noticed_in_both_processes(two_processes):
    for results in two_processes[1]:
        assert results["bad whole"] == (5, [False] * 5)
        assert results["bad per layer"] == (1, [True, True, False, True, True])


@pytest.mark.parametrize("per_layer", [False, True])
def test_an_update_with_a_non_finite_loss_changes_nothing_later(two_processes, per_layer):
    """Including the gradients of its earlier micro-batches, which FSDP2 keeps until it has summed them."""
    for results in two_processes[1]:
        assert all(map(torch.equal, results["passed over", per_layer], results["without it", per_layer]))
