"""Counts a model's parameters under each method and the bytes that training needs; this module does not import torch.

`parameter_counts` is exact. `static_bytes` is exact for parameters, support, gradients and the libraries' optimizer states.
`activation_bytes` is an estimate. `paper_estimate` follows the convention of the paper (arXiv 2406.02214, appendix F), which
leaves out gradients and activations; it exists for comparison with the paper's table.

With --parallel fsdp, `units_of` gives the sizes of the units that FSDP2 gathers and reduces together: a decoder layer, the
embedding, or the rest (final norm and output head, the "root"). Every parameter's rows are divided over the processes as by
torch.chunk, and padded to equal parts for communication.

Notation: L layers, h hidden size, i intermediate size, r rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from peft_pretraining.config.arguments import PROJ_TYPES
from peft_pretraining.config.model_config import ModelConfig, linear_shapes
from peft_pretraining.config.optimizers import BNB_MIN_ELEMENTS, CONDITIONING_BYTES, OPTIMIZERS, Optimizer
from peft_pretraining.config.supports import SUPPORTS
from peft_pretraining.methods import METHODS
from peft_pretraining.methods.method import Method, TensorGroup

DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
# Elements of a slice, for optimizers that step in slices (optim/slices.py).
SLICE_ELEMENTS = 2**21
# Elements of a parameter stored as int8 that share a float32 scale. Slices that optimizers step begin and end with blocks, also
# where 4-bit moments of 128 elements end.
INT8_BLOCK_ELEMENTS = 128


def loss_chunk_rows(device_type: str) -> int:
    """Returns the number of rows whose logits the loss computes at one time.

    On a CPU the logits of 256 rows are small enough for its caches; a GPU needs more work per kernel and per addition to the
    head's float32 gradient sum.
    """
    return 256 if device_type == "cpu" else 1024


@dataclass(frozen=True)
class Counts:
    """Numbers of elements by kind; total = dense + low_rank + sparse.

    dense: embedding, head, norms, biases and dense linears. low_rank: A, B and trained scales. sparse: values of S.
    moments: elements of ONE of Adam's moments by the paper's convention. matrices: those of them that belong to dense weights and
    factors of linears. projections: elements of GaLore's projections.
    rank, sparsity, train_scaling, support: the settings for which elements were counted.
    """

    total: int
    dense: int
    low_rank: int
    sparse: int
    moments: int
    matrices: int
    projections: int
    rank: int
    sparsity: float
    train_scaling: bool
    support: str = "uniform"


def _base_groups(cfg: ModelConfig) -> Iterator[TensorGroup]:
    """Yields the parameters that no method changes: embedding, output head, norms, biases."""
    h, layers = cfg.hidden_size, cfg.num_hidden_layers
    yield TensorGroup("dense", (cfg.vocab_size, h), 1 if cfg.tie_word_embeddings else 2, embedding=True)
    yield TensorGroup("dense", (h,), 2 * layers + 1)
    for position, (out_features, _) in enumerate(linear_shapes(cfg)):
        if cfg.attention_bias if position < 4 else cfg.mlp_bias:
            yield TensorGroup("dense", (out_features,), layers)


class SubspaceShapes(NamedTuple):
    """Shapes of a GaLore matrix's projections (None for a side without projection) and of each of its moments."""

    left: tuple[int, int] | None  # (out, k)
    right: tuple[int, int] | None  # (k, in)
    moments: tuple[int, int]


def subspace_shapes(shape: tuple[int, ...], rank: int, proj_type: str) -> SubspaceShapes:
    """Returns GaLore's shapes for a matrix (out, in) with k = min(rank, out, in).

    proj_type: which side is projected; std projects the shorter side. Raises ValueError on an unknown proj_type.
    """
    rows, columns = shape
    k = min(rank, rows, columns)
    tall = rows >= columns
    if proj_type == "full":
        return SubspaceShapes((rows, k), (k, columns), (k, k))
    if proj_type == "right" or (proj_type == "std" and tall) or (proj_type == "reverse_std" and not tall):
        return SubspaceShapes(None, (k, columns), (rows, k))
    if proj_type in PROJ_TYPES:
        return SubspaceShapes((rows, k), None, (k, columns))
    raise ValueError(f"proj_type {proj_type!r}: not one of {', '.join(PROJ_TYPES)}")


def tensor_groups(
    cfg: ModelConfig,
    *,
    method: str,
    rank: int,
    sparsity: float,
    train_scaling: bool = False,
    support: str = "uniform",
) -> list[TensorGroup]:
    """Returns every parameter of the model under `method`, grouped by shape.

    rank, sparsity (share of entries in S) and support (its kind) are used by the methods that have them. The method decides
    about the linears of attention and MLP; embedding, head and norms stay dense. Raises ValueError on an unknown method.
    """
    of_linear, layers = _method(method).linear_groups, cfg.num_hidden_layers
    groups = list(_base_groups(cfg))
    for shape in linear_shapes(cfg):
        groups += of_linear(shape, layers, rank=rank, sparsity=sparsity, train_scaling=train_scaling, support=support)
    return groups


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"method {name!r}: not one of {', '.join(METHODS)}")
    return METHODS[name]


