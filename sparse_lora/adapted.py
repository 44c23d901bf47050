"""AdaptedLinear: a pretrained linear with a low-rank plus sparse part added to its weight, for fine-tuning."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .functional import build_weight, part_of, sparse_lowrank_linear, without_autocast
from .linear import SparseLowRankLinear, join_name
from .support import generator_for
from .uniform import UniformSupport

# Of support: beside the kinds that are drawn, the entries of W0 that are largest in magnitude.
LARGEST = "largest"


class AdaptedLinear(SparseLowRankLinear):
    """y = x (W0 + (alpha / rank) B A + S)^T + bias; it begins as the linear it is made of.

    Parameters: `weight` (out, in), W0, and `bias`, the linear's own tensors, trained where they require a gradient; the adapter's
    `lora_A` (rank, in), `lora_B` (out, rank), `sparse_value` (nnz,) and optional `scaling` (1,), as of SparseLowRankLinear.

    Initial values: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, values 0.

    Args:
        linear: whose weight and bias are taken, not copied. On "meta" nothing is drawn: call `reset_parameters` when there are
            weights.
        rank, sparsity, alpha, trainable_scaling, path: as of SparseLowRankLinear; with sparsity 0 this is LoRA.
        support: as of SparseLowRankLinear, or "largest": the int(sparsity * out * in) entries of W0 of the largest magnitude.
        seed, name: of the adapter's initial values, as of `reset_parameters`.

    Raises:
        ValueError: a value is out of its range, or the sparsity leaves S without a single entry.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        sparsity: float,
        *,
        alpha: float = 32.0,
        support: str = UniformSupport.kind,
        trainable_scaling: bool = False,
        path: str = "auto",
        seed: int = 0,
        name: str = "",
    ) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            rank,
            sparsity,
            alpha=alpha,
            support=UniformSupport.kind if support == LARGEST else support,
            trainable_scaling=trainable_scaling,
            path=path,
            device="meta",
            dtype=linear.weight.dtype,
        )
        self.on_largest = support == LARGEST
        device = linear.weight.device
        self.to_empty(device=device)  # before it has any tensor of the linear's
        self.weight, self.bias = linear.weight, linear.bias
        if device.type != "meta":
            self.reset_parameters(seed, name)
        self.train(linear.training)

    def draw_support(self, seed: int, name: str) -> None:
        """Draws the support alone, or finds W0's largest entries; arguments as of `reset_parameters`."""
        if self.on_largest and isinstance(self.support, UniformSupport):
            self.support.place_(largest_entries(self.weight, self.support.nnz))
        else:
            super().draw_support(seed, name)

    def initial_values(self, seed: int, name: str) -> Iterator[tuple[str, Tensor]]:
        """As of SparseLowRankLinear, but of the adapter alone: it changes nothing yet."""
        bound = 1 / math.sqrt(self.in_features)
        generator = generator_for(seed, join_name(name, "lora_A"))
        values = torch.empty(self.lora_A.shape, dtype=torch.float32, device="cpu")
        yield "lora_A", values.uniform_(-bound, bound, generator=generator)
        yield "lora_B", torch.zeros(self.lora_B.shape, device="cpu")
        if self.sparse_value is not None:
            yield "sparse_value", torch.zeros(self.sparse_value.shape, device="cpu")
        if self.scaling is not None:
            yield "scaling", torch.ones(1, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        scaling = self.effective_scaling()
        return sparse_lowrank_linear(
            x, self.lora_A, self.lora_B, self.sparse_value, self.support, scaling, self.bias, self.path, self.weight
        )

    def dense_weight(self) -> Tensor:
        """W0 + (alpha / rank) B A + S, (out_features, in_features), in the parameters' dtype; differentiable."""
        part = None if self.support is None else part_of(self.support)
        scaled_B = (self.lora_B * self.effective_scaling()).to(self.lora_B.dtype)
        with without_autocast(scaled_B):
            return build_weight(self.lora_A, scaled_B, self.sparse_value, part, base=self.weight)

    @property
    def adapter(self) -> list[nn.Parameter]:
        """A, B, the sparse values and the trained scaling, as far as there are such."""
        parameters = (self.lora_A, self.lora_B, self.sparse_value, self.scaling)
        return [parameter for parameter in parameters if parameter is not None]


@torch.no_grad()
def largest_entries(weight: Tensor, count: int) -> Tensor:
    """Sorted int64 positions (count,) of the row-major weight's largest magnitudes, on the CPU; of equal ones the first.

    Args:
        count: 1 .. weight.numel().
    """
    magnitudes = weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32)).abs().flatten()
    smallest = magnitudes.kthvalue(magnitudes.numel() - count + 1).values
    above, equal = (magnitudes > smallest).nonzero().squeeze(1), (magnitudes == smallest).nonzero().squeeze(1)
    return torch.cat([above, equal[: count - above.numel()]]).msort()


def adapter_parameters(model: nn.Module) -> dict[str, int]:
    """Of each AdaptedLinear, by qualified name: rank * (in + out) + nnz, and 1 more for a trained scaling."""
    return {
        name: sum(parameter.numel() for parameter in module.adapter)
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of state_dict() that training with a frozen base changes or adds: trained parameters and stored supports.

    On the pretrained model, reparameterised with the same SLTrainConfig, `load_state_dict(state, strict=False)` brings the
    fine-tuned one back.
    """
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    names |= {
        f"{name}.support.{buffer}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AdaptedLinear) and module.support is not None
        for buffer in module.support.state_dict()
    }
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}
