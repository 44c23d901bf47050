"""`estimate --fit 8GB`: the flags with which a model can be trained in a given amount of memory, least work first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.model_config import linear_shapes
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.config.supports import SUPPORTS
from peft_pretraining.memory.counts import DTYPE_BYTES
from peft_pretraining.memory.setting import MemorySetting
from peft_pretraining.plan.advice import Advisor, Proposal, int8_weights, smaller_optimizers
from peft_pretraining.plan.plan import GIB
from sparse_lora.functional import cheaper_path, multiplications

# Upper limit of a proposed micro-batch, in tokens: a whole update of the published setting, 512 sequences of 256 tokens.
_LARGEST_TOKENS = 512 * 256


@dataclass(frozen=True)
class Fit:
    """Flags that fit. work: multiplications per token. altered: names of the flags that change the result of the training."""

    proposal: Proposal
    work: float
    altered: tuple[str, ...]
    batch_size: int


def fits(advisor: Advisor, limit: int) -> list[Fit]:
    """Returns choices of the flags that the user left open with a peak of at most `limit` bytes, the least work first.

    For equal altered flags and values, only the choice with the least work is returned. A choice is left out if an earlier one in
    the order alters only flags that this choice alters too.
    """
    best: dict[tuple[tuple[str, Any], ...], Fit] = {}
    for altering, free in itertools.product(_altering(advisor.args), _free(advisor.args)):
        proposal = _largest_batch(advisor, {**altering, **free}, limit)
        if proposal is None:
            continue
        work = multiplications_per_token(advisor.setting(proposal.changes))
        kind = tuple(altering.items())
        previous = best.get(kind)
        if previous is None or (work, len(free)) < (previous.work, len(previous.proposal.changes)):
            size = proposal.changes.get("batch_size", advisor.args.batch_size)
            best[kind] = Fit(proposal, work, tuple(altering), size)
    if not best:
        return []
    # Works within 2 % count as equal. Of equals, accumulation in moments, which costs most in perplexity (docs/memory.md), comes
    # last, and fewer altered flags come first.
    least = min(fit.work for fit in best.values())
    return _undominated(
        sorted(best.values(), key=lambda fit: (round(50 * fit.work / least), "accumulate" in fit.altered, len(fit.altered)))
    )


def _undominated(ordered: Sequence[Fit]) -> list[Fit]:
    kept: list[Fit] = []
    for fit in ordered:
        if not any(set(other.altered) <= set(fit.altered) for other in kept):
            kept.append(fit)
    return kept


def _altering(args: Arguments) -> Iterator[dict[str, Any]]:
    """Yields changes of flags that alter the result of the training, of those that are not given."""
    optimizers = [{}, *({"optimizer": name} for name in smaller_optimizers(args.optimizer))]
    options: list[Sequence[Mapping[str, Any]]] = [
        optimizers if "optimizer" not in args.given else [{}],
        [{}, {"embedding_states": "8bit"}, {"embedding_states": "4bit"}] if args.embedding_states is None else [{}],
        [{}, int8_weights(args)] if "weight_dtype" not in args.given else [{}],
        [{}, {"accumulate": "moments"}] if "accumulate" not in args.given else [{}],
    ]
    for parts in itertools.product(*options):
        changes = {name: value for part in parts for name, value in part.items()}
        low_bit = OPTIMIZERS[changes.get("optimizer", args.optimizer)].low_bit
        if low_bit or "embedding_states" not in changes:
            yield changes


def _free(args: Arguments) -> Iterator[dict[str, Any]]:
    """Yields changes of flags that leave the result as it is but for rounding, of those that are not given."""
    checkpointing = (
        [None, "selective", "layer"] if "activation_checkpointing" not in args.given else [args.activation_checkpointing]
    )
    per_layer = [False, True] if "per_layer" not in args.given and not args.per_layer else [args.per_layer]
    head = ["whole", "slices"] if "head_gradient" not in args.given else [args.head_gradient]
    for values in itertools.product(checkpointing, per_layer, head):
        wanted = dict(zip(("activation_checkpointing", "per_layer", "head_gradient"), values, strict=True))
        changes = {name: value for name, value in wanted.items() if value != getattr(args, name)}
        yield changes


def _largest_batch(advisor: Advisor, changes: Mapping[str, Any], limit: int) -> Proposal | None:
    """Returns the proposal with the largest micro-batch that fits; None if not even one sequence does, or the checks refuse."""
    largest = None
    for size in _batch_sizes(advisor):
        batch = {"batch_size": size} if size != advisor.args.batch_size else {}
        proposal = advisor.proposal({**changes, **batch})
        if proposal.peak > limit:
            break
        if largest is None and not advisor.accepted(proposal.changes):
            return None
        largest = proposal
    return largest


def _batch_sizes(advisor: Advisor) -> list[int]:
    """Returns the micro-batches to try, the smallest first: the given one, or powers of two that divide a given total batch."""
    args, plan = advisor.args, advisor.plan
    if "batch_size" in args.given:
        return [args.batch_size]
    total_given = "total_batch_size" in args.given
    most = plan.total_batch_size // plan.world_size if total_given else max(1, _LARGEST_TOKENS // args.max_length)
    powers = [2**exponent for exponent in range(most.bit_length())]
    return [size for size in powers if not total_given or most % size == 0]


def multiplications_per_token(setting: MemorySetting) -> float:
    """Returns the multiplications per token of an update's matrix products.

    Counted are linears, attention and output head, and what checkpointing and a head's gradient in slices compute again. The time
    in which block supports move elements counts as multiplications. Optimizers and all else are left out.
    """
    model, rows = setting.model, setting.batch_size * setting.max_length
    linears = model.num_hidden_layers * sum(_of_linear(setting, shape, rows) for shape in linear_shapes(model)) / rows
    attention = model.num_hidden_layers * 3 * setting.max_length * model.num_attention_heads * model.head_dim
    head = model.vocab_size * model.hidden_size * (4 if setting.head_gradient == "slices" else 3)
    # The forward pass is a third.
    again = {"layer": (linears + attention) / 3, "selective": linears / 3}.get(str(setting.activation_checkpointing), 0.0)
    return linears + attention + head + again


def _of_linear(setting: MemorySetting, shape: tuple[int, int], rows: int) -> float:
    if not setting.method.factored:
        return 3.0 * rows * shape[0] * shape[1]
    kind, nnz = ("none", 0)
    if setting.method.sparse:
        kind, nnz = setting.support, SUPPORTS[setting.support].nonzeros(*shape, setting.sp_ratio)
    sizes = (rows, *shape, setting.rank, kind, nnz, setting.device_type, DTYPE_BYTES[setting.computes_in])
    path = cheaper_path(*sizes) if setting.linear_path == "auto" else setting.linear_path
    return multiplications(path, *sizes)


def format_fits(choices: Sequence[Fit], args: Arguments, limit: int) -> str:
    """Formats the choices for a terminal."""
    if not choices:
        return f"no choice of flags fits in {limit / GIB:.2f} GiB; take a smaller model, a smaller rank, or more memory"
    least = min(fit.work for fit in choices)
    lines = [f"fits in {limit / GIB:.2f} GiB, least work first (work: matrix products per token, computed, not measured):"]
    for fit in choices:
        altered = [name for name in fit.altered if name != "stochastic_rounding"]
        results = f"other results, by {', '.join(altered)}" if altered else "same results but for rounding"
        lines.append(
            f"work {fit.work / least:.2f}, peak {fit.proposal.peak / GIB:.2f} GiB, micro-batch {fit.batch_size}, {results}"
        )
        lines.append(f"    {fit.proposal.text or 'no more flags'}")
    if args.total_batch_size is None and args.gradient_accumulation is None:
        lines.append("an update is one micro-batch; --total_batch_size N asks for flags with updates of N sequences")
    return "\n".join(lines)