def parameter_counts(
    cfg: ModelConfig,
    *,
    method: str,
    rank: int,
    sparsity: float,
    train_scaling: bool = False,
    support: str = "uniform",
) -> Counts:
    """Returns exact numbers of elements; see Counts and tensor_groups.

    `moments` follows the paper's convention: all trained elements, for ReLoRA those of the factors only, and for each matrix that
    GaLore projects r x max(out, in), with a projection of r x min(out, in).
    """
    choice: dict[str, Any] = {"rank": rank, "sparsity": sparsity, "train_scaling": train_scaling, "support": support}
    groups = tensor_groups(cfg, method=method, **choice)
    by_kind = {kind: sum(g.elements for g in groups if g.kind == kind) for kind in ("dense", "low_rank", "sparse")}
    total = sum(by_kind.values())
    projected = [g for g in groups if g.projected]
    moments = by_kind["low_rank"] if METHODS[method].frozen_base else total
    moments += sum(g.count * rank * max(g.shape) - g.elements for g in projected)
    return Counts(
        total=total,
        dense=by_kind["dense"],
        low_rank=by_kind["low_rank"],
        sparse=by_kind["sparse"],
        moments=moments,
        matrices=sum(g.elements for g in groups if g.trained and _is_matrix(g)),
        projections=sum(g.count * rank * min(g.shape) for g in projected),
        **choice,
    )


def paper_bytes(counts: Counts, optimizer: str = "adamw") -> tuple[int, int]:
    """Returns bytes of parameters (support indices included) and of the optimizer as paper_estimate counts them."""
    index_bytes = 8 * counts.sparse if SUPPORTS[counts.support].stored else 0
    single = counts.matrices if _optimizer(optimizer).matrix_bytes is not None else 0
    return 2 * counts.total + index_bytes, 4 * counts.moments - 2 * single + 2 * counts.projections


def paper_estimate(counts: Counts, method: str, optimizer: str = "adamw") -> dict[str, float]:
    """Returns memory as in the paper's table, in units of 10^9 bytes: parameters_G, optimizer_G, total_G.

    Counted are bfloat16 parameters, two bfloat16 moments (one of matrices that Muon or Spectron steps), and 8 bytes of index
    per nonzero of a uniform support (block supports, which are not in the paper, need none), but no gradients and no activations.
    As in the table, each part is rounded to two digits and the total is the sum of the rounded parts. Raises ValueError on an
    unknown method or optimizer.
    """
    _method(method)
    parameters, moments = (round(size / 1e9, 2) for size in paper_bytes(counts, optimizer))
    return {"parameters_G": parameters, "optimizer_G": moments, "total_G": round(parameters + moments, 2)}


def static_bytes(
    cfg: ModelConfig,
    counts: Counts,
    *,
    method: str,
    dtype: str,
    optimizer: str,
    beta1: float = 0.0,
    condition_gradients: bool = False,
    embedding_bits: int | None = None,
    stochastic_rounding: bool = False,
    weight_dtype: str | None = None,
    proj_type: str = "std",
    parts: int = 1,
) -> dict[str, int]:
    """Returns bytes of the tensors that exist throughout a run: parameters, support, gradients, optimizer.

    Args:
        cfg: the model's configuration.
        counts: the result of parameter_counts for `cfg` and `method`.
        method: a name in METHODS.
        dtype: bfloat16 | float32 | float64, dtype of parameters and gradients.
        optimizer: a name in OPTIMIZERS, with the libraries' layout of states.
        beta1: sgd's momentum and adafactor's first moment; 0 disables them.
        condition_gradients: muon's and spectron's other parameters have the state of gradient conditioning too.
        embedding_bits: bits of the moments of embedding and head with low-bit optimizers; None: as for other parameters.
        stochastic_rounding: Adam's step counts are then Python numbers instead of tensors, except for GaLore's matrices.
        weight_dtype: "int8" for parameters that are stored in int8, with the same step counts; None for `dtype`.
        proj_type: GaLore's side, see subspace_shapes; projections, in `dtype`, count as optimizer memory.
        parts: processes over which FSDP2 divides everything except the supports; process 0's part, the largest, is counted.

    Gradients are counted for all trained parameters, as between the backward pass and the optimizer's step.
    """
    choice: dict[str, Any] = {name: getattr(counts, name) for name in ("rank", "sparsity", "train_scaling", "support")}
    whole = tensor_groups(cfg, method=method, **choice)
    groups = [replace(g, shape=first_part(g.shape, parts)) for g in whole]
    width, kind = _element_bytes(dtype), _optimizer(optimizer)
    trained = [g for g in groups if g.trained]
    states, shared = 0, set[int]()
    for g in trained:
        bits, stepped = embedding_bits if g.embedding else None, g.shape
        if g.projected:
            left, right, stepped = subspace_shapes(g.shape, counts.rank, proj_type)
            states += g.count * width * sum(math.prod(side) for side in (left, right) if side is not None)
        of_matrix = kind.matrix_bytes if _is_matrix(g) else None
        states += g.count * (of_matrix or kind.state_bytes)(stepped, width, beta1, bits)
        if (stochastic_rounding or weight_dtype is not None) and of_matrix is None and not g.projected:
            states -= kind.step_count_bytes * g.count
        if of_matrix is None and (condition_gradients or kind.conditions_all_gradients):
            states += CONDITIONING_BYTES * g.count
        if math.prod(stepped) >= BNB_MIN_ELEMENTS and bits != 32:
            shared.add(kind.shared_bytes if of_matrix is None else kind.matrix_shared_bytes)
    states += sum(shared)
    return {
        "parameters": sum(g.count * parameter_bytes(g, width, weight_dtype) for g in groups),
        "support": sum(g.count * support_bytes(g.shape[0], g.support_entries) for g in whole if g.kind == "sparse"),
        "gradients": width * sum(g.elements for g in trained),
        "optimizer": states,
    }


