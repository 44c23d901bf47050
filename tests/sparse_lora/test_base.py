"""Fine-tuning with W = W0 + (alpha/r) B A + S: single linears with a base weight W0, and transformers' models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lora import (
    AdaptedLinear,
    SLTrainConfig,
    adapter_parameters,
    adapter_state,
    dense_reference,
    generator_for,
    merge,
    reparameterize,
)
from sparse_lora.adapted import largest_entries
from sparse_lora.functional import PATHS
from sparse_lora.reparameterize import ALL_LINEARS

IN, OUT, RANK = 40, 30, 3
SUPPORTS: dict[str, dict[str, Any]] = {
    "uniform": {"sparsity": 0.1},
    "block": {"sparsity": 0.2, "support": "block"},
    "largest": {"sparsity": 0.1, "support": "largest"},
    "none": {"sparsity": 0.0},
}
every_support = pytest.mark.parametrize("options", SUPPORTS.values(), ids=SUPPORTS.keys())


def linear(dtype: torch.dtype = torch.float64, bias: bool = True, inputs: int = IN, outputs: int = OUT) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias)
    generator = generator_for(0, "linear")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made.to(dtype)


def trained(layer: AdaptedLinear) -> AdaptedLinear:
    """Makes all adapter values non-zero, as after some updates; returns the layer."""
    with torch.no_grad():
        for number, parameter in enumerate(layer.adapter):
            parameter.add_(torch.randn(parameter.shape, generator=generator_for(number, "trained")))
    return layer


def rows(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, IN, generator=generator_for(1, "x"), dtype=torch.float64).to(dtype)


@every_support
@pytest.mark.parametrize("path", ["auto", *PATHS])
@pytest.mark.parametrize("base_trains", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_outputs_and_gradients_equal_those_of_the_dense_weight(
    options: dict[str, Any], path: str, base_trains: bool, scaled: bool
) -> None:
    """Compared with W0 + scaling B A + S by plain autograd; W0 and bias have gradients only if they train."""
    plain = linear().requires_grad_(base_trains)
    layer = trained(AdaptedLinear(plain, RANK, alpha=5.0, path=path, trainable_scaling=scaled, seed=2, **options))
    x = rows(11).requires_grad_()
    expected = dense_reference(
        x,
        layer.lora_A,
        layer.lora_B,
        layer.sparse_value,
        layer.support,
        layer.effective_scaling(),
        plain.bias,
        layer.weight,
    )
    output = layer(x)
    assert torch.allclose(output, expected, rtol=1e-12)
    assert torch.allclose(nn.functional.linear(x, layer.dense_weight(), plain.bias), expected, rtol=1e-12)
    wanted = [x, *layer.adapter, *([plain.weight, plain.bias] if base_trains else [])]
    own, dense = (torch.autograd.grad(y.square().sum(), wanted) for y in (output, expected))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(own, dense, strict=True))


def test_second_derivatives_include_the_base() -> None:
    layer = trained(AdaptedLinear(linear(inputs=7, outputs=6), 2, 0.2, path="materialised", seed=2))
    tensors = [rows(3)[:, :7].requires_grad_(), *layer.adapter, layer.weight]

    def function(x: Tensor, *_: Tensor) -> Tensor:
        return torch.tanh(layer(x))

    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_support
def test_the_initial_output_equals_the_linears(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Bit-identical, because B and the sparse values are 0."""
    plain = linear(dtype)
    layer = AdaptedLinear(plain, RANK, seed=3, **options)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    for count in (2, 50):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(layer(rows(count, dtype)), plain(rows(count, dtype)))
    assert torch.equal(layer.dense_weight(), plain.weight)


