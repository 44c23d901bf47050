"""Replaces a model's linears by low-rank plus sparse ones, and back."""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .adapted import AdaptedLinear, freeze_but
from .linear import SparseLowRankLinear, hyperparameter_problems
from .relora import ReLoRALinear
from .support import LARGEST, Support

# Linears with one of these in their names stay dense (arXiv 2406.02214, section 5.1).
KEPT_DENSE = ("lm_head", "embed", "norm")

DEFAULT_TARGETS = ("attn", "mlp")
# Targets all linears that may be replaced, for models with other names for attention and MLP.
ALL_LINEARS = ("*",)

# The layers that replace a linear; AdaptedLinear is a subclass of SparseLowRankLinear.
FACTORED = (SparseLowRankLinear, ReLoRALinear)

# How fine-tuning treats the pretrained weights: "frozen" keeps them unchanged, "trained" trains them too.
BASES = ("frozen", "trained")


@dataclass(frozen=True)
class SLTrainConfig:
    """Settings of `reparameterize`; SparseLowRankLinear explains rank, sparsity, alpha, trainable_scaling, seed and path.

    target_modules: a linear is replaced if its qualified name contains one of these strings, as
    model.layers.0.self_attn.q_proj contains "attn"; "*" matches every name.

    base: None for pretraining: W = (alpha/r) B A + S, and the model's weights are dropped. For fine-tuning (AdaptedLinear),
    W = W0 + (alpha/r) B A + S keeps the weight W0, and the model's outputs do not change until it is trained. "frozen" trains
    only the adapters and trained_modules, in the whole model; "trained" freezes nothing.

    support: see SparseLowRankLinear; with a base also "largest", the largest-magnitude entries of W0.

    trained_modules: only with a base: qualified names of modules, such as a new classifier, which are not replaced and train in
    full.

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
        if not targets or not _are_names(targets):
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
            problems.append("support 'largest' selects entries of a base weight: set base='frozen' or 'trained' too")
        modules = self.trained_modules
        if not _are_names(modules):
            problems.append(f"trained_modules is {modules!r}, but it must be names, such as ('classifier',)")
            return problems
        object.__setattr__(self, "trained_modules", tuple(modules))
        if self.base is None and modules:
            problems.append(f"trained_modules is {modules!r}, but without a base everything trains: leave it out")
        return problems


def _are_names(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(name, str) and name for name in value)


def reparameterize(model: nn.Module, config: SLTrainConfig) -> list[str]:
    """Replaces the model's targeted nn.Linear modules in place: by SparseLowRankLinear, or by AdaptedLinear with config.base.

    SparseLowRankLinear gets newly drawn weights and biases; AdaptedLinear keeps the linear's. Device, dtype, training mode and
    the presence of a bias are kept. Every new tensor is drawn with (config.seed, its qualified name); on the meta device nothing
    is drawn. Embedding, lm_head, norms, weights shared with an embedding or another linear, and subclasses of nn.Linear are not
    replaced.

    Warns of targeted modules that stay dense, and of factors with more parameters than the dense weight.

    Returns:
        Qualified names of the replaced modules, in the model's order.

    Raises:
        ValueError: no linear matches, one of the targets (unless they are the defaults) matches no linear, or trained_modules
            names a module that the model does not have.
    """
    if config.base is not None:
        return _adapt(model, config)
    return _replace_targets(model, config.target_modules, lambda linear, name: _sparse_lowrank_like(linear, name, config))


def _adapt(model: nn.Module, config: SLTrainConfig) -> list[str]:
    """Replaces the targeted linears by AdaptedLinear, in place, and freezes all other parameters if config.base is "frozen"."""
    for name in config.trained_modules:
        if name not in dict(model.named_modules()):
            available = ", ".join(child for child, _ in model.named_children())
            raise ValueError(f"trained_modules {name!r}: the model has no such module; its top-level modules are: {available}")
    replaced = _replace_targets(
        model, config.target_modules, lambda linear, name: _adapted(linear, name, config), config.trained_modules
    )
    if config.base == "frozen":
        freeze_but(model, config.trained_modules)
    return replaced


def _adapted(linear: nn.Linear, name: str, config: SLTrainConfig) -> AdaptedLinear:
    return AdaptedLinear(
        linear,
        config.rank,
        config.sparsity,
        alpha=config.alpha,
        support=config.support,
        trainable_scaling=config.trainable_scaling,
        path=config.path,
        seed=config.seed,
        name=name,
    )


def attach_relora(
    model: nn.Module, *, rank: int, alpha: float = 32.0, trainable_scaling: bool = False, seed: int = 0
) -> list[str]:
    """Freezes the linears of attention and MLP in place and adds factors to them; see ReLoRALinear for the arguments.

    Weights and biases are kept, so the model's outputs do not change. Each factor is drawn with (seed, its qualified name); on
    the meta device nothing is drawn.

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

    return _replace_targets(model, DEFAULT_TARGETS, with_factors)