def parameter_bytes(group: TensorGroup, width: int, weight_dtype: str | None) -> int:
    """Returns bytes of one parameter: of `width` bytes per element, or if it is stored in int8, of codes and scales."""
    elements = math.prod(group.shape)
    if weight_dtype is None or (len(group.shape) < 2 and group.kind != "sparse"):
        return width * elements
    return elements + 4 * math.ceil(elements / INT8_BLOCK_ELEMENTS)


def _is_matrix(group: TensorGroup) -> bool:
    """Whether these are dense weights or factors of linears, see config.parameter_groups."""
    return len(group.shape) == 2 and not group.embedding


def first_part(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Returns the shape of process 0's part, the largest, of a parameter whose rows FSDP2 divides over `parts` processes."""
    return (math.ceil(shape[0] / parts), *shape[1:])


def support_bytes(nnz: int, entries: int) -> int:
    """Returns bytes of one matrix's stored support; 0 if `entries` is 0, see TensorGroup."""
    if not entries:
        return 0
    # Imported here because the package imports torch, which would delay error messages for wrong arguments.
    from sparse_lora.uniform import layout_for

    return layout_for(nnz, entries).nbytes


def _element_bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r}: not one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def _optimizer(name: str) -> Optimizer:
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r}: not one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def activation_bytes(
    cfg: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str,
    checkpointing: str | None = None,
    compiled: bool = False,
    factored_rank: int = 0,
    document_mask: bool = False,
    chunk_rows: int | None = None,
    head_gradient: str = "whole",
    takes_rows: bool = False,
) -> dict[str, int]:
    """Estimates the bytes that one micro-batch keeps for its backward pass: {"activations", "loss"}.

    Per token and decoder layer, with b bytes per element: each of the two norms keeps its input in float32 (4h), the normalised
    value and its output (2bh); attention keeps rotated queries and keys, values, its output (b(2h + 2kv)) and one float32 per
    head; the MLP keeps the gate before and after its activation, up, and their product (4bi). Linears keep only their input,
    which is one of these tensors; on the factored path also x A^T, `factored_rank` elements per token for all linears of a layer.
    A document mask is one matrix per sequence for all layers. Of a compiled layer torch's partitioner keeps less and recomputes
    norms and products: the input and output of each norm (4bh), gate, up and their product (3bi). With checkpointing ("layer" or
    "selective") a layer keeps its input, "selective" also attention's output, and one layer at a time is recomputed.
    loss, head_gradient, takes_rows: see loss_bytes.
    """
    tokens = batch_size * seq_len
    h, b, layers = cfg.hidden_size, _element_bytes(dtype), cfg.num_hidden_layers
    kv = cfg.num_key_value_heads * cfg.head_dim
    norm = 4 * h + 2 * b * h
    attention = b * (2 * h + 2 * kv) + 4 * cfg.num_attention_heads
    if compiled:
        layer = 4 * b * h + attention + 3 * b * cfg.intermediate_size
    else:
        layer = 2 * norm + attention + 4 * b * cfg.intermediate_size
    layer += b * factored_rank
    if checkpointing is None:
        kept = layers * layer
    else:
        kept_per_layer = b * h + (b * h + 4 * cfg.num_attention_heads if checkpointing == "selective" else 0)
        kept = layers * kept_per_layer + layer
    return {
        "activations": tokens * (kept + norm + (b * seq_len if document_mask else 0)),  # + the final norm
        "loss": loss_bytes(cfg, tokens, dtype, chunk_rows or loss_chunk_rows("cuda"), head_gradient, takes_rows),
    }


