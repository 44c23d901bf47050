"""Low-rank training: attention and MLP linears are (alpha / r) B A, both factors trained, no dense weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.model_config import ModelConfig, linear_shapes
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.methods.method import Method, Restart, TensorGroup, factor_groups, moments_notices

if TYPE_CHECKING:
    from torch import nn

    from sparse_lora import SLTrainConfig

# Runs with a scale above the first and a rate of at least the second value stalled at a high loss: the low-rank part moves too
# far per update.
_STALLING_SCALE, _STALLING_LR = 0.5, 0.003


class LowRank(Method):
    """Low-rank training: linears are factored; --restart_every sets their moments to zero periodically."""

    name = "lowrank"
    title = "low-rank"
    description = "low-rank, W = (alpha/r) B A"
    colour = "#E69F00"
    replaces_linears = factored = True
    start_parameters = ("lora_B", "sparse_value")

    def problems(self, args: Arguments) -> list[str]:
        """Refuses restarts that contradict the schedule, and rebalancing without restarts."""
        problems = super().problems(args)
        if args.restart_every is not None and args.scheduler == "cosine_restarts":
            problems.append(
                f"--restart_every {args.restart_every} with --scheduler cosine_restarts: this schedule already restarts, "
                "at other updates; use --scheduler cosine or linear"
            )
        if args.rebalance and args.restart_every is None:
            problems.append(
                "--rebalance needs --restart_every N, as factors are rebalanced at restarts, e.g. --restart_every 200"
            )
        return problems

    def model_problems(self, args: Arguments, model: ModelConfig) -> list[str]:
        """Refuses ranks above the number of singular values of a weight, if the SVD is used."""
        smallest = min(size for shape in linear_shapes(model) for size in shape)
        if args.rank <= smallest:
            return []
        return [
            f"--rank {args.rank} with {flag}: a weight with {smallest} rows or columns has only {smallest} singular values; "
            f"use --rank {smallest} or less, or leave {flag} out"
            for flag, given in (("--init svd", args.init == "svd"), ("--rebalance", args.rebalance))
            if given
        ]

    def warnings(self, args: Arguments, model: ModelConfig) -> list[str]:
        """Warns of restarts after the end of the run, and of scales and learning rates at which runs stall."""
        lines = []
        if args.restart_every is not None and args.max_train_tokens is None and args.restart_every >= args.num_training_steps:
            lines.append(
                f"--restart_every {args.restart_every} with --num_training_steps {args.num_training_steps}: the run ends before "
                "a restart; lower --restart_every, or leave it out"
            )
        scale = math.tanh(1.0) if args.train_scaling else args.lora_alpha / args.rank
        flag = "lr" if args.matrix_lr is None else "matrix_lr"
        rate = getattr(args, flag)
        # Spectron's step of the product is the same whatever the scale is.
        if scale > _STALLING_SCALE and rate >= _STALLING_LR and not OPTIMIZERS[args.optimizer].steps_pairs:
            scale_text = (
                "tanh(1) of --train_scaling" if args.train_scaling else f"alpha / rank = {args.lora_alpha:g} / {args.rank}"
            )
            lines.append(
                f"{scale_text} = {scale:.2g} with --{flag} {rate:g}: scales above {_STALLING_SCALE} with --{flag} "
                f"{_STALLING_LR} or more have stalled at a high loss; lower --lora_alpha or --{flag}"
            )
        return lines

    def notices(self, args: Arguments) -> list[str]:
        """Notices for restarts with an optimizer that keeps no moments."""
        does_more = args.rebalance or args.restart_warmup_steps
        return [] if does_more else moments_notices(args, ("restart_every",))

    def linear_groups(
        self, shape: tuple[int, int], count: int, *, rank: int, sparsity: float, train_scaling: bool, support: str
    ) -> list[TensorGroup]:
        """Groups of the factors."""
        return factor_groups(shape, count, rank, train_scaling)

    def apply(self, model: nn.Module, args: Arguments) -> list[str]:
        """Replaces the linears by sparse_lora's layers."""
        from sparse_lora import reparameterize

        return reparameterize(model, self.layer_config(args))

    def layer_config(self, args: Arguments) -> SLTrainConfig:
        """The configuration of the layers for sparse_lora."""
        from sparse_lora import SLTrainConfig

        return SLTrainConfig(
            rank=args.rank,
            sparsity=args.sp_ratio if self.sparse else 0.0,
            alpha=args.lora_alpha,
            support=args.support,
            trainable_scaling=args.train_scaling,
            path=args.linear_path,
            seed=args.seed,
        )

    def restart(self, args: Arguments) -> Restart | None:
        """Restarts set the moments of the factored linears to zero (arXiv 2505.22922); None without --restart_every."""
        return Restart(args.restart_every, "restart_every", rebalance=args.rebalance) if args.restart_every else None


METHOD = LowRank()
