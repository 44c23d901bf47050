"""Prints the largest LLaMA that each method can train on cards of 8 to 24 GB, and the flags, by the account (not measured).

`python benchmarks/cards.py`: the first line of `estimate --fit`, for updates of one sequence of 256 tokens; ranks and shares of
nonzeros as published (3b and 13b: a quarter of the hidden size, as 1b and 7b). Takes a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.commands.fit import Fit, fits
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.world import World
from peft_pretraining.methods import METHODS
from peft_pretraining.plan.advice import Advisor
from peft_pretraining.plan.plan import make_plan

# (config, rank, share of nonzeros), the largest first.
SIZES = (("13b", 1280, 0.05), ("7b", 1024, 0.05), ("3b", 640, 0.03), ("1b", 512, 0.03), ("350m", 256, 0.03), ("130m", 256, 0.03))
CARDS = (8, 12, 16, 24)


def first_fit(method: str, size: str, rank: int, sparsity: float, memory_gb: int) -> Fit | None:
    """Returns the choice of flags with the least work, or None if nothing fits."""
    values: dict[str, float] = {"rank": rank, "sp_ratio": sparsity} if METHODS[method].sparse else {"rank": rank}
    flags = [] if method == "full" else [word for name, value in values.items() for word in (f"--{name}", str(value))]
    fixed = ["--model_config", f"configs/llama_{size}.json", "--peft_model", method, "--lr", "0.001", "--batch_size", "1"]
    args = parse_args([*fixed, *flags, *(["--relora", "1000"] if method == "relora" else [])])
    plan = make_plan(args, World(), "bfloat16", "cuda")
    choices = fits(Advisor(args, plan, "cuda"), memory_gb * 10**9)
    return choices[0] if choices else None


def main() -> None:
    """Prints the table."""
    print("| card | method | largest model | peak, 10^9 bytes | flags |\n|---|---|---|---|---|")
    for memory in CARDS:
        for method in METHODS:
            for size, rank, sparsity in SIZES:
                fit = first_fit(method, size, rank, sparsity, memory)
                if fit is not None:
                    flags = f"`{fit.proposal.text}`" if fit.proposal.text else "none"
                    print(
                        f"| {memory} GB | {METHODS[method].title} | {size} | {fit.proposal.peak / 1e9:.2f} | {flags} |",
                        flush=True,
                    )
                    break


if __name__ == "__main__":
    main()
