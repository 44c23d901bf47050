"""Evaluation is a token-weighted mean over exactly counted targets; the published program's depends on the batch size."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.model.llama import build_model
from peft_pretraining.model.loss import TokenLoss
from peft_pretraining.training.evaluate import evaluate
from sparse_lora import SLTrainConfig, reparameterize

ROOT = Path(__file__).resolve().parents[2]
V, T = 503, 48


@dataclass
class Batch:
    input_ids: Tensor
    labels: Tensor

    @property
    def num_targets(self) -> int:
        return int((self.labels[:, 1:] != -100).sum())


@pytest.fixture(scope="module")
def loss_module() -> TokenLoss:
    cfg = replace(
        load_model_config(ROOT / "configs" / "llama_9m.json"),
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
    )

    def method(model: torch.nn.Module) -> None:
        reparameterize(model, SLTrainConfig(rank=8, sparsity=0.1, alpha=8.0))

    model = build_model(cfg, dtype=torch.float32, device="cpu", seed=5, reparameterize=method)
    with torch.no_grad():  # makes losses differ between tokens: at initialisation every loss is log V
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return TokenLoss(model)


@pytest.fixture(scope="module")
def sequences() -> list[Tensor]:
    """37 documents of 1 to 48 tokens. A document of one token has no target, and no batch size divides 37."""
    generator = torch.Generator().manual_seed(9)
    lengths = [1, T, 2, *torch.randint(2, T + 1, (34,), generator=generator).tolist()]
    return [torch.randint(0, V, (n,), generator=generator) for n in lengths]


def batches(sequences: list[Tensor], size: int) -> Iterator[Batch]:
    for start in range(0, len(sequences), size):
        part = sequences[start : start + size]
        ids, labels = torch.zeros(len(part), T, dtype=torch.long), torch.full((len(part), T), -100)
        for row, sequence in enumerate(part):
            ids[row, : len(sequence)] = sequence
            labels[row, : len(sequence)] = sequence
        yield Batch(ids, labels)


def plain_sum_and_count(model: torch.nn.Module, sequences: list[Tensor]) -> tuple[float, int]:
    """Returns sum and number of transformers' token losses, one unpadded document at a time."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for sequence in sequences:
            targets = len(sequence) - 1
            if targets:
                ids = sequence[None]
                total += float(model.eval()(input_ids=ids, labels=ids).loss) * targets
                tokens += targets
    return total, tokens


@pytest.mark.parametrize("size", [1, 7, 32])
def test_the_result_equals_a_loop_over_transformers_loss(loss_module: TokenLoss, sequences: list[Tensor], size: int) -> None:
    total, tokens = plain_sum_and_count(loss_module.model, sequences)
    result = evaluate(loss_module, batches(sequences, size))
    assert result.tokens == tokens
    assert result.loss == pytest.approx(total / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-6)
    assert result.bits_per_byte is None


def test_the_mean_of_batch_means_is_different(loss_module: TokenLoss, sequences: list[Tensor]) -> None:
    """Shows that the test above can fail: on these documents the published way of averaging gives another result."""
    total, tokens = plain_sum_and_count(loss_module.model, sequences)
    means = [evaluate(loss_module, [batch]).loss for batch in batches(sequences[1:], 1)]
    assert abs(sum(means) / len(means) / (total / tokens) - 1) > 1e-3


def test_bits_per_byte_count_the_bytes_of_the_targets(loss_module: TokenLoss, sequences: list[Tensor]) -> None:
    """Sum of the losses in nats / log 2 / bytes of all targets; the first token of a document is not a target."""
    sizes = torch.arange(V) % 7
    result = evaluate(loss_module, batches(sequences, 7), bytes_per_id=sizes)
    num_bytes = sum(int(sizes[s[1:]].sum()) for s in sequences)
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / math.log(2) / num_bytes, rel=1e-12)


def test_several_processes_give_the_result_of_one(loss_module: TokenLoss, sequences: list[Tensor]) -> None:
    """Sequence i belongs to process i % 3; processes may have fewer batches than others, or none."""
    sizes = torch.arange(V) % 7
    sums: list[Tensor] = []
    shares = [sequences[r:7:3] for r in range(3)] + [[]]
    for share in shares:  # collects the sums of each process
        with pytest.raises(ValueError, match="no target"):
            evaluate(
                loss_module,
                batches(share, 2),
                world_reduce=lambda s: (sums.append(s.clone()), s.zero_()),
                bytes_per_id=sizes,
            )
    result = evaluate(loss_module, [], world_reduce=lambda s: s.copy_(torch.stack(sums).sum(0)), bytes_per_id=sizes)
    whole = evaluate(loss_module, batches(sequences[:7], 4), bytes_per_id=sizes)
    assert result.tokens == whole.tokens
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)


def test_evaluation_restores_every_modules_mode(loss_module: TokenLoss, sequences: list[Tensor]) -> None:
    loss_module.train()
    loss_module.model.lm_head.eval()
    modes = []
    hook = loss_module.model.model.norm.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    evaluate(loss_module, batches(sequences, 32))
    hook.remove()
    assert set(modes) == {False}
    assert not loss_module.model.lm_head.training
    assert loss_module.model.model.layers[0].training

    def broken() -> Iterator[Batch]:
        raise OSError("gone")
        yield

    with pytest.raises(OSError, match="gone"):
        evaluate(loss_module, broken())
    assert loss_module.model.model.layers[0].training
    assert all(p.grad is None for p in loss_module.parameters())


def test_an_empty_evaluation_set_is_refused(loss_module: TokenLoss) -> None:
    with pytest.raises(ValueError, match="--eval_dataset"):
        evaluate(loss_module, [])


def test_the_perplexity_of_a_very_large_loss_is_infinite(sequences: list[Tensor]) -> None:
    class Huge(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, input_ids: Tensor, labels: Tensor, num_targets: int) -> Tensor:
            return self.weight * 1e6

    result = evaluate(Huge(), batches(sequences[1:2], 1))
    assert result.perplexity == math.inf
    assert math.isfinite(result.loss)


def test_a_loss_that_is_not_a_number_has_no_perplexity(loss_module: TokenLoss) -> None:
    broken = copy.deepcopy(loss_module)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    ids = torch.zeros(1, T, dtype=torch.long)
    result = evaluate(broken, [Batch(ids, ids)])
    assert math.isnan(result.loss)
    assert math.isnan(result.perplexity)
