"""The base class of training methods, and the types that describe their parameters and restarts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peft_pretraining.config.arguments import ROWS, Arguments
from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.config.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from torch import nn

    from peft_pretraining.distributed.world import World


@dataclass(frozen=True)
class TensorGroup:
    """`count` parameters of one shape.

    kind: "dense" | "low_rank" | "sparse". trained: False for frozen weights. projected: the optimizer steps the matrix in a
    subspace (GaLore). support_entries: for a "sparse" group whose positions are stored, the number of entries of
    the matrix. embedding: embedding or output head, whose moments may have a different number of bits.
    """

    kind: str
    shape: tuple[int, ...]
    count: int
    trained: bool = True
    projected: bool = False
    support_entries: int = 0
    embedding: bool = False

    @property
    def elements(self) -> int:
        """Elements of all `count` tensors."""
        return math.prod(self.shape) * self.count


@dataclass(frozen=True)
class Restart:
    """Changes factors and their moments between two updates, every `every` updates.

    flag: the argument that sets `every`. merge: merge the factors into the frozen weights and initialise new ones. rebalance:
    replace factors by balanced ones with the same product. moments: which of the factors' moments are set to zero ("zero" |
    "random" | "magnitude" | "keep"); share: the fraction of them. act: an action of the method instead, called on every process
    with (model, number of the restart, world), which returns the names of the parameters whose moments are set to zero.
    """

    every: int
    flag: str
    merge: bool = False
    rebalance: bool = False
    moments: str = "zero"
    share: float = 1.0
    act: Callable[[nn.Module, int, World], list[str]] | None = None

    @property
    def text(self) -> str:
        """The restart in the plan's line about the optimizer."""
        if not self.merge:
            balanced = ", balanced factors" if self.rebalance else ""
            return f"; linears' moments set to zero every {self.every:,} updates{balanced}"
        moments = {"zero": "zeroed", "keep": "kept"}.get(self.moments, f"{self.share:.0%} zeroed ({self.moments})")
        return f"; factors merged every {self.every:,} updates, their moments {moments}"


class Method:
    """A training method: how it changes the attention and MLP linears, and its properties for the rest of the program.

    Each method is a subclass with one object, METHOD, in the file of this folder named after the method. The defaults below are
    those of full-rank training; a subclass overrides what differs. A run is refused by `value_problems` (one value alone),
    `problems` (values together) or `model_problems` (values with the model's shape), asked in this order.
    """

    # The value of --peft_model.
    name = ""
    # Its name in reports and figures, its description on an exported model's card, and the colour of its lines.
    title = ""
    description = ""
    colour = "#56B4E9"
    # Values that `estimate` uses for required arguments that do not affect memory.
    stand_ins: Mapping[str, Any] = MappingProxyType({})

    # The linears are replaced by modules of another class; the next three attributes describe these.
    replaces_linears = False
    # The modules are sparse_lora's SparseLowRankLinear, without a dense weight; factors can be exported and rebalanced.
    factored = False
    # The modules have sparse values in addition to factors.
    sparse = False
    # The modules keep a dense weight that is not trained.
    frozen_base = False
    # The optimizer steps the linears' weights in subspaces (`projected_matrices`).
    projected = False
    # Parameters of a linear whose initial values --start_scale multiplies, so that its weight is scaled.
    start_parameters: Collection[str] = ("weight",)
    # The trained linears equal dense linears, so the model can be exported.
    mergeable = True
    # The method to suggest if memory does not suffice.
    lighter: str | None = None

    @property
    def flags(self) -> Collection[str]:
        """Arguments that this method reads and some others do not, by their rows; override it for a method defined elsewhere."""
        return [name for name, row in ROWS.items() if self.name in (row.methods or ())]

    @property
    def full_rank(self) -> bool:
        """Whether this is ordinary training: dense linears, not projected."""
        return not self.replaces_linears and not self.projected

    def value_problems(self, args: Arguments) -> dict[str, str]:
        """Refusals of single values, by argument: sentences with the value, the reason and what to type instead."""
        return {}

    def problems(self, args: Arguments) -> list[str]:
        """Refusals of combinations of arguments: sentences with the values, the reason and what to type instead."""
        restart, warmup = self.restart(args), args.restart_warmup_steps
        if restart is None or warmup is None or args.scheduler == "cosine_restarts" or warmup < restart.every:
            return []
        return [
            f"--restart_warmup_steps {warmup}: must be below --{restart.flag} {restart.every}, or the learning rate never "
            "returns to the schedule's"
        ]

    def model_problems(self, args: Arguments, model: ModelConfig) -> list[str]:
        """Refusals of these arguments with this model: sentences with the reason and what to type instead."""
        return []

    def warnings(self, args: Arguments, model: ModelConfig) -> list[str]:
        """Warnings for the plan, one sentence each."""
        return []

    def notices(self, args: Arguments) -> list[str]:
        """One line for each given flag that this method reads but that has no effect together with others."""
        return []

    def optimizer_text(self, args: Arguments) -> str:
        """Text after the optimizer's name in the plan."""
        return ""

    def linear_groups(
        self, shape: tuple[int, int], count: int, *, rank: int, sparsity: float, train_scaling: bool, support: str
    ) -> list[TensorGroup]:
        """Groups of the parameters, without biases, of `count` linears with weights of this shape (out_features, in_features)."""
        return [TensorGroup("dense", shape, count)]

    def apply(self, model: nn.Module, args: Arguments) -> list[str]:
        """Replaces the model's linears in place, on the meta device; returns the names of the replaced linears."""
        return []

    def projected_matrices(self, model: nn.Module) -> list[str]:
        """Names of the weights that the optimizer steps in a subspace."""
        return []

    def restart(self, args: Arguments) -> Restart | None:
        """Returns what happens between updates, or None if the run has no restarts."""
        return None


def factor_groups(shape: tuple[int, int], count: int, rank: int, train_scaling: bool) -> list[TensorGroup]:
    """Groups of A (rank, in), B (out, rank) and the trained scale, if there is one, of `count` linears."""
    out_features, in_features = shape
    scales = [TensorGroup("low_rank", (1,), count)] if train_scaling else []
    return [TensorGroup("low_rank", (rank, in_features), count), TensorGroup("low_rank", (out_features, rank), count), *scales]


def moments_notices(args: Arguments, flags: tuple[str, ...]) -> list[str]:
    """Notices for `flags` about moments at restarts, if the optimizer keeps no moments."""
    if OPTIMIZERS[args.optimizer].keeps_moments(args.beta1):
        return []
    return [
        f"--{flag} has no effect with --optimizer {args.optimizer} without --beta1: it keeps no moments"
        for flag in flags
        if flag in args.given
    ]
