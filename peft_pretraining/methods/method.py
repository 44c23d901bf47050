"""What a training method is: the base class of the objects in this folder, and what they are asked for."""

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
    subspace (GaLore). support_entries: for a "sparse" group whose positions are stored, entries of the matrix that its values
    are spread over. embedding: embedding or output head, whose moments may have a size of their own.
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
    """What happens to factors and their moments between two updates, every `every` updates.

    flag: the argument that says how often. merge: the factors are merged into the frozen weights, and drawn anew. rebalance:
    factors are replaced by balanced ones of the same product. moments: "zero" | "random" | "magnitude" | "keep": which of the
    factors' moments are set to zero, and `share`, how many of them. act: a method's own action instead, called on every process
    with (model, number of the restart, world); it returns the names of the parameters whose moments are set to zero.
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
        """For the line of the plan that says what the optimizer does."""
        if not self.merge:
            balanced = ", balanced factors" if self.rebalance else ""
            return f"; every {self.every:,} updates the linears' moments from zero{balanced}"
        moments = {"zero": "zeroed", "keep": "kept"}.get(self.moments, f"{self.share:.0%} zeroed ({self.moments})")
        return f"; factors merged every {self.every:,} updates, their moments {moments}"


class Method:
    """A training method: what becomes of the attention and MLP linears, and what the rest of the program must know of it.

    A method is a subclass with one object, METHOD, in a file of this folder that has the method's name. The values and methods
    below are those of full-rank training; a subclass overrides what is different.
    """

    # As --peft_model has it.
    name = ""
    # In reports and figures, on the card of an exported model, and the colour of its lines.
    title = ""
    description = ""
    colour = "#56B4E9"
    # Arguments that the method requires and memory does not depend on, with values that `estimate` may take instead.
    stand_ins: Mapping[str, Any] = MappingProxyType({})

    # The linears become modules of another class. The next three say more about them.
    replaces_linears = False
    # They are sparse_lora's SparseLowRankLinear: no dense weight is left, factors can be kept in an export and rebalanced.
    factored = False
    # They have sparse values beside their factors.
    sparse = False
    # They keep a dense weight that is not trained.
    frozen_base = False
    # The optimizer steps the linears' weights in subspaces (`projected_matrices`).
    projected = False
    # The trained linears equal dense ones, so that the model can be exported.
    mergeable = True
    # Another method to suggest where memory does not suffice.
    lighter: str | None = None

    @property
    def flags(self) -> Collection[str]:
        """Arguments that not every method reads, and this one does; by their rows, which a method of one's own need not touch."""
        return [name for name, row in ROWS.items() if self.name in (row.methods or ())]

    @property
    def full_rank(self) -> bool:
        """Whether training is ordinary training: dense linears, and nothing special about their updates."""
        return not self.replaces_linears and not self.projected

    def value_problems(self, args: Arguments) -> dict[str, str]:
        """Why single values are refused, by argument: sentences with the value, the reason and the way out."""
        return {}

    def problems(self, args: Arguments) -> list[str]:
        """Why arguments that are good one by one do not go together: sentences with the values, the reason and the way out."""
        restart, warmup = self.restart(args), args.restart_warmup_steps
        if restart is None or warmup is None or args.scheduler == "cosine_restarts" or warmup < restart.every:
            return []
        return [
            f"--restart_warmup_steps {warmup}: must be below --{restart.flag} {restart.every}, or the rate never comes back to "
            "the schedule's"
        ]

    def model_problems(self, args: Arguments, model: ModelConfig) -> list[str]:
        """Why a run with these arguments and this model is refused."""
        return []

    def warnings(self, args: Arguments, model: ModelConfig) -> list[str]:
        """What the plan warns about."""
        return []

    def notices(self, args: Arguments) -> list[str]:
        """One line for each given flag that this method reads but that has no effect together with others."""
        return []

    def optimizer_text(self, args: Arguments) -> str:
        """What follows the optimizer's name in the plan."""
        return ""

    def optimizer_flags(self, optimizer: str) -> str:
        """What to type after --optimizer to choose another optimizer for this method."""
        return optimizer

    def linear_groups(
        self, shape: tuple[int, int], count: int, *, rank: int, sparsity: float, train_scaling: bool, support: str
    ) -> list[TensorGroup]:
        """The parameters of `count` linears whose weight has this shape, (out_features, in_features), biases aside."""
        return [TensorGroup("dense", shape, count)]

    def apply(self, model: nn.Module, args: Arguments) -> list[str]:
        """Replace the model's linears in place, on the meta device; the names of those that were replaced."""
        return []

    def projected_matrices(self, model: nn.Module) -> list[str]:
        """Names of the weights that the optimizer steps in a subspace."""
        return []

    def restart(self, args: Arguments) -> Restart | None:
        """What happens between updates; None: nothing."""
        return None


def factor_groups(shape: tuple[int, int], count: int, rank: int, train_scaling: bool) -> list[TensorGroup]:
    """A (rank, in), B (out, rank), and a trained scale, if there is one, of `count` linears."""
    out_features, in_features = shape
    scales = [TensorGroup("low_rank", (1,), count)] if train_scaling else []
    return [TensorGroup("low_rank", (rank, in_features), count), TensorGroup("low_rank", (out_features, rank), count), *scales]


def moments_notices(args: Arguments, flags: tuple[str, ...]) -> list[str]:
    """Notices for `flags`, which say what a restart does to moments, with an optimizer that keeps none."""
    if OPTIMIZERS[args.optimizer].keeps_moments(args.beta1):
        return []
    return [
        f"--{flag} has no effect with --optimizer {args.optimizer} without --beta1: it keeps no moments"
        for flag in flags
        if flag in args.given
    ]
