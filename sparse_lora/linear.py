"""SparseLowRankLinear: a linear layer with the weight scaling * B A + S."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .block import BlockSupport, block_count
from .functional import PATHS, build_weight, cheaper_path, part_of, sparse_lowrank_linear, without_autocast
from .support import Support, generator_for, plain
from .uniform import UniformSupport

# A layer without S starts with this share of the variance of nn.Linear's initial weights, as a layer with S at the published
# delta does. With the full variance it trains far worse (docs/results.md).
LOW_RANK_START = 0.03


class SparseLowRankLinear(nn.Module):
    """y = x W^T + bias with W = (alpha / rank) B A + S, S having a fixed support (arXiv 2406.02214, section 3).

    Parameters (names as published): `lora_A` (rank, in), `lora_B` (out, rank), `sparse_value` (nnz,), optional
    `scaling` (1,) and `bias` (out,); `support` knows the positions of the nnz values.

    Initial values: A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform with a = sqrt(5)), B = 0, values ~
    U(-1/sqrt(in), 1/sqrt(in)), bias ~ U(-1/sqrt(out), 1/sqrt(out)), as published. With `sparsity=0` the layer is
    low-rank only. B = 0 in every layer would then make all gradients zero, so B ~ N(0, .03 / (scaling^2 rank)): the entries of
    scaling * B A get the variance .03 / (3 in), the same that S gives W with `sparsity=0.03`.

    Args:
        in_features, out_features: shape of the weight, (out_features, in_features).
        rank: rank of B A, at least 1; it may exceed min(in_features, out_features).
        sparsity: share of the weight's entries that are in S (delta in the paper), 0 .. 1; 0 leaves S out.
        alpha: the low-rank part is scaled by alpha / rank.
        bias: add a bias.
        support: the positions of S. "uniform": int(sparsity * out * in) positions, drawn without replacement over the whole
            matrix, as published. "block": round(1 / sparsity) dense blocks, which need no storage.
        trainable_scaling: scale by tanh(c), with c a trained scalar that starts at 1, instead of alpha / rank.
        path: how the product is computed: "materialised", "factored" or "auto" (sparse_lora.functional).
        seed: seed of the initial values and the support; None draws a seed from torch's default generator.
        device, dtype: of the parameters, as in nn.Linear. On "meta" nothing is drawn: call `reset_parameters` after
            `to_empty`.

    Raises:
        ValueError: a value is out of its range, or the sparsity is so small that S has no entry.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        sparsity: float,
        *,
        alpha: float = 32.0,
        bias: bool = False,
        support: str = "uniform",
        trainable_scaling: bool = False,
        path: str = "auto",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        problems = hyperparameter_problems(rank, sparsity, alpha, support, path)
        if in_features < 1 or out_features < 1:
            problems.append(f"a weight of {out_features} x {in_features} has no entries: both sizes must be at least 1")
        if problems:
            raise ValueError("; ".join(problems))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.sparsity, self.alpha = sparsity, alpha
        self.path = path
        self.support = make_support(support, out_features, in_features, sparsity, device) if sparsity > 0 else None
        nnz = 0 if self.support is None else self.support.nnz
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.sparse_value = nn.Parameter(torch.empty(nnz, device=device, dtype=dtype)) if nnz else None
        self.scaling = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if trainable_scaling else None
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.cached_weight: Tensor | None  # W during an update, if a cache.WeightCache holds it
        self.register_buffer("cached_weight", None, persistent=False)
        if not self.lora_A.is_meta:
            if seed is None:
                seed = int(torch.randint(2**63 - 1, (), device="cpu"))
            self.reset_parameters(seed, "")

    @torch.no_grad()
    def reset_parameters(self, seed: int, name: str) -> None:
        """Draws the support and all initial values, in place, on any device.

        The numbers depend on (seed, name) and the layer's shape only. Each tensor is drawn in float32 by the CPU generator of its
        qualified name and then cast, so that float32 and bfloat16 layers start from the same numbers.

        Args:
            seed: the run's seed.
            name: the layer's qualified name in its model, such as "model.layers.0.mlp.up_proj"; "" outside a model.
        """
        for parameter_name, values in self.initial_values(seed, name):
            self.get_parameter(parameter_name).copy_(values)
        self.draw_support(seed, name)

    def draw_support(self, seed: int, name: str) -> None:
        """Draws the support only; see `reset_parameters` for the arguments."""
        if self.support is not None:
            self.support.draw_(generator_for(seed, join_name(name, "support")))

    def initial_values(self, seed: int, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yields (parameter name, float32 CPU tensor), one parameter at a time; see `reset_parameters` for the arguments."""
        in_bound = 1 / math.sqrt(self.in_features)
        for parameter_name, parameter in self.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            generator = generator_for(seed, join_name(name, parameter_name))
            if parameter_name == "scaling":
                values.fill_(1.0)
            elif parameter_name == "bias":
                bound = 1 / math.sqrt(self.out_features)
                values.uniform_(-bound, bound, generator=generator)
            elif parameter_name != "lora_B":
                values.uniform_(-in_bound, in_bound, generator=generator)
            elif self.sparse_value is not None:
                values.zero_()
            else:
                spread = math.sqrt(LOW_RANK_START / self.rank) / self.initial_scaling()
                values.normal_(0.0, spread, generator=generator)
            yield parameter_name, values

    def initial_scaling(self) -> float:
        """Returns the factor of B A before training."""
        return self.alpha / self.rank if self.scaling is None else math.tanh(1.0)

    def effective_scaling(self) -> float | Tensor:
        """Returns the factor of B A: alpha / rank, or tanh(scaling), (1,), if the scaling is trained."""
        return self.alpha / self.rank if self.scaling is None else torch.tanh(self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        factors = (self.lora_A, self.lora_B, self.sparse_value, self.support, self.effective_scaling())
        return sparse_lowrank_linear(x, *factors, self.bias, self.path, base=self.base_weight(), weight=self.cached_weight)

    def base_weight(self) -> Tensor | None:
        """Returns a dense weight (out_features, in_features) that W is added to; None: there is none."""
        return None

    def builds_weight(self, num_rows: int, width: int | None = None) -> bool:
        """Tells whether products with `num_rows` rows build W, in passes with gradients.

        width: bytes per element of the products, where parameters are stored in another dtype.
        """
        if self.path != "auto":
            return self.path == "materialised"
        kind, nnz = ("none", 0) if self.support is None else (self.support.kind, self.support.nnz)
        sizes = (num_rows, self.out_features, self.in_features, self.rank)
        return cheaper_path(*sizes, kind, nnz, self.lora_A.device.type, width or self.lora_A.dtype.itemsize) == "materialised"

    @property
    def weight(self) -> Tensor:
        """The weight, as `dense_weight` computes it, for models that read it. A new tensor: writing to it changes nothing."""
        return self.dense_weight()

    def dense_weight(self) -> Tensor:
        """Returns the weight (out_features, in_features) that the layer applies, in its parameters' dtype; differentiable."""
        part = None if self.support is None else part_of(self.support)
        values = None if self.sparse_value is None else plain(self.sparse_value)
        scaled_B = (plain(self.lora_B) * self.effective_scaling()).to(self.lora_B.dtype)
        with without_autocast(scaled_B):
            return build_weight(plain(self.lora_A), scaled_B, values, part, base=self.base_weight())

    def extra_repr(self) -> str:
        scaling = f"alpha={self.alpha}" if self.scaling is None else "trainable_scaling=True"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"sparsity={self.sparsity}, {scaling}, bias={self.bias is not None}"
        )


