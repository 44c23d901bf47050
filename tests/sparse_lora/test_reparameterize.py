"""reparameterize replaces a model's linears, and merge turns them back into nn.Linear."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lora import SLTrainConfig, SparseLowRankLinear, attach_relora, merge, reparameterize

CONFIG = SLTrainConfig(rank=4, sparsity=0.1, seed=5)


class Block(nn.Module):
    """A layer whose module names are those of transformers' LLaMA."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(24)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(24, 24, bias=bias), "o_proj": nn.Linear(24, 24, bias=bias)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(24, 40), "down_proj": nn.Linear(40, 24)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn["o_proj"](torch.tanh(self.self_attn["q_proj"](self.input_layernorm(x))))
        return x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 24)
        self.layers = nn.ModuleList([Block(), Block(bias=True)])
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


NAMES = [
    f"layers.{layer}.{name}"
    for layer in (0, 1)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


def test_attention_and_mlp_are_replaced_and_the_rest_is_untouched() -> None:
    """Embedding, lm_head and norms keep their tensors; the new layers keep shape, bias, dtype and training mode."""
    model = Model().to(torch.bfloat16).eval()
    kept = {id(p) for name, p in model.named_parameters() if "attn" not in name and "mlp" not in name}
    shapes = {name: (m.weight.shape, m.bias is not None) for name, m in model.named_modules() if name in NAMES}
    assert reparameterize(model, CONFIG) == NAMES
    modules = dict(model.named_modules())
    for name in NAMES:
        layer = modules[name]
        assert isinstance(layer, SparseLowRankLinear)
        assert ((layer.out_features, layer.in_features), layer.bias is not None) == shapes[name]
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        assert (layer.rank, layer.sparsity, layer.training) == (4, 0.1, False)
    left = {id(p) for name, p in model.named_parameters() if "attn" not in name and "mlp" not in name}
    assert left == kept
    assert type(model.lm_head) is nn.Linear
    assert model(torch.arange(6)).shape == (6, 50)


def test_every_option_reaches_the_layers() -> None:
    model = Model()
    reparameterize(model, SLTrainConfig(rank=3, sparsity=0.2, alpha=7.0, trainable_scaling=True))
    layer = model.layers[0].mlp["up_proj"]
    assert (layer.rank, layer.sparsity, layer.alpha) == (3, 0.2, 7.0)
    assert layer.scaling is not None


def test_a_narrower_target_replaces_only_what_it_names() -> None:
    assert reparameterize(Model(), SLTrainConfig(rank=4, target_modules=("q_proj", "1.mlp"))) == [
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
        "layers.1.mlp.down_proj",
    ]


def test_initial_values_depend_only_on_seed_and_qualified_name() -> None:
    """They depend neither on the other replaced layers nor on a detour over the meta device."""
    whole, part = Model(), Model()
    reparameterize(whole, CONFIG)
    reparameterize(part, SLTrainConfig(rank=4, sparsity=0.1, seed=5, target_modules=("down_proj",)))
    with torch.device("meta"):
        later = Model()
    assert reparameterize(later, CONFIG) == NAMES
    assert all(p.is_meta for p in later.parameters())
    later.to_empty(device="cpu")
    for name, module in later.named_modules():
        if isinstance(module, SparseLowRankLinear):
            module.reset_parameters(5, name)
    expected = whole.layers[1].mlp["down_proj"].state_dict()
    for other in (part, later):
        found = other.layers[1].mlp["down_proj"].state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not torch.equal(whole.layers[0].mlp["down_proj"].lora_A, whole.layers[1].mlp["down_proj"].lora_A)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("attention",), r"target_modules 'attention' match no linear .*layers.0.self_attn.q_proj"),
        (("attn", "mpl"), r"target_modules 'mpl' match no linear"),
        (("lm_head",), r"'lm_head' match no linear .*\(lm_head, embed, norm stay dense\)"),
        (("embed_tokens", "norm"), r"'embed_tokens', 'norm' match no linear"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_and_the_model_unchanged(targets: tuple[str, ...], message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        reparameterize(model, SLTrainConfig(rank=4, target_modules=targets))
    assert not any(isinstance(module, SparseLowRankLinear) for module in model.modules())


def test_the_default_targets_accept_a_model_that_matches_one_of_them() -> None:
    """One unmatched default target is accepted, because it cannot be a typing error; a model that matches none is refused."""
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8)})
    assert reparameterize(model, SLTrainConfig(rank=2, sparsity=0.1)) == ["mlp"]
    with pytest.raises(ValueError, match=r"'attn', 'mlp' match no linear .*such as: head"):
        reparameterize(nn.ModuleDict({"head": nn.Linear(8, 8)}), SLTrainConfig())


