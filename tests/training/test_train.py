"""One update of the trainer equals that of a hand-written dense model, for every gradient accumulation."""

import math
import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from outcomes import tensors_of

import torchrun_main
from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.distributed.world import World
from peft_pretraining.model.llama import build_model
from peft_pretraining.model.loss import TokenLoss
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.updates import WholeUpdate
from peft_pretraining.run import assemble
from peft_pretraining.training.update import train_step
from sparse_lora import SLTrainConfig, SparseLowRankLinear, reparameterize

CPU = torch.device("cpu")
RANK, ALPHA, SPARSITY = 4, 6.0, 0.1


@dataclass
class MicroBatch:
    input_ids: torch.Tensor
    labels: torch.Tensor
    num_bad_records: int = 0

    @property
    def num_tokens(self) -> int:
        return int((self.labels != -100).sum())

    @property
    def num_targets(self) -> int:
        return int((self.labels[:, 1:] != -100).sum())


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        attention_bias=False,
        mlp_bias=False,
        name="tiny",
        path="tiny.json",
    )


def sltrain_model(config, seed=3):
    settings = SLTrainConfig(rank=RANK, sparsity=SPARSITY, alpha=ALPHA, seed=seed)
    return build_model(
        config,
        dtype=torch.float32,
        device="cpu",
        seed=seed,
        reparameterize=lambda model: reparameterize(model, settings),
    )


def whole_update(model, name, grad_clipping=None) -> WholeUpdate:
    parameters = dict(model.named_parameters())
    build = partial(build_optimizer, name, lr=0.0, weight_decay=0.0)
    return WholeUpdate(build, parameters, World(), grad_clipping=grad_clipping)


