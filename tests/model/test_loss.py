"""The chunked loss has the value and gradients of the plain one, and never builds the logits of a whole micro-batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pretraining.config.model_config import ModelConfig, load_model_config
from peft_pretraining.model.llama import build_model
from peft_pretraining.model.loss import TokenLoss, chunked_cross_entropy
from sparse_lora import SLTrainConfig, reparameterize

ROOT = Path(__file__).resolve().parents[2]
V = 331


def tiny() -> ModelConfig:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return replace(load_model_config(ROOT / "configs" / "llama_9m.json"), vocab_size=V, num_key_value_heads=4, **small)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum", ignore_index=-100)


def case(rows: int, dtype: torch.dtype, ignored: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 24, generator=generator).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(V, 24, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden, weight, labels


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss / 37, inputs)  # 1/37 is not exact in bfloat16, to which it must not be rounded


def distance(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("ignored", [0.0, 0.2])
@pytest.mark.parametrize(("rows", "chunk"), [(1, 8), (64, 64), (64, 16), (61, 16), (64, 1), (5, 1000)])
def test_the_chunked_loss_equals_the_plain_one_in_float32(rows: int, chunk: int, ignored: float) -> None:
    hidden, weight, labels = case(rows, torch.float32, ignored)
    ours, theirs = chunked_cross_entropy(hidden, weight, labels, chunk), plain(hidden, weight, labels)
    assert ours.dtype == torch.float32
    assert ours.shape == ()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [512, 16])
def test_the_chunked_loss_is_as_exact_as_the_plain_one_in_bfloat16(chunk: int) -> None:
    """Compared with float64 on the same bfloat16 numbers. One rounding to bfloat16 changes a value by up to 2^-8, a norm by about
    a third of it. The head's gradient has one more rounding per chunk, summed in float32, so the error must not grow."""
    hidden, weight, labels = case(512, torch.bfloat16)
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact_loss = F.cross_entropy(exact_hidden @ exact_weight.T, labels, reduction="sum", ignore_index=-100)
    exact = gradients(exact_loss, exact_hidden, exact_weight)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk)
    ours, theirs = gradients(loss, hidden, weight), gradients(plain(hidden, weight, labels), hidden, weight)
    assert abs(loss.item() / exact_loss.item() - 1) < 1e-3
    assert [g.dtype for g in ours] == [torch.bfloat16] * 2
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert distance(our, true) < 2**-8
        assert distance(our, true) < 2 * distance(their, true)


@pytest.mark.parametrize("chunk", [256, 64])
def test_the_factor_of_the_loss_is_not_rounded_to_bfloat16(chunk: int) -> None:
    """The trainer multiplies the sum by 1 / tokens; rounded to bfloat16 this factor would bias all gradients."""
    hidden, weight, labels = case(256, torch.bfloat16)
    scale = 339 / 65536  # half-way between two bfloat16 numbers: rounding moves it by 0.29 %

    def of(factor: float) -> tuple[Tensor, ...]:
        return torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, chunk) * factor, (hidden, weight))

    for whole, scaled in zip(of(1.0), of(scale), strict=True):
        ratio = (scaled.double() * whole.double()).sum() / whole.double().square().sum()
        assert abs(ratio.item() / scale - 1) < 5e-4


def test_the_chunked_loss_equals_the_plain_one_in_float64() -> None:
    """Gradients have double precision; the sum itself is always float32. The scale is a power of two, exact in both."""
    hidden, weight, labels = (t.detach().double() if t.is_floating_point() else t for t in case(50, torch.float32))
    hidden.requires_grad_()
    weight.requires_grad_()
    ours = chunked_cross_entropy(hidden, weight, labels, 16) / 32
    theirs = F.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=-100) / 32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_no_targets_give_zero_loss_and_zero_gradients() -> None:
    hidden, weight, _ = case(10, torch.float32)
    loss = chunked_cross_entropy(hidden, weight, torch.full((10,), -100), 4)
    assert loss.item() == 0
    assert all(not g.any() for g in gradients(loss, hidden, weight))


def test_frozen_inputs_of_the_loss_get_no_gradient() -> None:
    for frozen in (0, 1):
        inputs = list(case(20, torch.float32))
        inputs[frozen] = inputs[frozen].detach()
        chunked_cross_entropy(*inputs, 8).backward()
        assert inputs[frozen].grad is None
        assert inputs[1 - frozen].grad is not None


