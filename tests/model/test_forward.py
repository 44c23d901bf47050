"""The forward pass equals transformers'; with document masks each document gives the logits that it gives alone."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_pretraining.config.model_config import ModelConfig, load_model_config
from peft_pretraining.model.llama import build_model
from peft_pretraining.model.loss import TokenLoss, document_begins, document_mask, hidden_states
from peft_pretraining.training.evaluate import evaluate
from sparse_lora import SLTrainConfig, reparameterize

ROOT = Path(__file__).resolve().parents[2]
V, EOS = 331, 1
CHECKPOINTING = (None, "layer", "selective")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny(key_value_heads: int = 4) -> ModelConfig:
    cfg = load_model_config(ROOT / "configs" / "llama_9m.json")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return replace(cfg, vocab_size=V, num_key_value_heads=key_value_heads, **small)


def build(cfg: ModelConfig | None = None, checkpointing: str | None = None, compiled: bool = False):
    settings = SLTrainConfig(rank=4, sparsity=0.1, alpha=8.0)
    model = build_model(
        cfg or tiny(),
        dtype=torch.float32,
        device="cpu",
        seed=3,
        reparameterize=lambda model: reparameterize(model, settings),
        activation_checkpointing=checkpointing,
        compile=compiled,
    )
    with torch.no_grad():  # at initialisation attention is nearly uniform, which would hide errors
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def documents() -> list[list[Tensor]]:
    """Returns the documents of two packed sequences of 24 ids: three, one of which is only eos; and two, the last one cut."""
    generator = torch.Generator().manual_seed(7)
    lengths = [[9, 1, 14], [17, 7]]
    rows = [[torch.randint(2, V, (n,), generator=generator) for n in row] for row in lengths]
    for document in [*rows[0], rows[1][0]]:
        document[-1] = EOS
    return rows


def packed() -> Tensor:
    return torch.stack([torch.cat(row) for row in documents()])


def alone(model) -> Tensor:
    """Returns transformers' logits of each document alone, concatenated as the documents are."""
    return torch.stack([torch.cat([model(input_ids=ids[None]).logits[0] for ids in row]) for row in documents()])


def logits(model, document_end: int | None) -> Tensor:
    return model.lm_head(hidden_states(model.model, packed(), document_end))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_the_forward_pass_is_bit_identical_to_transformers(checkpointing):
    """Compiled layers are compared with eager ones in test_modeling.py."""
    assert torch.equal(logits(build(checkpointing=checkpointing), None), build()(input_ids=packed()).logits)


@pytest.mark.parametrize(
    ("checkpointing", "compiled", "key_value_heads"),
    [
        *((kind, False, heads) for kind in CHECKPOINTING for heads in (4, 2)),
        *((None, True, 4), ("layer", True, 2)),
        *(pytest.param(kind, True, heads, marks=pytest.mark.full) for kind, heads in ((None, 2), ("layer", 4))),
    ],
)
def test_a_packed_document_gives_the_logits_and_gradients_it_gives_alone(monkeypatch, checkpointing, compiled, key_value_heads):
    """Compiled: traced as for inductor, without generating code."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager_decomp_partition"))
    cfg = tiny(key_value_heads)
    model, reference = build(cfg, checkpointing, compiled), build(cfg)
    ours, expected = logits(model, EOS), alone(reference)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_without_masks_documents_attend_to_earlier_ones():
    model = build()
    apart = (logits(model, None) - alone(model)).abs().amax(dim=-1)
    first = [len(row[0]) for row in documents()]
    for row, length in zip(apart, first, strict=True):
        assert row[:length].max() < 1e-5
        assert row[length:].min() > 1e-2


def test_document_masks_work_in_bfloat16_and_under_autocast():
    """Changing one document leaves the others bit-identical."""
    ids = packed()
    other = ids.clone()
    other[0, :8] = (other[0, :8] + 5) % (V - 2) + 2
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (hidden_states(model.model, each, EOS) for each in (ids, other))
    assert torch.equal(a[0, 9:], b[0, 9:])
    assert not torch.equal(a[0, :9], b[0, :9])
    model = model.to(torch.bfloat16)
    a, b = (hidden_states(model.model, each, EOS) for each in (ids, other))
    assert torch.equal(a[0, 9:], b[0, 9:])
    assert not torch.equal(a[0, :9], b[0, :9])


def test_document_begins_and_masks_follow_from_eos():
    ids = torch.tensor([[5, EOS, EOS, 7, 8], [EOS, 3, 4, 5, EOS]])
    begins = document_begins(ids, EOS)
    assert begins.tolist() == [[0, 0, 2, 3, 3], [0, 1, 1, 1, 1]]
    visible = document_mask(begins, torch.bfloat16)[:, 0] == 0
    for row in range(2):
        for query in range(5):
            assert visible[row, query].nonzero().flatten().tolist() == list(range(begins[row, query], query + 1))


def test_evaluation_uses_document_masks():
    model = build()

    class Batch:
        input_ids = labels = packed()
        num_targets = 46

    targets = packed()[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(alone(model)[:, :-1].flatten(0, 1), targets)
    masked = evaluate(TokenLoss(model, document_end=EOS), [Batch()])
    assert masked.loss == pytest.approx(expected.item(), rel=1e-5)
    assert evaluate(TokenLoss(model), [Batch()]).loss != pytest.approx(masked.loss, rel=1e-3)