def test_a_layer_too_small_for_the_sparsity_leaves_the_model_unchanged() -> None:
    """All new layers are built before the first is replaced."""
    model = Model()
    with pytest.raises(ValueError, match=r"sparsity 0.001 of a 24 x 24 weight leaves no entry"):
        reparameterize(model, SLTrainConfig(rank=4, sparsity=0.001))
    assert not any(isinstance(module, SparseLowRankLinear) for module in model.modules())


def test_tied_weights_and_subclasses_of_linear_are_not_replaced() -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(50, 24), "mlp_out": nn.Linear(24, 50, bias=False)})
    model["mlp_out"].weight = model["tokens"].weight
    model["attn"] = nn.MultiheadAttention(24, 2)  # its out_proj is a subclass of nn.Linear whose forward is not called
    with pytest.raises(ValueError, match="match no linear"):
        reparameterize(model, SLTrainConfig(rank=4))


def messages(model: nn.Module, config: SLTrainConfig) -> list[str]:
    """The warnings of reparameterize."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reparameterize(model, config)
    return [str(warning.message) for warning in caught]


class Conv1D(nn.Module):
    """As in transformers' GPT-2: the weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24, 24))


def block(attention: dict[str, nn.Module], feed_forward: dict[str, nn.Module]) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({**attention, **feed_forward})]), "lm_head": linear()})


def linear() -> nn.Linear:
    return nn.Linear(24, 24)


def test_a_model_of_which_both_blocks_are_replaced_gives_no_warning() -> None:
    assert messages(Model(), CONFIG) == []
    assert messages(nn.ModuleDict({"mlp": linear()}), CONFIG) == []


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        # transformers' ViT, OPT; torchvision's ViT; torch's own encoder layer.
        (block({"attention": nn.ModuleDict({"q_proj": linear()})}, {"mlp": linear()}), ["layers.0.attention.q_proj", "'attn'"]),
        (block({"self_attn": nn.ModuleDict({"q_proj": linear()})}, {"fc1": linear()}), ["layers.0.fc1", "'mlp'"]),
        (
            block({"self_attention": nn.MultiheadAttention(24, 2)}, {"mlp": linear()}),
            ["layers.0.self_attention: MultiheadAttention", "nn.Linear"],
        ),
        (block({"attn": nn.MultiheadAttention(24, 2)}, {"mlp": linear()}), ["layers.0.attn: MultiheadAttention", "nn.Linear"]),
        (block({"attn": linear()}, {"mlp": Conv1D()}), ["layers.0.mlp: Conv1D", "transposed", "nn.Linear"]),
        (
            block({"attn": linear()}, {"mlp": nn.modules.linear.NonDynamicallyQuantizableLinear(24, 24)}),
            ["layers.0.mlp: NonDynamicallyQuantizableLinear", "subclass"],
        ),
    ],
    ids=["vit", "opt", "torchvision", "multihead", "conv1d", "subclass"],
)
def test_a_half_converted_model_is_warned_of_by_name(model: nn.Module, parts: list[str]) -> None:
    (text,) = messages(model, SLTrainConfig(rank=4, sparsity=0.1))
    for part in ["modules of the model stay dense", *parts]:
        assert part in text
    assert "lm_head" not in text


def test_what_a_wider_target_cannot_replace_is_warned_of() -> None:
    model = block({"attn": nn.MultiheadAttention(24, 2)}, {"mlp": linear()})
    (text,) = messages(model, SLTrainConfig(rank=4, sparsity=0.1, target_modules=("*",)))
    assert "layers.0.attn: MultiheadAttention" in text
    assert messages(block({}, {"mlp": linear(), "fc": linear()}), SLTrainConfig(rank=4, target_modules=("mlp",))) == []


