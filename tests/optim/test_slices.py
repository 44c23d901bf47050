"""Steps in slices are bit-identical to the libraries'; stochastic rounding is unbiased and the same on every replica."""

import contextlib

import pytest
import torch
from torch import nn

from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.slices import StochasticRounding, round_stochastically_, slices


@pytest.mark.parametrize(("count", "size"), [(0, 8192), (1, 8192), (8192, 8192), (8193, 8192), (20_000, 8192), (30_000, 8192)])
def test_slices_cover_each_element_once(count, size):
    parts = list(slices(count, size))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert all(part.start % size == 0 for part in parts)
    assert all(part.stop - part.start >= 4096 for part in parts[1:])  # libraries treat tensors below 4,096 elements differently


def step_both(ours, theirs, left, right, dtype):
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        gradient = torch.randn(left.shape, generator=generator).to(dtype)
        left.grad, right.grad = gradient, gradient.clone()
        ours.step()
        theirs.step()
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [100, 5000, 8192 * 2 + 5, 8192 * 3 + 4100])
@pytest.mark.parametrize("bits", [8, 32])
def test_adam8bit_in_slices_is_bit_identical_to_bitsandbytes(monkeypatch, dtype, count, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft_pretraining.optim import adam8bit

    monkeypatch.setattr(adam8bit, "SLICE_ELEMENTS", 8192)
    torch.manual_seed(0)
    left = nn.Parameter(torch.randn(count).to(dtype))
    right = nn.Parameter(left.detach().clone())
    ours = build_optimizer("adam8bit", {"lm_head.weight": left}, lr=0.01, weight_decay=0.1, embedding_bits=bits)
    kind = bitsandbytes.optim.Adam8bit if bits == 8 else bitsandbytes.optim.Adam32bit
    step_both(ours, kind([right], lr=0.01, weight_decay=0.1), left, right, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "bits"), [("AdamW4bit", None), ("AdamW8bit", 8)])
def test_quantised_adam_in_slices_is_bit_identical_to_torchao(monkeypatch, dtype, name, bits):
    """For complete blocks: torchao does not quantise the moments of other tensors."""
    library = pytest.importorskip("torchao.optim")
    from peft_pretraining.optim import moments

    monkeypatch.setattr(moments, "SLICE_ELEMENTS", 8192)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # compiled arithmetic is not bit-identical
    torch.manual_seed(0)
    left = nn.Parameter(torch.randn(8192 * 2 + 5120).to(dtype))
    right = nn.Parameter(left.detach().clone())
    ours = build_optimizer("adamw4bit", {"lm_head.weight": left}, lr=0.01, weight_decay=0.1, embedding_bits=bits)
    step_both(ours, getattr(library, name)([right], lr=0.01, weight_decay=0.1), left, right, dtype)


def test_quantised_moments_take_half_a_byte_per_element():
    """Half a byte per element and moment, plus scales, for any size; torchao alone would not quantise this tensor's moments."""
    parameter = nn.Parameter(torch.randn(100_001))
    optimizer = build_optimizer("adamw4bit", {"x": parameter}, lr=0.01, weight_decay=0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = sum(t.nbytes for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor))
    assert size < 1.08 * parameter.numel()


def test_stochastic_rounding_is_unbiased_and_exact_for_representable_values():
    source = torch.tensor([1.0, -1.0, 1.0 + 2**-9, -1.0 - 2**-9, 3.1415926, -2.7e-12, 0.0]).repeat(20_000, 1)
    target = torch.empty_like(source, dtype=torch.bfloat16)
    round_stochastically_(target, source, torch.Generator().manual_seed(0))
    assert (target[:, [0, 1, 6]].float() == source[:, [0, 1, 6]]).all()
    # A bfloat16's spacing is at most 1/128 of the value; the mean of 20,000 has 1/141 of one draw's deviation, at most 1/256.
    deviation = source[0].abs() / 256 / 141
    assert ((target.double().mean(0) - source[0]).abs() <= 5 * deviation).all()
    assert len(target[:, 2].unique()) == 2


@pytest.mark.parametrize("name", ["adam", "adamw", "adam8bit", "adamw4bit"])
def test_small_updates_are_not_lost_with_stochastic_rounding(name):
    """Fifty steps of 1e-4 from 1.0: rounded to nearest, all are lost."""
    ends = []
    for rounding in (None, StochasticRounding(0), StochasticRounding(0), StochasticRounding(1)):
        parameter = nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
        optimizer = build_optimizer(name, {"x": parameter}, lr=1e-4, weight_decay=0.0, rounding=rounding)
        for _ in range(50):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        ends.append(parameter.detach().float())
    assert (ends[0] == 1).all()
    assert float(ends[1].mean()) == pytest.approx(0.995, abs=2e-4)
    assert torch.equal(ends[1], ends[2])  # the same seed rounds equally
    assert not torch.equal(ends[1], ends[3])


@pytest.mark.parametrize(("ours", "waits"), [(True, 0), (False, 1)])
def test_8_bit_steps_do_not_wait_for_a_gpu(monkeypatch, ours, waits):
    """bitsandbytes' own step waits once per parameter: its `sync_gpu`."""
    waited = []
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", waited.append)
    parameter = nn.Parameter(torch.ones(64, 128))
    parameter.grad = torch.ones_like(parameter)
    settings = {"lr": 0.01, "weight_decay": 0.0}
    own = build_optimizer("adam8bit", {"weight": parameter}, **settings)
    (own if ours else bitsandbytes.optim.Adam8bit([parameter], **settings)).step()
    assert len(waited) == waits
    assert (parameter < 1).all()


def test_8_bit_steps_are_ordered_after_the_stream_of_their_gradient(monkeypatch):
    """FSDP2 calls hooks in a stream of its own; bitsandbytes launches its kernels in the default stream."""
    pytest.importorskip("bitsandbytes")
    from peft_pretraining.optim import adam8bit

    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def stream(chosen):
        events.append(f"in {chosen.name}")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("hooks"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream("default"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    with adam8bit._default_stream(torch.device("cuda")):
        events.append("step")
    assert events == ["default waits for hooks", "in default", "step", "hooks waits for default"]