def loss_bytes(
    cfg: ModelConfig, num_rows: int, dtype: str, chunk_rows: int, head_gradient: str = "whole", takes_rows: bool = False
) -> int:
    """Returns the most temporary bytes of loss.chunked_cross_entropy for num_rows targets, the head's gradient included.

    The rows' hidden states and their gradient exist throughout. Added is the largest of: a chunk's logits and log-softmax in
    float32; the logits' gradient and the chunk's gradient of the head; the head's gradient before and after it is scaled, which
    in the same dtype happens in place. With several chunks the head's gradient is summed in float32.

    head_gradient "slices": the gradient is assembled from slices in the backward pass; takes_rows: slices are stepped instead.
    """
    b, chunk = _element_bytes(dtype), min(num_rows, chunk_rows) * cfg.vocab_size
    sum_width = max(4, b)
    head = cfg.vocab_size * cfg.hidden_size
    states, logits = 2 * b * num_rows * cfg.hidden_size, 2 * sum_width * chunk
    if head_gradient == "slices":
        slices = head_slice_bytes(cfg, num_rows, dtype, chunk_rows)
        return states + max(logits, slices if takes_rows else b * head + slices)
    head_sum = sum_width * head if num_rows > chunk_rows else 0
    products = head_sum + b * chunk + b * head
    scaled = head_sum + b * head if b < sum_width else head_sum
    return states + max(head_sum + logits, products, scaled)


def head_slice_bytes(cfg: ModelConfig, num_rows: int, dtype: str, chunk_rows: int) -> int:
    """Returns the most temporary bytes of computing a slice of the head's gradient (model.loss.HeadGradient.rows).

    A block's logits in float32 with the largest of: their rounded copy, its product with the hidden states and the sum of earlier
    blocks' products in float32; or the product and the new sum.
    """
    b, wide = _element_bytes(dtype), max(4, _element_bytes(dtype))
    width = min(cfg.vocab_size, math.ceil(SLICE_ELEMENTS / cfg.hidden_size))
    logits, product = min(num_rows * width, chunk_rows * cfg.vocab_size), b * width * cfg.hidden_size
    total = wide * width * cfg.hidden_size if num_rows * width > logits else 0
    rounded = b if b < wide else 0
    summed = wide * width * cfg.hidden_size if rounded else total
    return max((wide + rounded) * logits + product + total, wide * logits + product + summed)


@dataclass(frozen=True)
class FsdpUnit:
    """Elements of a unit's parameters: `whole`, and process 0's `part`, the size to which all parts are padded."""

    whole: int = 0
    part: int = 0
    processes: int = 1

    @property
    def padded(self) -> int:
        """Elements that are gathered or reduced, padding included."""
        return self.part * self.processes


@dataclass(frozen=True)
class FsdpUnits:
    """The FSDP2 units of a model: the embedding (empty if tied to the head), `num_layers` equal layers, and the root."""

    embedding: FsdpUnit
    layer: FsdpUnit
    root: FsdpUnit
    num_layers: int

    @property
    def whole(self) -> int:
        """Elements of all units."""
        return self.embedding.whole + self.num_layers * self.layer.whole + self.root.whole

    @property
    def part(self) -> int:
        """Elements of process 0's parts of all units."""
        return self.embedding.part + self.num_layers * self.layer.part + self.root.part

    @property
    def padded(self) -> int:
        """Elements of all units, padded."""
        return self.embedding.padded + self.num_layers * self.layer.padded + self.root.padded


def units_of(cfg: ModelConfig, groups: list[TensorGroup], processes: int) -> FsdpUnits:
    """Returns the units of a model whose parameters are `groups` (see memory.counts.tensor_groups)."""
    layers = cfg.num_hidden_layers
    embedding, layer, root = [], [], []
    for group in groups:
        if group.embedding:
            root.append((group.shape, 1))
            embedding.append((group.shape, group.count - 1))
        else:
            final_norm = group.count == 2 * layers + 1
            root.append((group.shape, int(final_norm)))
            layer.append((group.shape, (group.count - final_norm) // layers))
    return FsdpUnits(_unit(embedding, processes), _unit(layer, processes), _unit(root, processes), layers)


def _unit(shapes: list[tuple[tuple[int, ...], int]], processes: int) -> FsdpUnit:
    """Returns the unit of parameters given as (shape, number of parameters of this shape)."""
    return FsdpUnit(
        whole=sum(count * math.prod(shape) for shape, count in shapes),
        part=sum(count * math.prod(first_part(shape, processes)) for shape, count in shapes),
        processes=processes,
    )