@pytest.mark.parametrize("base", [None, "frozen"])
def test_a_model_is_not_converted_twice(base: str | None) -> None:
    model = Model()
    config = SLTrainConfig(rank=4, sparsity=0.1, base=base)
    reparameterize(model, config)
    kept = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.* is replaced already; call merge\(model\) first"):
        reparameterize(model, config)
    assert dict(model.named_parameters()) == kept
    with pytest.raises(ValueError, match=r"is replaced already; call merge"):
        attach_relora(model, rank=4)
    merge(model)
    assert reparameterize(model, config) == NAMES


def test_two_calls_may_share_a_model() -> None:
    model = Model()
    reparameterize(model, SLTrainConfig(rank=4, sparsity=0.1, target_modules=("attn",)))
    assert messages(model, SLTrainConfig(rank=2, sparsity=0.1)) == []
    assert len([m for m in model.modules() if isinstance(m, SparseLowRankLinear)]) == len(NAMES)


def test_gpt2_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attn, layers\.0\.mlp: Conv1D stores its weight transposed; put nn\.Linear"):
        reparameterize(block({"attn": Conv1D()}, {"mlp": Conv1D()}), CONFIG)


@pytest.mark.parametrize("base", [None, "frozen"])
def test_more_parameters_than_the_dense_weight_are_warned_of(base: str | None) -> None:
    """24 x 24 with int(.1 * 576) = 57 values leaves room for (576 - 57) // 48 = 10 ranks; 24 x 40 for (960 - 96) // 64 = 13."""
    (text,) = messages(Model(), SLTrainConfig(rank=14, sparsity=0.1, base=base))
    assert "layers.0.self_attn.q_proj, layers.0.self_attn.o_proj" in text
    assert f"rank 14 gives {14 * 48 + 57:,} parameters, more than the 576 of the dense weight; use a rank of at most 10" in text
    assert messages(Model(), SLTrainConfig(rank=10, sparsity=0.1, base=base)) == []
    (text,) = messages(Model(), SLTrainConfig(rank=1, sparsity=1.0, base=base))
    assert "leave them dense" in text


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "pretraining": lambda model: reparameterize(model, ENCODER),
    "frozen": lambda model: reparameterize(model, dataclasses.replace(ENCODER, base="frozen")),
    "trained": lambda model: reparameterize(model, dataclasses.replace(ENCODER, base="trained")),
}
ENCODER = SLTrainConfig(rank=2, sparsity=0.1, target_modules=("linear1", "linear2"))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_of_torch_computes_in_eval_mode_what_it_does_in_training(change: str, masked: bool) -> None:
    """torch's fast paths would read `weight` of the replaced linears: absent, or without the factors."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 40, batch_first=True, dropout=0.0), 2)
    x = torch.randn(2, 5, 24)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    read = torch.tensor([[True] * 5, [True] * 3 + [not masked] * 2])
    switches = (encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu)
    CHANGES[change](encoder)
    for name, parameter in encoder.named_parameters():
        if "lora_" in name or "sparse" in name:
            nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        expected = encoder.train()(x, src_key_padding_mask=mask)[read]
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=mask)[read], expected)
        copied = copy.deepcopy(encoder)
        torch.testing.assert_close(copied(x, src_key_padding_mask=mask)[read], expected)
        merge(encoder)
        assert (encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu) == switches
        torch.testing.assert_close(encoder(x, src_key_padding_mask=mask)[read], expected, rtol=1e-4, atol=1e-5)


def test_relora_in_an_encoder_of_torch_keeps_its_factors_in_eval_mode() -> None:
    torch.manual_seed(0)
    encoder = nn.ModuleDict({"mlp": nn.TransformerEncoderLayer(24, 2, 40, batch_first=True, dropout=0.0)})
    attach_relora(encoder, rank=2)
    for name, parameter in encoder.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        torch.testing.assert_close(encoder["mlp"].eval()(x), encoder["mlp"].train()(x))


def test_a_model_that_reads_the_weight_of_a_linear_gets_the_dense_weight() -> None:
    """As transformers' T5 does, to cast inputs to its dtype."""
    layer = SparseLowRankLinear(24, 40, 4, 0.1, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    assert torch.equal(layer.weight, layer.dense_weight())
    assert "weight" not in dict(layer.named_parameters())
    assert "weight" not in layer.state_dict()


def test_a_module_shared_by_two_parents_stays_shared() -> None:
    model = Model()
    model.layers[1].mlp["up_proj"] = model.layers[0].mlp["up_proj"]
    reparameterize(model, CONFIG)
    assert isinstance(model.layers[0].mlp["up_proj"], SparseLowRankLinear)
    assert model.layers[1].mlp["up_proj"] is model.layers[0].mlp["up_proj"]
    merge(model)
    assert type(model.layers[0].mlp["up_proj"]) is nn.Linear
    assert model.layers[1].mlp["up_proj"] is model.layers[0].mlp["up_proj"]


def test_a_module_with_two_names_in_one_parent_stays_shared() -> None:
    model = nn.ModuleDict({"mlp": nn.ModuleList([nn.Linear(16, 24)] * 2)})
    assert reparameterize(model, SLTrainConfig(rank=2, sparsity=0.1, target_modules=("mlp",))) == ["mlp.0"]
    first, second = model["mlp"]
    assert isinstance(first, SparseLowRankLinear)
    assert second is first
    merge(model)
    first, second = model["mlp"]
    assert type(first) is nn.Linear
    assert second is first


def test_linears_that_share_a_weight_stay_dense() -> None:
    model = nn.ModuleDict({"attn": nn.Linear(16, 16), "mlp": nn.Linear(16, 16), "mlp_up": nn.Linear(16, 16)})
    model["mlp"].weight = model["attn"].weight
    with pytest.warns(UserWarning, match="attn"):
        assert reparameterize(model, SLTrainConfig(rank=2, sparsity=0.1)) == ["mlp_up"]
    assert model["mlp"].weight is model["attn"].weight


@pytest.mark.parametrize("options", [{"target_modules": 5}, {"trained_modules": None}, {"target_modules": [1]}])
def test_modules_that_are_not_named_are_refused_with_all_other_problems(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"rank.*{next(iter(options))} is .* must be names"):
        SLTrainConfig(rank=0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merging_keeps_the_outputs(dtype: torch.dtype) -> None:
    """Outputs are bit-identical if forward builds the weight (100 rows), and equal up to rounding if factored (1 row)."""
    model = Model().to(dtype)
    reparameterize(model, CONFIG)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    many, one = torch.arange(100) % 50, torch.tensor([3])
    with torch.no_grad():
        expected_many, expected_one = model(many), model(one)
        assert merge(model) == NAMES
        assert not any(isinstance(module, SparseLowRankLinear) for module in model.modules())
        assert torch.equal(model(many), expected_many)
        error = (model(one) - expected_one).double().norm() / expected_one.double().norm()
    assert error <= 8 * torch.finfo(dtype).eps
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert [name for name, _ in Model().named_parameters()] == [name for name, _ in model.named_parameters()]


def test_merging_a_model_without_such_layers_changes_nothing() -> None:
    assert merge(Model()) == []


def test_a_bare_layer_cannot_be_merged_in_place() -> None:
    with pytest.raises(ValueError, match="wrap it in a module"):
        merge(SparseLowRankLinear(8, 8, 2, 0.1))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"sparsity": 3}, "sparsity is 3"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"support": "blocks"}, "support is 'blocks'"),
        ({"target_modules": "attn"}, "target_modules is 'attn', but it must be names"),
        ({"target_modules": ()}, r"target_modules is \(\)"),
        ({"target_modules": ("",)}, r"target_modules is \(''"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"rank": -1, "seed": None}, "rank is -1.*; seed is None"),
    ],
)
def test_invalid_config_values_are_refused_by_name(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLTrainConfig(**bad)


def test_target_modules_can_be_a_list() -> None:
    assert SLTrainConfig(target_modules=["attn"]).target_modules == ("attn",)
