"""ReLoRA (arXiv 2307.05695): frozen dense linears plus factors that are merged into them again and again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_pretraining.config.arguments import (
    Arguments,
)

if TYPE_CHECKING:
    from torch import nn


def _relora_warnings(args: Arguments) -> list[str]:
    """Where merges and the schedule do not go together."""
    if args.peft_model != "relora" or args.relora is None:
        return []
    if args.max_train_tokens is None and args.relora >= args.num_training_steps:
        return [
            f"--relora {args.relora} with --num_training_steps {args.num_training_steps}: factors are never merged, so that the "
            "run trains one low-rank change of the weights it starts from; lower --relora"
        ]
    if args.scheduler != "cosine_restarts":
        if args.restart_warmup_steps or _cycles_warm_up(args):
            return []
        return [
            f"--relora {args.relora} with --scheduler {args.scheduler}: after a merge the new factors are trained at the full "
            "rate at once; use --restart_warmup_steps 100, or as published --scheduler cosine_restarts "
            f"--cycle_length {args.relora} too"
        ]
    if args.cycle_length != args.relora or args.adjust_step % args.relora:
        return [
            f"--relora {args.relora} with --cycle_length {args.cycle_length} and --adjust_step {args.adjust_step}: the rate "
            f"warms up again at other updates than those after merges; use --cycle_length {args.relora} --adjust_step 0"
        ]
    return []


def _cycles_warm_up(args: Arguments) -> bool:
    """Whether the cosine schedule's own cycles begin with a warm-up where factors are merged."""
    return args.scheduler == "cosine" and args.cycle_length == args.relora and args.warmup_steps > 0


def _relora_problems(args: Arguments) -> list[str]:
    if args.peft_model != "relora":
        return []
    problems = []
    if args.relora is None:
        problems.append(
            "--peft_model relora needs --relora N (update steps between merges), e.g. --relora 1000; without merges it "
            "would train one low-rank change of random weights"
        )
    prunings = {
        name: getattr(args, name)
        for name in ("optimizer_random_pruning", "optimizer_magnitude_pruning")
        if getattr(args, name) is not None
    }
    for name, share in prunings.items():
        if not 0 < share <= 1:
            problems.append(f"--{name} {share}: must be a share above 0 and at most 1, e.g. 0.9")
        if args.optimizer not in ("adam", "adamw", "sgd"):
            problems.append(
                f"--{name} {share} with --optimizer {args.optimizer}: its moments are quantised or factored, and not pruned one "
                "by one; use --reset_optimizer_on_relora true, or --optimizer adamw"
            )
        if args.reset_optimizer_on_relora:
            problems.append(
                f"--{name} {share} with --reset_optimizer_on_relora true: nothing is left to prune; drop one of the two"
            )
    if len(prunings) == 2:
        problems.append(
            "--optimizer_random_pruning with --optimizer_magnitude_pruning: moments are pruned in one way; drop one of the two"
        )
    if args.max_train_tokens is not None and args.scheduler == "cosine_restarts":
        problems.append(
            f"--max_train_tokens {args.max_train_tokens} with --relora and --scheduler cosine_restarts: the schedule would "
            "restart by tokens and the factors by updates; use --num_training_steps"
        )
    if args.warmed_up_model is not None and not Path(args.warmed_up_model).is_dir():
        problems.append(f"--warmed_up_model {args.warmed_up_model}: no such folder")
    if args.warmed_up_model is not None and args.continue_from is not None:
        problems.append(
            f"--warmed_up_model {args.warmed_up_model} with --continue_from {args.continue_from}: a run begins from one of them; "
            "drop one of the two"
        )
    return problems


def _relora(model: nn.Module, args: Arguments) -> list[str]:
    """Attention and MLP linears are frozen and get factors (arXiv 2307.05695), which `restarts` merges into them."""
    from sparse_lora import attach_relora

    return attach_relora(model, rank=args.rank, alpha=args.lora_alpha, trainable_scaling=args.train_scaling, seed=args.seed)


def moments_at_a_merge(args: Arguments) -> tuple[str, float]:
    """What ReLoRA does with the moments of its factors: ("zero" | "random" | "magnitude" | "keep", share of them)."""
    if args.optimizer_random_pruning is not None:
        return "random", args.optimizer_random_pruning
    if args.optimizer_magnitude_pruning is not None:
        return "magnitude", args.optimizer_magnitude_pruning
    return ("keep", 0.0) if args.reset_optimizer_on_relora is False else ("zero", 1.0)