def make_support(
    kind: str, out_features: int, in_features: int, sparsity: float, device: torch.device | str | None = None
) -> Support:
    """Creates a support with a share `sparsity` of a weight's entries, whose positions are not drawn yet.

    "uniform": int(sparsity * out * in) positions, as published (arXiv 2406.02214). "block": round(1 / sparsity) blocks.

    Raises:
        ValueError: the sparsity leaves no entry, no number of blocks has about this share, or the weight is too small for it.
    """
    return SUPPORTS[kind](out_features, in_features, sparsity, device)


def _uniform(out_features: int, in_features: int, sparsity: float, device: torch.device | str | None) -> Support:
    nnz = int(sparsity * out_features * in_features)
    if nnz == 0:
        raise ValueError(
            f"sparsity {sparsity} of a {out_features} x {in_features} weight leaves no entry: "
            f"use at least {1 / (out_features * in_features):.2g}, or 0 for a low-rank weight"
        )
    return UniformSupport(out_features, in_features, nnz, device)


def _block(out_features: int, in_features: int, sparsity: float, device: torch.device | str | None) -> Support:
    return BlockSupport(out_features, in_features, block_count(sparsity))


# A new kind needs a row here and in peft_pretraining.config.supports, its arithmetic in functional.sparse_part and its cost in
# functional.multiplications.
SUPPORTS: dict[str, Callable[[int, int, float, torch.device | str | None], Support]] = {
    UniformSupport.kind: _uniform,
    BlockSupport.kind: _block,
}
SUPPORT_KINDS = tuple(SUPPORTS)


def hyperparameter_problems(rank: int, sparsity: float, alpha: float, support: str, path: str) -> list[str]:
    """Returns one message for each value that is out of its range."""
    problems = []
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(f"rank is {rank!r}, but it must be a whole number of at least 1")
    if not _is_number(sparsity) or not 0 <= sparsity <= 1:
        problems.append(f"sparsity is {sparsity!r}, but it is a share of the weight's entries: choose 0 .. 1")
    if not _is_number(alpha) or not 0 < alpha < math.inf:
        problems.append(f"alpha is {alpha!r}, but it must be a positive number")
    if support not in SUPPORT_KINDS:
        problems.append(f"support is {support!r}, but it must be one of: {', '.join(SUPPORT_KINDS)}")
    if path not in ("auto", *PATHS):
        problems.append(f"path is {path!r}, but it must be one of: auto, {', '.join(PATHS)}")
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def join_name(prefix: str, name: str) -> str:
    """Returns the qualified name of a tensor of the layer called `prefix`; prefix is "" outside a model."""
    return f"{prefix}.{name}" if prefix else name