class WidestVocabularyTensor(TorchDispatchMode):
    """Records the most rows of any tensor whose last dimension is the vocabulary, for float32 and for all dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = {"float32": 0, "any": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.dim() > 0 and tensor.shape[-1] == V:
                rows = tensor.numel() // V
                self.rows["any"] = max(self.rows["any"], rows)
                if tensor.dtype == torch.float32:
                    self.rows["float32"] = max(self.rows["float32"], rows)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_built_for_one_chunk_at_a_time(dtype: torch.dtype) -> None:
    """In the whole model's forward and backward pass no tensor has more rows x vocabulary than a chunk."""
    model = build_model(tiny(), dtype=dtype, device="cpu", seed=0)
    ids = torch.randint(0, V, (4, 64))
    with WidestVocabularyTensor() as seen:
        TokenLoss(model, chunk_rows=40)(ids, ids).backward()
    assert seen.rows["float32"] == 40
    assert seen.rows["any"] == 40


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_total_of_many_chunks_is_that_of_float64(with_gradients: bool) -> None:
    """4,096 chunks of one row each, all with the same loss: in float32 each addition would be rounded the same way."""
    hidden, weight, _ = case(1, torch.float32)
    rows = hidden.detach().expand(4096, 24).clone().requires_grad_(with_gradients)
    labels = torch.full((4096,), 7)
    total = chunked_cross_entropy(rows, weight.detach(), labels, chunk_rows=1)
    one = chunked_cross_entropy(rows[:1], weight.detach(), labels[:1])
    assert total.dtype == torch.float32
    assert float(total.detach()) == 4096 * float(one.detach())


def test_the_loss_without_gradients_takes_one_product_per_chunk() -> None:
    """One matrix product per chunk."""
    hidden, weight, labels = case(64, torch.float32, ignored=0.0)
    with torch.no_grad(), Products() as products:
        loss = chunked_cross_entropy(hidden, weight, labels, 16)
    assert products.count == 64 / 16
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, labels).detach())


def hf_loss_sum(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Returns the sum of transformers' token losses; its own loss is a mean over valid targets."""
    return model(input_ids=ids, labels=labels).loss * (labels[:, 1:] != -100).sum()


def padded_batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, V, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row, length in enumerate((20, 7, 1)):
        labels[row, length:] = -100
    return ids, labels


def sltrain(model: torch.nn.Module) -> None:
    reparameterize(model, SLTrainConfig(rank=4, sparsity=0.05, alpha=4.0))


@pytest.mark.parametrize("method", [None, sltrain])
@pytest.mark.parametrize("checkpointing", [None, "layer", "selective"])
def test_token_loss_equals_transformers_loss(method: object, checkpointing: str | None) -> None:
    """Compares the value and every parameter's gradient, with padding on the right and no attention mask."""
    settings = {"dtype": torch.float32, "device": "cpu", "seed": 3, "reparameterize": method}
    ours = build_model(tiny(), activation_checkpointing=checkpointing, **settings)  # type: ignore[arg-type]
    theirs = build_model(tiny(), **settings)  # type: ignore[arg-type]
    ids, labels = padded_batch()
    loss = TokenLoss(ours, chunk_rows=8)(ids, labels)
    expected = hf_loss_sum(theirs, ids, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_padding_does_not_change_the_loss() -> None:
    """Real tokens do not attend to padded positions."""
    loss_module = TokenLoss(build_model(tiny(), dtype=torch.float32, device="cpu", seed=3))
    ids, labels = padded_batch()
    other = torch.where(labels == -100, (ids + 17) % V, ids)
    torch.testing.assert_close(loss_module(ids, labels), loss_module(other, labels), rtol=1e-6, atol=0)


def test_autocast_gives_the_bfloat16_loss_and_float32_gradients() -> None:
    loss_module = TokenLoss(build_model(tiny(), dtype=torch.float32, device="cpu", seed=3), chunk_rows=8)
    ids, labels = padded_batch()
    full = loss_module(ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_module(ids, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=1e-2, atol=0)
    assert {p.grad.dtype for p in loss_module.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_the_same(dtype) -> None:
    """Compiled as one function, it has the same value and gradients, also of a head that is scaled in blocks of rows."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8).to(dtype).requires_grad_(), torch.randn(2500, 8).to(dtype).requires_grad_()
    labels = torch.randint(0, 2500, (20,))
    labels[::5] = -100  # compiled, ignored rows are masked; otherwise they are left out before
    compiled = torch.compile(chunked_cross_entropy, backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(hidden, weight, labels, 8), chunked_cross_entropy(hidden, weight, labels, 8)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b)
