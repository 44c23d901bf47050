"""The groups of parameters that can have learning rates and weight decay of their own. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from peft_pretraining.config.arguments import Arguments

PARAMETER_GROUPS = ("embedding", "head", "matrix", "sparse", "norm")


def group_of(name: str, dimensions: int) -> str:
    """Returns the group of a parameter, given its qualified name and its number of dimensions.

    embedding: the token embedding, also where it is the output head too (tied). head: the output head. sparse: the values of
    SLTrain's S. norm: all other vectors (norms, biases, trained scales). matrix: dense weights or factors of the linears.
    """
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    if name.rpartition(".")[2] == "sparse_value":
        return "sparse"
    return "matrix" if dimensions > 1 else "norm"


def lr_ratios(args: Arguments) -> Mapping[str, float]:
    """Peak learning rate of each group that has its own, divided by --lr."""
    rates = {group: getattr(args, f"{group}_lr") for group in PARAMETER_GROUPS}
    return {group: rate / args.lr for group, rate in rates.items() if rate is not None}


def undecayed_groups(args: Arguments) -> frozenset[str]:
    """Groups without weight decay."""
    embeddings = () if args.decay_embedding else ("embedding", "head")
    return frozenset((*embeddings, *(() if args.decay_norms else ("norm",))))
