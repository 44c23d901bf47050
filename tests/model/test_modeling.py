"""The model is transformers' LLaMA: equal logits, exact parameter counts, and initial values that depend only on the seed."""

import itertools
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_pretraining.config.model_config import ModelConfig, load_model_config
from peft_pretraining.model.llama import build_model, hf_config, initialize, materialize
from peft_pretraining.model.loss import TokenLoss
from sparse_lora import SLTrainConfig, SparseLowRankLinear, attach_relora, generator_for, merge, reparameterize

ROOT = Path(__file__).resolve().parents[2]


def tiny(**changes: Any) -> ModelConfig:
    small = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    return replace(load_model_config(ROOT / "configs" / "llama_9m.json"), **(small | changes))


def sltrain(model: nn.Module) -> None:
    reparameterize(model, SLTrainConfig(rank=4, sparsity=0.05, alpha=4.0))


def lowrank(model: nn.Module) -> None:
    reparameterize(model, SLTrainConfig(rank=4, sparsity=0.0, alpha=4.0))


def relora(model: nn.Module) -> None:
    attach_relora(model, rank=4, seed=11)


def build(cfg: ModelConfig, **changes: Any) -> Any:
    return build_model(cfg, **({"dtype": torch.float32, "device": "cpu", "seed": 11} | changes))


