"""reparameterize replaces a model's linears, and merge turns them back into nn.Linear."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lora import SLTrainConfig, SparseLowRankLinear, merge, reparameterize

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


def test_a_module_shared_by_two_parents_stays_shared() -> None:
    model = Model()
    model.layers[1].mlp["up_proj"] = model.layers[0].mlp["up_proj"]
    reparameterize(model, CONFIG)
    assert isinstance(model.layers[0].mlp["up_proj"], SparseLowRankLinear)
    assert model.layers[1].mlp["up_proj"] is model.layers[0].mlp["up_proj"]
    merge(model)
    assert type(model.layers[0].mlp["up_proj"]) is nn.Linear
    assert model.layers[1].mlp["up_proj"] is model.layers[0].mlp["up_proj"]


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
