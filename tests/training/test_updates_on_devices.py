"""Updates of the tiny model on a CPU and on a GPU: no wait, compiled as eager, masked documents, attention in one kernel."""

from functools import partial
from pathlib import Path

import pytest
import torch
from devices import KINDS, padded_batches, tiny_loss
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pretraining.distributed.world import World
from peft_pretraining.model.llama import _ATTENTION_OPS
from peft_pretraining.model.loss import TokenLoss
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.updates import WholeUpdate
from peft_pretraining.training.update import train_step

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
every_kind = pytest.mark.parametrize("kind", KINDS)


def stepping(loss: TokenLoss, device: torch.device) -> partial:
    build = partial(build_optimizer, "adamw", lr=0.0, weight_decay=0.1)
    updates = WholeUpdate(build, dict(loss.model.named_parameters()), World(), grad_clipping=0.1)
    return partial(train_step, loss, updates, padded_batches(device), lr=1e-3, world=World(), device=device)


@every_kind
def test_an_update_of_sltrain_does_not_wait(tmp_path, device, kind, monkeypatch):
    """torch raises an error if an operator waits for a GPU; on a CPU the operators that would are counted."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu.timing import kernels_of, waits_are_errors

    step = stepping(tiny_loss(tmp_path, device, kind), device)
    for _ in range(2):
        step()
    with waits_are_errors(device):
        result = step()
    assert float(result.loss) > 0
    assert kernels_of(step, device).waits == 0


@every_kind
def test_compiled_layers_give_the_losses_and_gradients_of_eager_ones(tmp_path, device, kind):
    """On a GPU with generated code, in float32; on a CPU traced only."""
    torch._dynamo.reset()
    eager, compiled = (tiny_loss(tmp_path, device, kind, torch.float32) for _ in range(2))
    for layer in compiled.model.model.layers:
        layer.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    found = []
    for loss in (eager, compiled):
        for batch in padded_batches(device):
            loss(batch.input_ids.to(device), batch.labels.to(device), batch.num_targets).backward()
        found.append([parameter.grad for parameter in loss.parameters()])
    torch._dynamo.reset()
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-4


@pytest.mark.parametrize("kind", ["full", "uniform"])
def test_masked_documents_have_the_losses_of_documents_alone(tmp_path, device, kind):
    """The sum over a sequence of two documents equals the sum over each alone, except for the target that joins them."""
    loss = tiny_loss(tmp_path, device, kind, torch.float32, document_end=1)
    ids = torch.tensor([[5, 6, 7, 8, 9, 1, 20, 21, 22, 23, 24, 25]], device=device)
    labels = ids.clone()
    labels[0, 6] = -100  # predicted from the document before
    with torch.no_grad():
        together = loss(ids, labels)
        alone = loss(ids[:, :6], ids[:, :6]) + loss(ids[:, 6:], ids[:, 6:])
        unmasked = TokenLoss(loss.model)(ids, labels)
    assert float(together) == pytest.approx(float(alone), rel=1e-4)
    assert float(unmasked) != pytest.approx(float(alone), rel=1e-6)


class AttentionKernels(TorchDispatchMode):
    """Records the operators that compute attention in one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _ATTENTION_OPS:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("document_end", [None, 1], ids=["causal", "masked"])
def test_attention_is_one_kernel_with_and_without_a_mask(tmp_path, device, document_end):
    """No products and softmax with their T x T matrix; without a mask flash or cuDNN attention, which skip half of the work."""
    loss = tiny_loss(tmp_path, device, "full", document_end=document_end)
    ids = padded_batches(device)[0].input_ids.to(device)
    with AttentionKernels() as recorder:
        loss(ids, ids)
    assert len(recorder.names) == len(loss.model.model.layers)
    if document_end is None:
        assert all("flash" in name or "cudnn" in name for name in recorder.names), recorder.names