def test_a_frozen_base_gets_no_gradient_and_nothing_of_its_size_is_saved() -> None:
    """Backward leaves gradients of the adapter only, and forward saves only inputs and parameters."""
    layer = AdaptedLinear(linear().requires_grad_(False), RANK, 0.1, seed=3)
    adapter = {p.data_ptr() for p in layer.adapter} | {layer.weight.data_ptr()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(rows(11))
    y.sum().backward()
    assert layer.weight.grad is None
    assert layer.bias is not None
    assert layer.bias.grad is None
    assert layer.lora_B.grad is not None
    assert layer.sparse_value is not None
    assert layer.sparse_value.grad is not None
    assert all(t.numel() < IN * OUT or t.data_ptr() in adapter for t in saved)


def test_changes_too_small_for_a_bfloat16_weight_change_the_output() -> None:
    """Half a unit in the last place of W0 = 1 is lost in W0 + S, but not in the sum of the products."""
    plain = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(plain.weight)
    layer = AdaptedLinear(plain, 1, 1.0, seed=0)
    assert layer.sparse_value is not None
    with torch.no_grad():
        layer.sparse_value.view(OUT, IN)[:, 0] = 2.0**-9
    x = torch.zeros(33, IN, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 1.0, -1.0
    assert torch.equal(layer.dense_weight(), plain.weight)
    assert torch.equal(layer(x), torch.full((33, OUT), 2.0**-9, dtype=torch.bfloat16))


@pytest.mark.parametrize("count", [1, 7, 300, IN * OUT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_entries_are_the_largest(count: int, dtype: torch.dtype) -> None:
    """Compared with sorting in Python; of equal entries (bfloat16 has many) the first come first."""
    weight = linear(dtype).weight
    flat = weight.detach().float().abs().flatten().tolist()
    expected = sorted(sorted(range(len(flat)), key=lambda place: (-flat[place], place))[:count])
    assert largest_entries(weight, count).tolist() == expected


def test_of_equal_entries_the_first_are_taken() -> None:
    weight = torch.ones(4, 5)
    weight[3, 4] = -2
    assert largest_entries(weight, 3).tolist() == [0, 1, 19]


def test_the_gradient_of_a_trained_base_is_not_in_scratch_memory() -> None:
    """Two layers large enough to share scratch memory (scratch_matrix) have separate gradients."""
    layers = [AdaptedLinear(nn.Linear(1024, 1100, bias=False), 2, 0.001, path="materialised") for _ in range(2)]
    x = torch.randn(3, 1024, generator=generator_for(0, "x"))
    grads = [torch.autograd.grad(layer(x).square().sum(), layer.weight)[0] for layer in layers]
    for layer, grad in zip(layers, grads, strict=True):
        assert torch.allclose(grad, 2 * (x @ layer.weight.t()).t() @ x, atol=1e-4)


def test_a_weight_with_nan_has_no_largest_entries() -> None:
    with pytest.raises(ValueError, match="entries that are NaN"):
        largest_entries(torch.tensor([[1.0, torch.nan], [3.0, 4.0]]), 2)


def test_the_state_of_a_single_adapted_layer_has_its_support() -> None:
    model = nn.Sequential(linear())
    reparameterize(model, SLTrainConfig(rank=RANK, sparsity=0.1, base="frozen", target_modules=ALL_LINEARS))
    assert {f"0.{name}" for name in adapter_state(model[0])} == set(adapter_state(model))
    assert "support.code" in adapter_state(model[0])


def test_largest_entries_may_be_at_any_positions() -> None:
    """All of them are in one row, which the storage for drawn positions cannot represent."""
    plain = nn.Linear(1000, 300, bias=False)
    with torch.no_grad():
        plain.weight[7] += 100 + torch.arange(1000)
    layer = AdaptedLinear(plain, 2, 1000 / 300_000, support="largest")
    assert layer.support is not None
    assert layer.support.flat_indices().tolist() == list(range(7000, 8000))
    again = AdaptedLinear(plain, 2, 1000 / 300_000, support="largest")
    again.load_state_dict(layer.state_dict())


# --- Whole models ---


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=50, max_position_embeddings=20, **sizes)).eval()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=50, pad_token_id=1, **sizes)).eval()


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForSequenceClassification

    sizes = {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    return OPTForSequenceClassification(OPTConfig(vocab_size=50, max_position_embeddings=20, **sizes)).eval()


# The linears of a decoder or encoder layer as (in, out), twice each model, and the name of its classifier.
SQUARE, UP, DOWN = (16, 16), (16, 24), (24, 16)
MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, int]], str]] = {
    "roberta": (roberta, [SQUARE] * 4 + [UP, DOWN], "classifier"),
    "llama": (llama, [SQUARE] * 4 + [UP, UP, DOWN], "score"),
    "opt": (opt, [SQUARE] * 4 + [UP, DOWN], "score"),
}
every_model = pytest.mark.parametrize(("make", "shapes", "head"), MODELS.values(), ids=MODELS.keys())
IDS = torch.randint(3, 50, (4, 9), generator=generator_for(0, "ids"))


