"""AdaptedLinear: a pretrained linear with a low-rank plus sparse part added to its weight, for fine-tuning."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .linear import SparseLowRankLinear, join_name
from .support import LARGEST, generator_for
from .uniform import UniformSupport


class AdaptedLinear(SparseLowRankLinear):
    """y = x (W0 + (alpha / rank) B A + S)^T + bias; initially it computes the same as the pretrained linear.

    Parameters: the linear's own `weight` (out, in), W0, and `bias`, which train if they require a gradient; the adapter's
    `lora_A` (rank, in), `lora_B` (out, rank), `sparse_value` (nnz,) and optional `scaling` (1,), as in SparseLowRankLinear.

    Initial values: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, values 0.

    Args:
        linear: the pretrained linear, whose weight and bias are used without a copy. On "meta" nothing is drawn: call
            `reset_parameters` once the weights exist.
        rank, sparsity, alpha, trainable_scaling, path: see SparseLowRankLinear; sparsity 0 is LoRA.
        support: see SparseLowRankLinear, or "largest": the int(sparsity * out * in) entries of W0 with the largest magnitude.
        seed, name: for the adapter's initial values, see `reset_parameters`.

    Raises:
        ValueError: a value is out of its range, or the sparsity is so small that S has no entry.
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
        # Before the linear's tensors become attributes, since to_empty would replace them.
        self.to_empty(device=device)
        self.register_parameter("weight", linear.get_parameter("weight"))
        self.bias = linear.bias
        if device.type != "meta":
            self.reset_parameters(seed, name)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The pretrained weight W0, without the adapter."""
        if (weight := self._parameters.get("weight")) is None:
            # Torch expects this of a parameter that is not registered yet.
            raise AttributeError("weight")
        return weight

    def draw_support(self, seed: int, name: str) -> None:
        """Draws the support, or sets it to W0's largest entries; see `reset_parameters` for the arguments."""
        if self.on_largest and isinstance(self.support, UniformSupport):
            self.support.place_(largest_entries(self.weight, self.support.nnz))
        else:
            super().draw_support(seed, name)

    def initial_values(self, seed: int, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yields (parameter name, float32 CPU tensor) of the adapter, with which the layer computes what the linear does."""
        bound = 1 / math.sqrt(self.in_features)
        generator = generator_for(seed, join_name(name, "lora_A"))
        values = torch.empty(self.lora_A.shape, dtype=torch.float32, device="cpu")
        yield "lora_A", values.uniform_(-bound, bound, generator=generator)
        yield "lora_B", torch.zeros(self.lora_B.shape, device="cpu")
        if self.sparse_value is not None:
            yield "sparse_value", torch.zeros(self.sparse_value.shape, device="cpu")
        if self.scaling is not None:
            yield "scaling", torch.ones(1, device="cpu")

    def base_weight(self) -> Tensor:
        """Returns W0."""
        return self.weight

    @property
    def adapter(self) -> list[nn.Parameter]:
        """The adapter's parameters: A, B, and the sparse values and the scaling if present."""
        parameters = (self.lora_A, self.lora_B, self.sparse_value, self.scaling)
        return [parameter for parameter in parameters if parameter is not None]


def freeze_but(model: nn.Module, trained_modules: Sequence[str]) -> None:
    """Freezes all parameters except those of adapters and of `trained_modules`, given by qualified name."""
    model.requires_grad_(False)
    for module in model.modules():
        for parameter in module.adapter if isinstance(module, AdaptedLinear) else ():
            parameter.requires_grad_(True)
    for name in trained_modules:
        model.get_submodule(name).requires_grad_(True)


@torch.no_grad()
def largest_entries(weight: Tensor, count: int) -> Tensor:
    """Returns the sorted int64 CPU positions (count,) of the weight's largest magnitudes; the first ones among equals.

    Args:
        count: 1 .. weight.numel().

    Raises:
        ValueError: an entry is NaN, which has no magnitude.
    """
    if bool(weight.isnan().any()):
        raise ValueError("the pretrained weight has entries that are NaN: use another checkpoint, or support 'uniform'")
    magnitudes = weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32)).abs().flatten()
    smallest = magnitudes.kthvalue(magnitudes.numel() - count + 1).values
    above, equal = (magnitudes > smallest).nonzero().squeeze(1), (magnitudes == smallest).nonzero().squeeze(1)
    return torch.cat([above, equal[: count - above.numel()]]).msort()


def adapter_parameters(model: nn.Module) -> dict[str, int]:
    """Returns each AdaptedLinear's number of adapter parameters by qualified name: rank * (in + out) + nnz, + 1 if scaled."""
    return {
        name: sum(parameter.numel() for parameter in module.adapter)
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the part of state_dict() that fine-tuning with a frozen base changes: trained parameters and stored supports.

    To restore the fine-tuned model, reparameterise the pretrained one with the same SLTrainConfig and call
    `load_state_dict(state, strict=False)`.
    """
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    names |= {
        f"{name}.support.{buffer}".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AdaptedLinear) and module.support is not None
        for buffer in module.support.state_dict()
    }
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}
