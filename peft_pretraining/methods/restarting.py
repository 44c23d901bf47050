"""Restarts of the factors and of their moments, for the methods that have factors."""

from __future__ import annotations

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.methods.relora import moments_at_a_merge


def _restart_warnings(args: Arguments) -> list[str]:
    """Where restarts never come."""
    if args.peft_model not in RESTARTED or args.restart_every is None or args.max_train_tokens is not None:
        return []
    if args.restart_every < args.num_training_steps:
        return []
    return [
        f"--restart_every {args.restart_every} with --num_training_steps {args.num_training_steps}: there is no restart; lower "
        "--restart_every, or leave it out"
    ]


def _restarts(args: Arguments) -> str:
    interval = restart_interval(args)
    if interval is None:
        return ""
    if args.peft_model != "relora":
        balanced = ", balanced factors" if args.rebalance else ""
        return f"; every {interval:,} updates the linears' moments from zero{balanced}"
    kind, share = moments_at_a_merge(args)
    moments = {"zero": "zeroed", "keep": "kept"}.get(kind, f"{share:.0%} zeroed ({kind})")
    return f"; factors merged every {interval:,} updates, their moments {moments}"


def _restart_problems(args: Arguments) -> list[str]:
    problems = []
    if args.restart_every is not None and args.peft_model == "relora":
        problems.append(
            f"--restart_every {args.restart_every} with --peft_model relora: it restarts at its merges; use --relora N"
        )
    if args.restart_every is not None and args.peft_model in RESTARTED and args.scheduler == "cosine_restarts":
        problems.append(
            f"--restart_every {args.restart_every} with --scheduler cosine_restarts: that schedule has restarts of its own, at "
            "other updates; use --scheduler cosine or linear"
        )
    if args.rebalance and args.peft_model in RESTARTED and args.restart_every is None:
        problems.append("--rebalance needs --restart_every N: factors are replaced at restarts, e.g. --restart_every 200")
    interval, warmup = restart_interval(args), args.restart_warmup_steps
    if interval and warmup is not None and args.scheduler != "cosine_restarts" and warmup >= interval:
        name = "relora" if args.peft_model == "relora" else "restart_every"
        problems.append(
            f"--restart_warmup_steps {warmup}: must be below --{name} {interval}, or the rate never comes back to the schedule's"
        )
    return problems


# Methods whose linears are factors that a restart can act on.
RESTARTED = ("lowrank", "sltrain")


def restart_interval(args: Arguments) -> int | None:
    """Update steps from one restart to the next: ReLoRA's merges, or those of a method with factors; None without."""
    if args.peft_model == "relora":
        return args.relora
    return args.restart_every if args.peft_model in RESTARTED else None
