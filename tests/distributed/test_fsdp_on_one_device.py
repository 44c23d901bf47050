"""FSDP2 on a mesh of one device, a CPU or a GPU: its hooks and streams, with per-layer 8-bit steps in the backward pass."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from devices import padded_batches, tiny_loss

from peft_pretraining.distributed.parallel import Sharding, settle_shards, shard
from peft_pretraining.distributed.world import World
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.updates import PerLayerUpdate
from peft_pretraining.training.update import train_step


@pytest.fixture
def group_of_one(tmp_path, device):
    """A process group that consists of this process."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["uniform", "block"])
def test_per_layer_8bit_steps_of_sharded_parameters_equal_those_of_plain_ones(tmp_path, device, group_of_one, kind):
    """A race between FSDP2's stream of reductions and the step would change the parameters."""
    pytest.importorskip("bitsandbytes")
    results = []
    for sharded in (False, True):
        loss = tiny_loss(tmp_path, device, kind)
        if sharded:
            layers = loss.model.model
            shard(loss, [layers.embed_tokens, *layers.layers], device, Sharding())
            settle_shards(loss, device)
        build = partial(build_optimizer, "adam8bit", lr=0.0, weight_decay=0.0)
        updates = PerLayerUpdate(build, dict(loss.model.named_parameters()), World())
        for _ in range(4):
            step = train_step(loss, updates, padded_batches(device), lr=1e-2, world=World(), device=device)
        whole = [p.full_tensor() if sharded else p for p in loss.model.parameters()]
        results.append([float(step.loss), *(parameter.detach().cpu().clone() for parameter in whole)])
    (first, *expected), (second, *found) = results
    assert first == second
    assert all(map(torch.equal, expected, found))