def sequences(count: int, length: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and labels of sequences of very unequal lengths, padded on the right."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(2, vocab, (count, length), generator=generator)
    labels = ids.clone()
    for row in range(count):
        keep = 3 + (row * 7) % (length - 3)
        labels[row, keep:] = -100
        ids[row, keep:] = 0
    return ids, labels


class DenseReference:
    """A LLaMA with dense weights s B A + S in plain tensor operations; its parameters are the factors and sparse values."""

    def __init__(self, model, config):
        self.config = config
        self.leaves = {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}
        self.positions = {
            name: module.support.flat_indices()
            for name, module in model.named_modules()
            if isinstance(module, SparseLowRankLinear)
        }

    def linear(self, name, x):
        A, B = self.leaves[f"{name}.lora_A"], self.leaves[f"{name}.lora_B"]
        sparse = torch.zeros(B.shape[0] * A.shape[1], dtype=torch.float64)
        sparse = sparse.scatter(0, self.positions[name], self.leaves[f"{name}.sparse_value"])
        return x @ (ALPHA / RANK * B @ A + sparse.view(B.shape[0], A.shape[1])).T

    def norm(self, name, x):
        return self.leaves[f"{name}.weight"] * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)

    def rotate(self, x):
        half = x.shape[-1] // 2
        frequency = 1.0 / self.config.rope_theta ** (torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequency
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    def attention(self, name, x):
        heads = self.config.num_attention_heads

        def split(y):
            return y.unflatten(-1, (heads, -1)).transpose(1, 2)

        q, k, v = (split(self.linear(f"{name}.{kind}_proj", x)) for kind in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        y = scores.masked_fill(~causal, -math.inf).softmax(-1) @ v
        return self.linear(f"{name}.o_proj", y.transpose(1, 2).flatten(-2))

    def mlp(self, name, x):
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", F.silu(gate) * up)

    def mean_loss(self, ids, labels):
        x = self.leaves["model.embed_tokens.weight"][ids]
        for index in range(self.config.num_hidden_layers):
            layer = f"model.layers.{index}"
            x = x + self.attention(f"{layer}.self_attn", self.norm(f"{layer}.input_layernorm", x))
            x = x + self.mlp(f"{layer}.mlp", self.norm(f"{layer}.post_attention_layernorm", x))
        logits = self.norm("model.norm", x) @ self.leaves["lm_head.weight"].T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("clipping", [None, 0.05])
def test_an_update_equals_the_dense_references(config, accumulation, clipping):
    """Compares loss, gradient norm and every parameter after one update of SGD without momentum, to float32 rounding."""
    model = sltrain_model(config)
    with torch.no_grad():  # with B = 0, as at the start, errors in A's gradient would be invisible
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    reference = DenseReference(model, config)
    ids, labels = sequences(8, 20, config.vocab_size)
    loss = reference.mean_loss(ids, labels)
    gradients = dict(zip(reference.leaves, torch.autograd.grad(loss, list(reference.leaves.values())), strict=True))
    norm = torch.sqrt(sum(gradient.pow(2).sum() for gradient in gradients.values()))
    scale = 1.0 if clipping is None else min(1.0, clipping / float(norm))
    assert clipping is None or scale < 1.0

    updates = whole_update(model, "sgd", clipping)
    size = len(ids) // accumulation
    batches = [MicroBatch(ids[i : i + size], labels[i : i + size]) for i in range(0, len(ids), size)]
    result = train_step(TokenLoss(model), updates, batches, lr=0.5, world=World(), device=CPU)

    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert float(result.gradnorm) == pytest.approx(float(norm), rel=1e-5)
    assert int(result.num_tokens) == int((labels != -100).sum())
    for name, parameter in model.named_parameters():
        expected = reference.leaves[name] - 0.5 * scale * gradients[name]
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


class SameLoss(torch.nn.Module):
    """A module whose loss is the same for every micro-batch."""

    def __init__(self):
        super().__init__()
        self.loss = torch.nn.Parameter(torch.tensor(1234.567))

    def forward(self, input_ids, labels, num_targets):
        return self.loss * 1


def test_the_loss_of_many_micro_batches_is_that_of_float64():
    """In float32 each of the 1,000 additions would be rounded the same way."""
    module, batch = SameLoss(), MicroBatch(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    build = partial(build_optimizer, "sgd", lr=0.0, weight_decay=0.0)
    updates = WholeUpdate(build, dict(module.named_parameters()), World())
    result = train_step(module, updates, [batch] * 1000, lr=0.0, world=World(), device=CPU)
    assert result.loss.dtype == torch.float32
    assert float(result.loss) == pytest.approx(float(module.loss.detach()), rel=1e-7)


def test_gradients_are_freed_after_the_update(config):
    model = sltrain_model(config)
    ids, labels = sequences(2, 8, config.vocab_size)
    updates = whole_update(model, "adamw")
    train_step(TokenLoss(model), updates, [MicroBatch(ids, labels)], lr=1e-3, world=World(), device=CPU)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_update_without_targets_changes_nothing_and_stays_finite(config):
    """A micro-batch of one-token documents has no targets; 0/0 must not reach the parameters."""
    model = sltrain_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.full((2, 6), 5)
    labels = torch.full((2, 6), -100)
    updates = whole_update(model, "sgd")
    result = train_step(TokenLoss(model), updates, [MicroBatch(ids, labels)], lr=1.0, world=World(), device=CPU)
    assert float(result.loss) == 0.0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_pythons_generator_starts_from_the_seed_even_if_imports_draw_from_it(tiny_run, tmp_path, monkeypatch):
    build = assemble.build_token_loss

    def drawing(*arguments, **options):
        random.random()
        return build(*arguments, **options)

    monkeypatch.setattr(assemble, "build_token_loss", drawing)
    flags = [
        *("--batch_size", "2", "--total_batch_size", "2", "--max_length", "16", "--seed", "5"),
        *("--num_training_steps", "1", "--warmup_steps", "0", "--lr", "0.01"),
    ]
    assert torchrun_main.main([*tiny_run, *flags, "--wandb", "disabled", "--save_dir", str(tmp_path)]) == 0
    assert tensors_of(tmp_path)["random/0/python"].tolist() == list(random.Random(5).getstate()[1])