def _replace_targets(
    model: nn.Module,
    targets: tuple[str, ...],
    change: Callable[[nn.Linear, str], nn.Module],
    kept_modules: Sequence[str] = (),
) -> list[str]:
    """Replaces every matching linear by change(linear, name), except inside kept_modules, given by qualified name.

    Returns and raises the same as `reparameterize`.
    """
    inside = tuple(f"{module}." for module in kept_modules)
    outside = {name: module for name, module in model.named_modules() if not f"{name}.".startswith(inside)}
    eligible = {name: linear for name, linear in _eligible_linears(model).items() if name in outside}
    replaced = [name for name in eligible if any(_matches(target, name) for target in targets)]
    unmatched = [t for t in targets if not any(_matches(t, name) for name in eligible)]
    # A model may lack one of the two default blocks, but a target that the user wrote must match.
    if not replaced or (unmatched and targets != DEFAULT_TARGETS):
        names = ", ".join(list(eligible)[:5]) or "none"
        raise ValueError(
            f"target_modules {', '.join(map(repr, unmatched))} match no linear of the model that can be replaced "
            f"({', '.join([*KEPT_DENSE, *kept_modules])} stay dense): choose parts of names such as: {names}"
            + "".join(f"; {reason}" for reason in _why_dense(outside, tuple(unmatched)))
        )
    layers = {name: change(eligible[name], name) for name in replaced}
    _warn_of_dense(outside, targets, [name for name in eligible if name not in layers])
    _warn_of_size({name: (layer, eligible[name]) for name, layer in layers.items()})
    _replace(model, {id(eligible[name]): layer for name, layer in layers.items()})
    return replaced


# Modules with a dense weight that cannot be replaced, and what to do about them.
_ATTENTION = "reads its weights without calling its linears; use attention made of nn.Linear projections"
_TRANSPOSED = "stores its weight transposed; put nn.Linear modules in their place first"
_SUBCLASS = "a subclass of nn.Linear may use its weight differently; put plain nn.Linear modules in their place first"
_SHARED = "shares its weight with another linear; give each its own weight first"
_REPLACED = "is replaced already; call merge(model) first, or build the model anew"


def _why_dense(modules: Mapping[str, nn.Module], targets: tuple[str, ...]) -> list[str]:
    """One line for each kind of module that a target matches and that cannot be replaced: its names, and the way out."""
    attention = tuple(f"{name}." if name else "" for name, module in modules.items() if isinstance(module, nn.MultiheadAttention))
    names: dict[str, list[str]] = {}
    uses = _uses_of_weights(modules.values(), nn.Linear)
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            reason = _ATTENTION
        elif isinstance(module, FACTORED):
            reason = _REPLACED
        elif type(module).__name__ == "Conv1D":
            # A class of transformers, used in GPT-2.
            reason = _TRANSPOSED
        elif isinstance(module, nn.Linear) and type(module) is not nn.Linear and not name.startswith(attention):
            reason = _SUBCLASS
        elif type(module) is nn.Linear and uses[id(module.weight)] > 1:
            reason = _SHARED
        else:
            continue
        if any(_matches(target, name) for target in targets) and not any(kept in name for kept in KEPT_DENSE):
            names.setdefault(f"{type(module).__name__} {reason}", []).append(name)
    return [f"{_listed(of_reason)}: {reason}" for reason, of_reason in names.items()]


def _warn_of_dense(modules: Mapping[str, nn.Module], targets: tuple[str, ...], left: list[str]) -> None:
    """Warns of modules that a target matches and that stay dense, and of a default target that matches nothing.

    left: names of the linears that are not replaced.
    """
    linears = [name for name, module in modules.items() if type(module) is nn.Linear or isinstance(module, FACTORED)]
    unmatched = [target for target in targets if not any(_matches(target, name) for name in linears)]
    # A default target that matches no linear may miss attention or MLPs with other names, so all dense modules are listed.
    lines = [line for line in _why_dense(modules, ALL_LINEARS if unmatched else targets) if _REPLACED not in line]
    for target in unmatched:
        # Experts, for example, are parameters of their own.
        matrices = [name for name, m in modules.items() if target in name and any(p.dim() > 1 for p in m.parameters(False))]
        if (others := matrices or left) and not _why_dense(modules, (target,)):
            lines.append(
                f"{_listed(others)}: no linear's name contains {target!r}; add parts of the names to target_modules, or leave "
                f"{target!r} out of it"
            )
    if lines:
        warnings.warn(f"modules of the model stay dense: {'; '.join(lines)}", stacklevel=4)