def plain_hf(cfg: ModelConfig) -> Any:
    """Returns a LLaMA built by transformers on the CPU, with transformers' initial values."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(hf_config(cfg)).eval()


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Exact parameter counts: r, delta, full-rank, low-rank, nonzeros, SLTrain
COUNTS = {
    "60m": (128, 0.03, 58_073_600, 42_770_944, 758_888, 43_529_832),
    "130m": (256, 0.03, 134_105_856, 93_997_824, 2_547_972, 96_545_796),
    "350m": (256, 0.03, 367_969_280, 185_222_144, 9_071_400, 194_293_544),
    "1b": (512, 0.03, 1_339_082_752, 609_310_720, 36_237_240, 645_547_960),
    "7b": (1024, 0.05, 6_738_415_616, 2_820_935_680, 323_800_128, 3_144_735_808),
}


@pytest.mark.parametrize("size", COUNTS)
def test_modules_have_the_exact_parameter_counts(size: str) -> None:
    rank, sparsity, full, low_rank, nonzeros, total = COUNTS[size]
    cfg = load_model_config(ROOT / "configs" / f"llama_{size}.json")

    def method(model: nn.Module, sparsity: float = sparsity) -> None:
        reparameterize(model, SLTrainConfig(rank=rank, sparsity=sparsity))

    assert numel(build(cfg, device="meta")) == full
    assert numel(build(cfg, device="meta", reparameterize=lambda m: method(m, 0.0))) == low_rank
    model = build(cfg, device="meta", reparameterize=method)
    assert numel(model) == total
    assert sum(p.numel() for n, p in model.named_parameters() if n.endswith("sparse_value")) == nonzeros


CONFIGS = {
    "as published": {},
    "grouped queries, biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "padding id is a real token": {"pad_token_id": 1, "eos_token_id": 1},
    "rope base": {"rope_theta": 500.0},
    "rope scaling": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_equal_a_plain_transformers_model(case: str) -> None:
    """With equal weights the logits are bit-identical, for everything that a config can contain."""
    cfg = tiny(**CONFIGS[case])
    ours, theirs = build(cfg).eval(), plain_hf(cfg)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 101, (2, 60), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_a_merged_model_has_the_same_logits() -> None:
    """The reparameterised model equals a LLaMA with weights s B A + S."""
    model = build(tiny(), reparameterize=sltrain).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):  # zero at the start
                parameter.normal_(0, 0.1, generator=generator_for(0, name))
    ids = torch.randint(0, 101, (2, 60), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    merge(model)
    plain = plain_hf(tiny())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(before, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["as published", "rope base", "rope scaling"])
def test_rotary_tables_equal_transformers(case: str, dtype: torch.dtype) -> None:
    """They are neither parameters nor in checkpoints, and are float32 in bfloat16 models too."""
    cfg = tiny(**CONFIGS[case])
    ours, theirs = build(cfg, dtype=dtype), plain_hf(cfg)
    names = [n for n, _ in theirs.named_buffers()]
    assert names
    assert [n for n, _ in ours.named_buffers()] == names
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b), name
    assert ours.model.rotary_emb.attention_scaling == theirs.model.rotary_emb.attention_scaling


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", [None, lowrank, relora, sltrain])
def test_initial_values_depend_on_seed_and_name_only(method: Any) -> None:
    """They do not depend on the default generator, the device of construction, the order of modules, or other layers."""
    torch.manual_seed(1)
    first = state(build(tiny(), reparameterize=method))
    torch.manual_seed(2)
    torch.randn(100)
    again = state(build(tiny(), reparameterize=method))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)

    # Built by transformers on the CPU, with the method applied to it, then initialised.
    on_cpu = plain_hf(tiny())
    if method is not None:
        method(on_cpu)
    initialize(on_cpu, 11)
    assert all(torch.equal(first[k], v) for k, v in state(on_cpu).items())

    # With one layer more, and the head drawn first, the common part is equal.
    deeper = build(tiny(num_hidden_layers=3), reparameterize=method, device="meta")
    deeper._modules = dict(reversed(deeper._modules.items()))
    materialize(deeper, "cpu")
    initialize(deeper, 11)
    values = state(deeper)
    assert next(iter(values)).startswith("lm_head")
    assert all(torch.equal(v, values[k]) for k, v in first.items())

    other = state(build(tiny(), reparameterize=method, seed=12))
    drawn = [k for k, v in first.items() if v.is_floating_point() and v.float().std() > 0]
    assert all(not torch.equal(first[k], other[k]) for k in drawn)


@pytest.mark.parametrize("method", [None, lowrank, relora, sltrain])
def test_bfloat16_starts_from_the_rounded_float32_values(method: Any) -> None:
    wide, narrow = (state(build(tiny(), reparameterize=method, dtype=d)) for d in (torch.float32, torch.bfloat16))
    for name, value in wide.items():
        expected = value.bfloat16() if value.is_floating_point() else value
        assert torch.equal(expected, narrow[name]), name


def test_initial_values_have_the_published_distribution() -> None:
    """Embedding and head are N(0, 0.02^2) without a zero padding row, norms 1, biases 0, and layers differ."""
    cfg = load_model_config(ROOT / "configs" / "llama_9m.json")
    model = build(replace(cfg, vocab_size=2000, attention_bias=True))
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight):
        # 6 standard errors of mean and standard deviation of n normal draws
        n = weight.numel()
        assert abs(weight.mean().item()) < 6 * 0.02 / n**0.5
        assert abs(weight.std().item() / 0.02 - 1) < 6 / (2 * n) ** 0.5
        assert weight.norm(dim=1).min() > 0.1
    assert all((p == 1).all() for n, p in model.named_parameters() if n.endswith("norm.weight"))
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))
    projections = [p for n, p in model.named_parameters() if n.endswith("q_proj.weight")]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(projections, 2))


def test_an_unknown_module_is_refused_by_initialize() -> None:
    model = build(tiny())
    model.model.layers[0].extra = nn.LayerNorm(4)
    with pytest.raises(TypeError, match=r"model\.layers\.0\.extra"):
        initialize(model, 0)


def test_every_embedding_row_can_learn() -> None:
    """transformers gives the padding id's row no gradient, which for the published -1 would be the last real token's row."""
    model = build(tiny(pad_token_id=1))
    ids = torch.arange(101).reshape(1, 101)
    TokenLoss(model)(ids, ids).backward()
    # The very last token predicts nothing, so nothing depends on its embedding.
    assert (model.model.embed_tokens.weight.grad[:100].norm(dim=1) > 0).all()


def test_tied_weights_stay_tied() -> None:
    model = build(tiny(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert numel(model) == numel(build(tiny())) - 101 * 32


def test_the_model_trains_with_sdpa_and_without_a_cache() -> None:
    model = build(tiny(), reparameterize=sltrain)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not model.config.use_cache
    layers = [m for m in model.modules() if isinstance(m, SparseLowRankLinear)]
    assert len(layers) == 2 * 7
    assert model.generation_config.use_cache  # generation still has its cache


def test_attention_runs_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask tensor would keep scaled-dot-product attention from its fast kernels."""
    calls = []
    original = nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return original(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    ids = torch.randint(0, 101, (2, 12))
    TokenLoss(build(tiny()))(ids, ids)
    assert calls == [(None, True)] * 2


def training_step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 101, (2, 40), generator=torch.Generator().manual_seed(4))
    loss = TokenLoss(model)(ids, ids)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def saved_bytes(model: Any) -> int:
    """Returns the bytes that the decoder saves for backward, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = model.model(input_ids=torch.zeros(2, 40, dtype=torch.long), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [None, sltrain])
def test_activation_checkpointing_saves_less_and_changes_nothing(method: Any, dtype: torch.dtype) -> None:
    """Loss and gradients are bit-identical; "layer" saves one hidden state per layer instead of about twenty."""
    loss, grads = training_step(build(tiny(), reparameterize=method, dtype=dtype))
    for kind in ("layer", "selective"):
        model = build(tiny(), reparameterize=method, dtype=dtype, activation_checkpointing=kind)
        other_loss, other_grads = training_step(model)
        assert torch.equal(loss, other_loss)
        assert all(torch.equal(grads[n], other_grads[n]) for n in grads)
    whole = saved_bytes(build(tiny(), reparameterize=method, dtype=dtype))
    assert saved_bytes(build(tiny(), reparameterize=method, dtype=dtype, activation_checkpointing="layer")) < whole / 3


def test_an_unknown_kind_of_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--activation_checkpointing full: not one of layer, selective"):
        build(tiny(), activation_checkpointing="full", device="meta")


@pytest.mark.parametrize("kind", [None, "layer"])
def test_compiled_layers_give_the_same_step_from_one_compilation(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoder layer runs compiled, without a graph break, and all share one graph. No code is generated."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager_decomp_partition"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss, grads = training_step(build(tiny(), reparameterize=sltrain))
    model = build(tiny(), reparameterize=sltrain, compile=True, activation_checkpointing=kind)
    names = list(model.state_dict())
    compiled_loss, compiled_grads = training_step(model)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert not any("_orig_mod" in name for name in names)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    for name in grads:
        torch.testing.assert_close(compiled_grads[name], grads[name], rtol=1e-3, atol=1e-4)
