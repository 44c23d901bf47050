"""Wrapping a module for several processes, and the messages of NCCL; with a process group of a single process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from peft_pretraining.distributed import world as worlds
from peft_pretraining.distributed.parallel import replicate
from peft_pretraining.distributed.world import GroupError, LostProcess, World, process_group


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, hidden):
        return hidden @ self.weight


class Loss(nn.Module):
    """A model with one layer, compiled by a compiler that records the shapes it compiles for."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(7, 4), Layer()
        self.compiled_for: list[tuple] = []
        self.layer.compile(backend=self._compiler)

    def _compiler(self, graph, inputs):
        self.compiled_for += [tuple(t.shape) for t in inputs if isinstance(t, torch.Tensor) and t.dim() == 3]
        return graph

    def forward(self, input_ids, labels):
        return self.layer(self.embedding(input_ids)).sum()


def test_layers_are_compiled_for_the_shape_of_the_run_alone(group):
    """Three processes settle DDP's buckets by a pass with another shape; a second shape would be compiled as a dynamic one."""
    torch.compiler.reset()
    module = Loss()
    wrapped = replicate(module, World(0, 3), torch.device("cpu"))
    assert module.layer.weight.grad is not None, "the buckets are settled by a backward pass"
    tokens = torch.zeros(3, 5, dtype=torch.int64)
    for _ in range(2):
        wrapped(tokens, tokens).backward()
    assert module.compiled_for == [(3, 5, 4)]


WHERE = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, "
SYSTEM = (
    f"{WHERE}unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \nLast error:\n"
)
REMOTE = (
    f"{WHERE}remote process exited or there was a network error, NCCL version 2.27.3\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\nLast error:\n"
)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (f"{REMOTE}socketProgress: Connection closed by remote peer node2<42830>", LostProcess, "another process of this run"),
        (f"{SYSTEM}Call to recv from 10.0.0.2<4791> failed : Connection reset by peer", LostProcess, "another process"),
        ("NCCL communicator was aborted on rank 1. Original reason for failure was: x", LostProcess, "another process"),
        (
            f"{SYSTEM}Error while creating shared memory segment /dev/shm/nccl-LeXlEJ (size 9637888)",
            GroupError,
            "NCCL failed: Error while creating shared memory segment /dev/shm/nccl-LeXlEJ (size 9637888); /dev/shm is too small",
        ),
        (
            f"{WHERE}invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.19.3\nncclInvalidUsage: This usually "
            "reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA "
            "device 2000\nException raised from getNCCLComm at x.cpp:1287",
            GroupError,
            "NCCL failed: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 2000; every process needs a GPU",
        ),
        (
            f"{WHERE}internal error, NCCL version 2.21.5\nncclInternalError: Internal check failed.\nLast error:\n"
            "Bootstrap : no socket interface found",
            GroupError,
            "NCCL failed: Bootstrap : no socket interface found; set NCCL_SOCKET_IFNAME",
        ),
        (
            f"{WHERE}unhandled cuda error, NCCL version 2.21.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 2 'out of memory'",
            GroupError,
            "NCCL failed: Cuda failure 2 'out of memory'; NCCL's buffers do not fit",
        ),
        ("Distributed package doesn't have NCCL built in", GroupError, "built in; install a build of torch for CUDA"),
        (f"{SYSTEM}something new", GroupError, "NCCL failed: something new; NCCL_DEBUG=INFO in the environment shows more"),
    ],
)
def test_an_error_of_nccl_is_told_from_a_process_that_has_ended(monkeypatch, text, kind, words):
    monkeypatch.setattr(worlds, "_meeting_place", lambda world, timeout: {"store": dist.HashStore(), "rank": 0, "world_size": 1})
    try:
        with pytest.raises(GroupError) as raised, process_group(World(0, 2), torch.device("cpu"), 10):
            raise dist.DistBackendError(text)
    finally:
        dist.destroy_process_group()
    assert type(raised.value) is kind
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
