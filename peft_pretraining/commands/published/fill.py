"""Fills a model with published tensors; checks every name, shape and position.

Shapes: r rank, N nonzeros of S. Published SLTrain: lora_A (r, in), lora_B (out, r), sparse_value (N,), scaling (1,), and
sparse_index (N,), sorted row-major positions in the (out, in) weight. Published ReLoRA: lora_A.weight (r, in), lora_B.weight
(out, r), weight (out, in), scaling (1,).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peft_pretraining.commands.published.read import SLTRAIN, PublishedCheckpoint, PublishedError
from peft_pretraining.methods import METHODS
from sparse_lora.uniform import UniformSupport

_INDEX = "sparse_index"
_SHOWN = 5


@torch.no_grad()
def fill(model: nn.Module, published: PublishedCheckpoint, *, tied: bool) -> None:
    """Fills every parameter and support of the model with published values, in the model's dtype.

    Args:
        model: a model with the method of `published` applied, on any device.
        tied: whether the output head is the embedding.

    Raises:
        PublishedError: tensors are missing, unknown, of another shape, not finite, or not valid positions; up to five are named.
            The model is then only partly filled.
    """
    targets = {
        _published_name(name, published.by_relora): tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith(".support.code") and not (tied and name == "lm_head.weight")
    }
    supports = {
        f"{name.removesuffix('support')}{_INDEX}": module
        for name, module in model.named_modules()
        if isinstance(module, UniformSupport)
    }
    problems = list(_name_problems(published, {*targets, *supports}, tied))
    for name, support in supports.items():
        if name in published.tensors:
            problems += _place(name, support, published.tensors[name])
    for name, target in targets.items():
        if name in published.tensors:
            problems += _fill_one(name, target, published.tensors[name])
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise PublishedError(f"{published.folder}: {'; '.join(problems[:_SHOWN])}{more}")


def _published_name(name: str, relora: bool) -> str:
    """The name of our tensor in a published checkpoint; ReLoRA's factors are linears there."""
    return f"{name}.weight" if relora and name.endswith((".lora_A", ".lora_B")) else name


def _name_problems(published: PublishedCheckpoint, expected: set[str], tied: bool) -> Iterator[str]:
    head, embedding = (published.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if tied and head is not None and embedding is not None and not torch.equal(head, embedding):
        yield "config.json ties lm_head to the embedding, but their weights differ; set tie_word_embeddings to false there"
    missing = sorted(expected - set(published.tensors))
    # Older LLaMA classes save the frequencies of the rotary embedding, which follow from the configuration.
    ignored = {name for name in published.tensors if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
    unknown = sorted(set(published.tensors) - expected - ignored)
    reason = "; exactly the linears of attention and MLP must be reparameterised (target_modules)"
    for state, names in (("missing", missing), ("unknown", unknown)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"{', '.join(names[:_SHOWN])}{more}: {state}{reason if METHODS[published.method].replaces_linears else ''}"


def _fill_one(name: str, target: Tensor, values: Tensor) -> Iterator[str]:
    if values.shape != target.shape:
        yield f"{name} has shape {tuple(values.shape)}, config.json and the rank require {tuple(target.shape)}"
    elif not values.is_floating_point():
        yield f"{name} is {values.dtype}, not floating-point numbers"
    elif not bool(torch.isfinite(values).all()):
        yield f"{name} holds non-finite numbers; import an earlier checkpoint"
    else:
        target.copy_(values)


def _place(name: str, support: UniformSupport, index: Tensor) -> Iterator[str]:
    """Writes the published positions to the support's storage; yields a problem if they do not fit."""
    problem = _position_problem(name, support, index)
    if problem is not None:
        yield problem
        return
    size = support.nbytes
    support.place_(index.to(torch.int64))
    # It is stored uncompressed, for which a resumed run has no room.
    if support.nbytes != size:
        yield (
            f"{name}: its positions are not uniformly distributed over the weight, so they do not fit the compressed support; "
            "merge the factors into dense weights with the published program, and import those"
        )


def _position_problem(name: str, support: UniformSupport, index: Tensor) -> str | None:
    """Why these are not valid positions of the support; None if they are."""
    if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        return f"{name} is {index.dtype} of shape {tuple(index.shape)}, not whole numbers in one dimension"
    if index.numel() != support.nnz:
        return (
            f"{name} has {index.numel()} positions, sp_ratio in {SLTRAIN} requires {support.nnz} of "
            f"{support.out_features} x {support.in_features}; correct sp_ratio there"
        )
    lowest, highest = (int(end) for end in index.aminmax())
    if lowest < 0 or highest >= support.numel:
        invalid = lowest if lowest < 0 else highest
        cause = ", a 32-bit overflow" if lowest < 0 and index.dtype == torch.int32 else ""
        return f"{name} holds {invalid}{cause}; positions must be 0 .. {support.numel - 1}; save them again as int64"
    gaps = index.diff()
    if bool((gaps < 1).any()):
        place = int((gaps < 1).nonzero()[0])
        order = "twice" if int(gaps[place]) == 0 else f"before {int(index[place + 1])}"
        return (
            f"{name} holds {int(index[place])} {order} at {place}: positions must increase strictly; sort them together with "
            "values and moments"
        )
    return None


def matching_sparsity(sp_ratio: float, tensors: Mapping[str, Tensor]) -> float:
    """Returns sp_ratio, or the next larger float if only that gives int(sp_ratio * out * in) = the published count everywhere.

    The published program multiplies out * in first, so its product may round up to a whole number that ours just misses.
    """
    counts = []
    for name, index in tensors.items():
        layer = name.removesuffix(_INDEX)
        lora_A, lora_B = tensors.get(f"{layer}lora_A"), tensors.get(f"{layer}lora_B")
        if name.endswith(f".{_INDEX}") and lora_A is not None and lora_B is not None:
            counts.append((lora_B.shape[0], lora_A.shape[-1], index.numel()))
    for candidate in (sp_ratio, math.nextafter(sp_ratio, 1.0)):
        if all(int(candidate * rows * columns) == count for rows, columns, count in counts):
            return candidate
    return sp_ratio
