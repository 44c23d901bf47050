"""Replace a model's linears by low-rank plus sparse ones, and back."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .linear import SparseLowRankLinear, hyperparameter_problems
from .relora import ReLoRALinear
from .support import LARGEST
from .uniform import UniformSupport

# What the method leaves dense (arXiv 2406.02214, section 5.1): no linear with one of these in its name is replaced.
KEPT_DENSE = ("lm_head", "embed", "norm")

DEFAULT_TARGETS = ("attn", "mlp")
# Every linear that may be replaced, whatever its name: models differ in what they call attention.
ALL_LINEARS = ("*",)

# What becomes of the weights that a model has: "frozen" stays as it is, "trained" stays and trains.
BASES = ("frozen", "trained")


@dataclass(frozen=True)
class SLTrainConfig:
    """How `reparameterize` replaces linears; the values are explained at SparseLowRankLinear.

    target_modules: a linear is replaced when its qualified name contains one of these strings, as that of
    model.layers.0.self_attn.q_proj contains "attn"; "*" is in every name.

    base: None for pretraining, W = (alpha/r) B A + S with nothing left of the model's weights. For fine-tuning the weight W0 that
    a linear has stays, W = W0 + (alpha/r) B A + S (AdaptedLinear), and the model computes what it did until it is trained: with
    "frozen" the adapters and trained_modules are all that trains, in the whole model; with "trained" nothing is frozen.

    support: with a base also "largest", its entries of the largest magnitude.

    trained_modules: with a base, qualified names of modules, such as a new classifier, whose linears stay as they are and which
    train in full.

    Raises:
        ValueError: a value is out of its range (all problems in one message).
    """

    rank: int = 128
    sparsity: float = 0.03
    alpha: float = 32.0
    support: str = "uniform"
    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    trainable_scaling: bool = False
    seed: int = 0
    path: str = "auto"
    base: str | None = None
    trained_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        drawn = "uniform" if self.support == LARGEST and self.base is not None else self.support
        problems = hyperparameter_problems(self.rank, self.sparsity, self.alpha, drawn, self.path)
        problems += self._base_problems()
        targets = self.target_modules
        if isinstance(targets, str) or not targets or not all(isinstance(t, str) and t for t in targets):
            problems.append(f"target_modules is {targets!r}, but it must be names, such as {DEFAULT_TARGETS}")
        else:
            object.__setattr__(self, "target_modules", tuple(targets))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            problems.append(f"seed is {self.seed!r}, but it must be a whole number")
        if problems:
            raise ValueError("; ".join(problems))

    def _base_problems(self) -> list[str]:
        problems = []
        if self.base not in (None, *BASES):
            problems.append(f"base is {self.base!r}, but it must be None or one of: {', '.join(BASES)}")
        if self.base is None and self.support == LARGEST:
            problems.append("support 'largest' is that of a base's entries: give base='frozen' or 'trained' too")
        modules = self.trained_modules
        if isinstance(modules, str) or not all(isinstance(name, str) and name for name in modules):
            problems.append(f"trained_modules is {modules!r}, but it must be names, such as ('classifier',)")
        else:
            object.__setattr__(self, "trained_modules", tuple(modules))
        if self.base is None and modules:
            problems.append(f"trained_modules is {modules!r}, but without a base everything trains: leave it out")
        return problems


def reparameterize(model: nn.Module, config: SLTrainConfig) -> list[str]:
    """Replaces, in place, the model's targeted nn.Linear modules by SparseLowRankLinear with newly drawn weights, or, with
    config.base, by AdaptedLinear with the weights they have.

    Device, dtype, training mode and the presence of a bias are kept; without a base the old weights and biases are dropped.
    Every new tensor is drawn with (config.seed, its qualified name); a model on the meta device stays there, undrawn. Embedding,
    lm_head, norms, weights tied to an embedding, and subclasses of nn.Linear are left alone.

    Returns:
        Qualified names of the replaced modules, in the model's order.

    Raises:
        ValueError: no linear matches, one of the targets (unless they are the default ones) matches none, or the model has no
            module of a name in trained_modules.
    """
    if config.base is not None:
        # Fine-tuning only: by name, so that pretraining does not load the module.
        replaced: list[str] = importlib.import_module("sparse_lora.adapted").adapt(model, config)
        return replaced
    return replace_targets(model, config.target_modules, lambda linear, name: _sparse_lowrank_like(linear, name, config))


def attach_relora(
    model: nn.Module, *, rank: int, alpha: float = 32.0, trainable_scaling: bool = False, seed: int = 0
) -> list[str]:
    """Freezes, in place, the linears of attention and MLP and adds factors to them; arguments: see ReLoRALinear.

    Weights and biases are kept, so that the model computes what it did. Each factor is drawn with (seed, its qualified name); a
    model on the meta device stays there, undrawn.

    Returns:
        Qualified names of the changed modules, in the model's order.

    Raises:
        ValueError: no linear matches, or a value is out of its range.
    """

    def with_factors(linear: nn.Linear, name: str) -> nn.Module:
        layer = ReLoRALinear(
            linear.in_features,
            linear.out_features,
            rank,
            alpha=alpha,
            bias=linear.bias is not None,
            trainable_scaling=trainable_scaling,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        layer.bias = linear.bias
        if not linear.weight.is_meta:
            with torch.no_grad():
                for parameter_name, values in layer.initial_values(seed, name):
                    layer.get_parameter(parameter_name).copy_(values)
        return layer.train(linear.training)

    return replace_targets(model, DEFAULT_TARGETS, with_factors)


def replace_targets(
    model: nn.Module,
    targets: tuple[str, ...],
    change: Callable[[nn.Linear, str], nn.Module],
    kept_modules: Sequence[str] = (),
) -> list[str]:
    """Puts change(linear, name) in the place of every linear that matches and is not inside one of kept_modules, by qualified
    name; returns and raises what `reparameterize` does."""
    inside = tuple(f"{module}." for module in kept_modules)
    eligible = {name: linear for name, linear in _eligible_linears(model).items() if not f"{name}.".startswith(inside)}
    replaced = [name for name in eligible if any(_matches(target, name) for target in targets)]
    unmatched = [t for t in targets if not any(_matches(t, name) for name in eligible)]
    # A model without one of the two default blocks is no mistake; a target that somebody wrote is meant.
    if not replaced or (unmatched and targets != DEFAULT_TARGETS):
        names = ", ".join(list(eligible)[:5]) or "none"
        raise ValueError(
            f"target_modules {', '.join(map(repr, unmatched))} match no linear of the model that can be replaced "
            f"({', '.join([*KEPT_DENSE, *kept_modules])} are left dense): choose parts of names such as: {names}"
        )
    _replace(model, {id(eligible[name]): change(eligible[name], name) for name in replaced})
    return replaced


def _matches(target: str, name: str) -> bool:
    return target in ALL_LINEARS or target in name


def merge(model: nn.Module) -> list[str]:
    """Replaces, in place, every SparseLowRankLinear (AdaptedLinear is one) and ReLoRALinear by an nn.Linear with its
    dense_weight() and bias.

    Returns:
        Qualified names of the replaced modules; empty when the model has none.

    Raises:
        ValueError: the model is itself such a layer, which cannot be replaced in place.
    """
    kinds = (SparseLowRankLinear, ReLoRALinear)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if "" in layers:
        raise ValueError(f"the model is itself a {type(model).__name__}: wrap it in a module, or use its dense_weight()")
    _replace(model, {id(layer): _linear_like(layer) for layer in layers.values()})
    return list(layers)


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Puts the model into eval mode without gradients, and makes the tables by row that products of few rows need.

    A uniform support's table takes 2 bytes per nonzero (4 from 32,769 inputs on) and 4 per row. Loading other positions does not
    update the table: call this function again. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, UniformSupport):
            module.keep_rows()
    return model.eval().requires_grad_(False)


def _eligible_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linears that may be replaced, by name.

    A subclass of nn.Linear is something else (nn.MultiheadAttention reads its weight without calling it, quantised ones
    store it differently), and a weight shared with an embedding stays dense.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and type(module) is nn.Linear
        and id(module.weight) not in embeddings
        and not any(kept in name for kept in KEPT_DENSE)
    }


def _sparse_lowrank_like(linear: nn.Linear, name: str, config: SLTrainConfig) -> SparseLowRankLinear:
    with torch.device("meta"):
        layer = SparseLowRankLinear(
            linear.in_features,
            linear.out_features,
            config.rank,
            config.sparsity,
            alpha=config.alpha,
            bias=linear.bias is not None,
            support=config.support,
            trainable_scaling=config.trainable_scaling,
            path=config.path,
            dtype=linear.weight.dtype,
        )
    if not linear.weight.is_meta:
        layer.to_empty(device=linear.weight.device)
        layer.reset_parameters(config.seed, name)
    return layer.train(linear.training)


@torch.no_grad()
def _linear_like(layer: SparseLowRankLinear | ReLoRALinear) -> nn.Linear:
    weight = layer.dense_weight()
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:
        linear.bias = layer.bias
    return linear.train(layer.training)


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Puts replacements[id(module)] wherever the module hangs in the model, under several names if it is shared."""
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if id(child) in replacements:
                setattr(parent, child_name, replacements[id(child)])
