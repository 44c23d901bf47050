"""ReLoRA (arXiv 2307.05695): frozen dense linears plus trained factors that are merged into them periodically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.methods.method import Method, Restart, TensorGroup, factor_groups, moments_notices

if TYPE_CHECKING:
    from torch import nn

_MOMENT_FLAGS = ("reset_optimizer_on_relora", "optimizer_random_pruning", "optimizer_magnitude_pruning")


class ReLoRA(Method):
    """ReLoRA: linears keep a frozen dense weight; factors are trained, merged into it every --relora updates, and replaced."""

    name = "relora"
    title = "ReLoRA"
    description = "ReLoRA (arXiv 2307.05695)"
    colour = "#CC79A7"
    stand_ins: Mapping[str, Any] = MappingProxyType({"relora": 1})
    replaces_linears = frozen_base = True
    lighter = "sltrain"

    def problems(self, args: Arguments) -> list[str]:
        """Refuses missing merges, impossible pruning of moments, and two starting points."""
        problems = []
        if args.relora is None:
            problems.append(
                "--peft_model relora needs --relora N (update steps between merges), e.g. --relora 1000; without merges it "
                "trains only one low-rank change of random weights"
            )
        problems += _pruning_problems(args)
        if args.max_train_tokens is not None and args.scheduler == "cosine_restarts":
            problems.append(
                f"--max_train_tokens {args.max_train_tokens} with --relora and --scheduler cosine_restarts: the schedule "
                "restarts by tokens and factors merge by updates; use --num_training_steps"
            )
        if args.warmed_up_model is not None and not Path(args.warmed_up_model).is_dir():
            problems.append(f"--warmed_up_model {args.warmed_up_model}: no such folder")
        if args.warmed_up_model is not None and args.continue_from is not None:
            problems.append(
                f"--warmed_up_model {args.warmed_up_model} with --continue_from {args.continue_from}: a run starts from one "
                "of them; drop one of the two"
            )
        if args.restart_every is not None:
            problems.append(
                f"--restart_every {args.restart_every} with --peft_model relora: ReLoRA restarts at its merges; use --relora N"
            )
        return problems + super().problems(args)

    def warnings(self, args: Arguments, model: ModelConfig) -> list[str]:
        """Warns of runs without a merge, and of merges without a warm-up of the learning rate."""
        if args.relora is None:
            return []
        if args.max_train_tokens is None and args.relora >= args.num_training_steps:
            return [
                f"--relora {args.relora} with --num_training_steps {args.num_training_steps}: factors are never merged, "
                "so the run trains one low-rank change of its initial weights; lower --relora"
            ]
        if args.scheduler != "cosine_restarts":
            if args.restart_warmup_steps or _cycles_warm_up(args):
                return []
            warmup_steps = max(1, min(100, args.relora // 10))
            return [
                f"--relora {args.relora} with --scheduler {args.scheduler}: after a merge the new factors train at the full "
                f"rate immediately; use --restart_warmup_steps {warmup_steps}, or the published --scheduler cosine_restarts "
                f"--cycle_length {args.relora} too"
            ]
        if args.cycle_length != args.relora or args.adjust_step % args.relora:
            return [
                f"--relora {args.relora} with --cycle_length {args.cycle_length} and --adjust_step {args.adjust_step}: the rate "
                f"warms up at other updates than after merges; use --cycle_length {args.relora} --adjust_step 0"
            ]
        return []

    def notices(self, args: Arguments) -> list[str]:
        """Notices for flags about moments with an optimizer that keeps none."""
        return moments_notices(args, _MOMENT_FLAGS)

    def linear_groups(self, shape: tuple[int, int], count: int, *, rank: int, train_scaling: bool, **_: Any) -> list[TensorGroup]:
        """Groups of the frozen weight and the factors."""
        return [TensorGroup("dense", shape, count, trained=False), *factor_groups(shape, count, rank, train_scaling)]

    def apply(self, model: nn.Module, args: Arguments) -> list[str]:
        """Freezes the attention and MLP linears and adds factors."""
        from sparse_lora import attach_relora

        return attach_relora(model, rank=args.rank, alpha=args.lora_alpha, trainable_scaling=args.train_scaling, seed=args.seed)

    def restart(self, args: Arguments) -> Restart | None:
        """The merge of the factors every --relora updates; None without --relora."""
        if not args.relora:
            return None
        moments, share = moments_at_a_merge(args)
        return Restart(args.relora, "relora", merge=True, moments=moments, share=share)


def _pruning_problems(args: Arguments) -> list[str]:
    prunings = {name: getattr(args, name) for name in _MOMENT_FLAGS[1:] if getattr(args, name) is not None}
    problems = []
    for name, share in prunings.items():
        if not OPTIMIZERS[args.optimizer].prunable:
            problems.append(
                f"--{name} {share} with --optimizer {args.optimizer}: its state is no plain number per element that could be "
                "pruned; use --reset_optimizer_on_relora true, or --optimizer adamw"
            )
        if args.reset_optimizer_on_relora:
            problems.append(
                f"--{name} {share} with --reset_optimizer_on_relora true: no moments are left to prune; drop one of the two"
            )
    if len(prunings) == 2:
        problems.append(
            "--optimizer_random_pruning with --optimizer_magnitude_pruning: moments are pruned in one way; drop one of the two"
        )
    return problems


def _cycles_warm_up(args: Arguments) -> bool:
    """Whether the cosine schedule's cycles start, with a warm-up, at the merges."""
    return args.scheduler == "cosine" and args.cycle_length == args.relora and args.warmup_steps > 0


def moments_at_a_merge(args: Arguments) -> tuple[str, float]:
    """How a merge changes the factors' moments: ("zero" | "random" | "magnitude" | "keep", share of them set to zero)."""
    if args.optimizer_random_pruning is not None:
        return "random", args.optimizer_random_pruning
    if args.optimizer_magnitude_pruning is not None:
        return "magnitude", args.optimizer_magnitude_pruning
    return ("keep", 0.0) if args.reset_optimizer_on_relora is False else ("zero", 1.0)


METHOD = ReLoRA()