def settings(head: str, **options: Any) -> SLTrainConfig:
    known = {"rank": 2, "sparsity": 0.05, "base": "frozen", "target_modules": ALL_LINEARS, "trained_modules": (head,)}
    return SLTrainConfig(**known | options)


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@every_model
@pytest.mark.parametrize("support", ["uniform", "largest"])
def test_a_model_is_fine_tuned_and_merged(
    make: Callable[[], nn.Module], shapes: list[tuple[int, int]], head: str, support: str
) -> None:
    """Outputs are unchanged at first, only adapters and classifier train, counts are exact, and merging restores the classes."""
    model = make()
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith(head)}
    replaced = reparameterize(model, settings(head, support=support))
    assert len(replaced) == 2 * len(shapes)
    assert torch.equal(logits(model), before)
    expected = 2 * sum(2 * (fan_in + fan_out) + int(0.05 * fan_in * fan_out) for fan_in, fan_out in shapes)
    counts = adapter_parameters(model)
    assert list(counts) == replaced
    assert sum(counts.values()) == expected
    in_head = sum(p.numel() for p in model.get_submodule(head).parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected + in_head
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        optimizer.step()
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-3)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert merge(model) == replaced
    assert torch.allclose(logits(model), after, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names


@every_model
def test_an_adapters_state_restores_the_fine_tuned_model(
    make: Callable[[], nn.Module], shapes: list[tuple[int, int]], head: str
) -> None:
    """Loaded into the pretrained model; the state contains no base weights."""
    model = make()
    other = copy.deepcopy(model)
    for each in (model, other):
        reparameterize(each, settings(head))
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            trained(module)
    state = adapter_state(model)
    assert not [name for name in state if name.endswith(".weight") and not name.startswith(head)]
    other.load_state_dict(state, strict=False)
    assert torch.equal(logits(other), logits(model))


def test_a_trained_base_leaves_everything_trainable() -> None:
    model = roberta()
    reparameterize(model, settings("classifier", base="trained"))
    assert all(p.requires_grad for p in model.parameters())
    model(input_ids=IDS, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    layer = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"base": "loose"}, "base is 'loose', but it must be None or one of: frozen, trained"),
        ({"support": "largest"}, "'largest' selects entries of a base weight"),
        ({"trained_modules": ("classifier",)}, "without a base everything trains"),
        ({"base": "frozen", "trained_modules": "classifier"}, "trained_modules is 'classifier', but it must be names"),
        ({"base": "frozen", "support": "small"}, "support is 'small'"),
    ],
)
def test_invalid_fine_tuning_settings_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLTrainConfig(**bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trained_modules": ("score",)}, "'score': the model has no such module.*classifier"),
        ({"sparsity": 0.001}, "leaves no entry"),
    ],
)
def test_a_refused_model_is_unchanged(options: dict[str, Any], message: str) -> None:
    model = roberta()
    with pytest.raises(ValueError, match=message):
        reparameterize(model, settings("classifier", **options))
    assert not adapter_parameters(model)
    assert all(p.requires_grad for p in model.parameters())