def _warn_of_size(layers: Mapping[str, tuple[nn.Module, nn.Linear]]) -> None:
    """Warns of layers whose factors and sparse values have more parameters than the dense weight in whose place they are."""
    larger: dict[str, str] = {}
    ranks = []
    for name, (layer, linear) in layers.items():
        added = sum(p.numel() for key, p in layer.named_parameters(recurse=False) if key not in ("weight", "bias"))
        dense, per_rank, factor = linear.weight.numel(), sum(linear.weight.shape), layer.get_parameter("lora_A")
        if added > dense:
            larger[name] = f"rank {factor.shape[0]} gives {added:,} parameters, more than the {dense:,} of the dense weight"
            ranks.append((dense - added) // per_rank + factor.shape[0])
    if larger:
        way_out = f"use a rank of at most {min(ranks)}" if min(ranks) > 0 else "leave them dense"
        warnings.warn(f"{_listed(list(larger))}: {next(iter(larger.values()))}; {way_out}", stacklevel=4)


def _listed(names: Sequence[str]) -> str:
    """The first of several names, and how many there are."""
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def _matches(target: str, name: str) -> bool:
    return target in ALL_LINEARS or target in name


def merge(model: nn.Module) -> list[str]:
    """Replaces every SparseLowRankLinear, AdaptedLinear and ReLoRALinear in place by an nn.Linear with its dense weight and bias.

    Returns:
        Qualified names of the replaced modules; empty if the model has none.

    Raises:
        ValueError: the model itself is such a layer, which cannot be replaced in place.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FACTORED)}
    if "" in layers:
        raise ValueError(f"the model itself is a {type(model).__name__}: wrap it in a module, or use its dense_weight()")
    _replace(model, {id(layer): _linear_like(layer) for layer in layers.values()})
    return list(layers)


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Puts the model into eval mode without gradients, and makes the tables by row that products of few rows need.

    A uniform support's table takes 2 bytes per nonzero (4 from 32,769 inputs on) and 4 per row. Drawing or loading other
    positions drops the table, and few rows are computed like many until this function is called again. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, Support):
            module.keep_rows()
    return model.eval().requires_grad_(False)


def _eligible_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linears that may be replaced, by name.

    Subclasses of nn.Linear are excluded, because some use the weight differently (nn.MultiheadAttention reads it without calling
    the module, quantised linears store it differently). A weight that an embedding or another linear shares stays dense.
    """
    uses = _uses_of_weights(model.modules(), nn.Embedding, nn.Linear)
    return {
        name: module
        for name, module in model.named_modules()
        if name and type(module) is nn.Linear and uses[id(module.weight)] == 1 and not any(kept in name for kept in KEPT_DENSE)
    }


def _uses_of_weights(modules: Iterable[nn.Module], *kinds: type[nn.Module]) -> Counter[int]:
    """Counts the modules of these kinds that have each weight, by the weight's id."""
    return Counter(id(getattr(module, "weight", None)) for module in modules if isinstance(module, kinds))


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
    """Puts replacements[id(module)] in the module's place in the model; a shared module is replaced under all of its names."""
    for parent in list(model.modules()):
        # named_children() leaves out a child's second name.
        for child_name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, child_name, replacements[id(child)])
    _switch_fast_paths(model)


def _switch_fast_paths(model: nn.Module) -> None:
    """Switches torch's fast paths of transformer encoders off where they contain replaced linears, and on again without them.

    In eval mode they read `weight` and `bias` of the linears instead of calling them, and would leave factors out.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            switch = "activation_relu_or_gelu"
        elif isinstance(module, nn.TransformerEncoder):
            switch = "use_nested_tensor"
        else:
            continue
        replaced = any(isinstance(part, FACTORED) for part in module.modules())
        if replaced and not hasattr(module, "fast_path"):
            module.fast_path = getattr(module, switch)
            setattr(module, switch, False)
        elif not replaced and hasattr(module, "fast_path"):
            setattr(module, switch, module.fast_path)
            del module.fast_path
