"""Predicts the memory of a run per process: bytes by class, and their peak; this module does not import torch.

`counts.py` counts tensors, `peak.py` computes which of them are allocated at the same time. `plan/advice.py` proposes flags that
lower the peak.
"""

from __future__ import annotations

import math
from dataclasses import replace

from peft_pretraining.config.model_config import linear_shapes
from peft_pretraining.config.optimizers import CONDITIONING_SCRATCH, OPTIMIZERS
from peft_pretraining.config.supports import SUPPORTS, SupportKind
from peft_pretraining.distributed.device import CUDA_CONTEXT_BYTES, LARGE_BLOCK_BYTES
from peft_pretraining.memory.counts import (
    DTYPE_BYTES,
    SLICE_ELEMENTS,
    FsdpUnits,
    activation_bytes,
    first_part,
    loss_chunk_rows,
    parameter_counts,
    static_bytes,
    subspace_shapes,
    tensor_groups,
    units_of,
)
from peft_pretraining.memory.peak import Working, sharded_points, unsharded_points
from peft_pretraining.memory.setting import MemorySetting
from peft_pretraining.methods.method import TensorGroup

CLASSES = (
    *("parameters", "support", "cache", "gradients", "optimizer"),
    *("activations", "loss", "scratch", "runtime"),
)
# On a CPU: 0.51e9 resident for Python and the imported libraries (torch, transformers, datasets, wandb; pinned versions) plus
# about 0.2e9 of freed blocks that malloc keeps (measured at 60M and 130M).
_CPU_RUNTIME = 710 * 10**6
# torch gives cuBLAS 32 MiB for each thread and stream on an H100, 8 MiB on older GPUs (notes/cuda in torch's documentation); the
# forward and the backward pass run in two threads.
_CUBLAS_WORKSPACES = 2 * 32 * 2**20
# Not measured: a ring of at most 32 channels, each with a buffer of 4 MiB for either neighbour (NCCL_BUFFSIZE's default).
_NCCL_BUFFERS = 32 * 2 * 4 * 2**20
# Gaps that malloc leaves between activations, relative to their size: torch asks for aligned blocks, so a freed block does not
# fit another block of its size (measured at 130M and 350M; docs/memory.md).
_GAPS = 0.3
# Bytes per element of stepping a slice in float32 and rounding it, stochastically or to int8.
_ROUNDING_SCRATCH = 36
# The same of adding a gradient to quantised moments (optim/moments.py).
_ACCUMULATION_SCRATCH = 40
# Memory of torch.linalg.svd in float32, results included: elements per element of the matrix, and per element of a square of its
# shorter side. Measured on a CPU (LAPACK's gesdd; 1024 x 1024 to 2736 x 1024): within 10 % for tall matrices, less for wide ones.
_SVD_PER_ELEMENT, _SVD_PER_SQUARE = 3, 4
# Memory of rebalancing a layer at a restart, in float32, new factors and LAPACK's workspace included: elements per element of B
# and A, and per element of their r x r core. Measured on a CPU (1376 x 512 to 5461 x 2048, r a quarter of the shorter side):
# the measured value is 11 % lower to 8 % higher.
_REBALANCE_PER_ELEMENT, _REBALANCE_PER_SQUARE = 2, 16
# Memory of --init svd, in float64: elements per element of the dense weight, and per element of a square of its shorter side.
# Measured in the same way: 11 % lower to 2 % higher.
_START_PER_ELEMENT, _START_PER_SQUARE = 1, 5
# DistributedDataParallel's bucket size; a larger tensor has its own bucket.
_BUCKET_BYTES = 25 * 2**20


def account(setting: MemorySetting) -> dict[str, int]:
    """Returns bytes by class, "total" (their sum) and "peak" (the most that is allocated at one time).

    With --parallel fsdp the figures are those of process 0, whose parts are the largest. Gathered layers and buffers of
    collectives count as scratch; gradients that are accumulated whole count as gradients.
    """
    groups = parameter_groups(setting)
    units = units_of(setting.model, groups, setting.parts)
    stepped = [group for group in groups if group.trained]
    trained = units_of(setting.model, stepped, setting.parts)
    static = _static_bytes(setting) | {"cache": _cache_bytes(setting)}
    kept = activation_bytes(
        setting.model,
        batch_size=setting.batch_size,
        seq_len=setting.max_length,
        dtype=setting.computes_in,
        checkpointing=setting.activation_checkpointing,
        compiled=setting.compile,
        document_mask=setting.document_mask,
        factored_rank=sum(setting.rank for shape in linear_shapes(setting.model) if _is_factored(setting, shape)),
        chunk_rows=loss_chunk_rows(setting.device_type),
        head_gradient=setting.head_gradient,
        takes_rows=setting.steps_rows,
    )
    # The loss computes the head's values from its codes, some rows at a time.
    kept["loss"] += _dequantised(setting, min(SLICE_ELEMENTS, setting.model.vocab_size * setting.model.hidden_size))
    largest = max(math.prod(first_part(group.shape, setting.parts)) for group in stepped)
    of_layers = max(math.prod(group.shape) for group in stepped if not group.embedding)
    if setting.sharded and setting.gradient_accumulation > 1:
        static["gradients"] = DTYPE_BYTES[setting.reduces_in] * trained.whole
    elif not setting.gradients_stay:
        one = of_layers if setting.steps_rows else largest
        alone = max(trained.embedding.part, trained.layer.part, trained.root.part) if setting.sharded else one
        static["gradients"] = DTYPE_BYTES[setting.dtype] * alone
    working = Working(
        static["gradients"],
        layer_gradients=DTYPE_BYTES[setting.dtype] * of_layers,
        **kept,
        lasting=_lasting_scratch(setting),
        layer=_layer_scratch(setting) + _reduction_copy(setting, trained, largest),
        step=_step_scratch(setting, largest),
        restart=max(_restart_scratch(setting), _start_scratch(setting) - static["optimizer"]),
    )
    points = sharded_points(setting, working, units, trained) if setting.sharded else unsharded_points(setting, working)
    copy = _copy_of_state(setting, static)
    scratch = max(point.scratch for point in points) + copy
    sizes = static | kept | {"scratch": scratch, "runtime": _runtime(setting, kept["activations"])}
    constant = sum(sizes[name] for name in ("parameters", "support", "cache", "optimizer", "runtime"))
    sizes["total"] = sum(sizes[name] for name in CLASSES)
    sizes["peak"] = constant + max(sum(point) for point in points) + copy
    return sizes


def _runtime(setting: MemorySetting, activations: int) -> int:
    """Returns bytes that are not tensors: libraries, a GPU's context and its libraries' buffers, and gaps between activations."""
    if setting.device_type == "cuda":
        return CUDA_CONTEXT_BYTES + _CUBLAS_WORKSPACES + (_NCCL_BUFFERS if setting.world_size > 1 else 0)
    # Larger blocks leave no gaps: they are returned to the system as soon as they are freed.
    block = setting.batch_size * setting.max_length * setting.model.hidden_size * DTYPE_BYTES[setting.computes_in]
    leaves_gaps = not setting.sharded and block < LARGE_BLOCK_BYTES
    return _CPU_RUNTIME + (int(_GAPS * activations) if leaves_gaps else 0)


def parameter_groups(setting: MemorySetting) -> list[TensorGroup]:
    """Returns every parameter of the run, grouped by shape."""
    return tensor_groups(setting.model, **setting.method_arguments)


def _static_bytes(setting: MemorySetting) -> dict[str, int]:
    counts = parameter_counts(setting.model, **setting.method_arguments)
    return static_bytes(
        setting.model,
        counts,
        method=setting.peft_model,
        dtype=setting.dtype,
        optimizer=setting.optimizer,
        beta1=setting.beta1,
        condition_gradients=setting.condition_gradients,
        embedding_bits=setting.embedding_bits,
        # The step counts of the optimizers that accumulate are no tensors either.
        stochastic_rounding=setting.stochastic_rounding or setting.accumulate == "moments",
        weight_dtype=setting.weight_dtype,
        proj_type=setting.proj_type,
        parts=setting.parts,
    )


def _copy_of_state(setting: MemorySetting, static: dict[str, int]) -> int:
    """Returns bytes of --async_save's copy of the state, which stays allocated; on a GPU it is in host memory and counts 0."""
    if not setting.async_save or setting.device_type != "cpu":
        return 0
    return sum(static[name] for name in ("parameters", "support", "optimizer"))


def _reduction_copy(setting: MemorySetting, units: FsdpUnits, largest: int) -> int:
    """Returns bytes of gradients converted for the all-reduce: a DDP bucket's, or one tensor's in per-layer updates."""
    if setting.world_size == 1 or setting.sharded or setting.reduces_in == setting.dtype:
        return 0
    bucket = max(_BUCKET_BYTES // DTYPE_BYTES[setting.dtype], largest)
    return DTYPE_BYTES[setting.reduces_in] * (largest if setting.per_layer else min(bucket, units.whole))


def _cache_bytes(setting: MemorySetting) -> int:
    """Returns bytes of what --linear_cache keeps between passes: decoded positions, and weights that linears would build."""
    shapes = linear_shapes(setting.model) * setting.model.num_hidden_layers
    if setting.linear_cache == "none" or not setting.method.factored:
        return 0
    positions = sum(_position_bytes(setting, shape) for shape in shapes)
    if setting.linear_cache == "positions":
        return positions
    built = [shape for shape in shapes if not _is_factored(setting, shape)]
    return positions + DTYPE_BYTES[setting.computes_in] * sum(map(math.prod, built))


def _position_bytes(setting: MemorySetting, shape: tuple[int, int]) -> int:
    """Returns bytes of the decoded positions of a linear (out, in); 0 for a support that stores none."""
    support = _support(setting)
    if support is None or not support.stored:
        return 0
    return support.nonzeros(*shape, setting.sp_ratio) * (4 if math.prod(shape) <= 2**31 else 8)


def _is_factored(setting: MemorySetting, shape: tuple[int, int]) -> bool:
    """Tells whether a linear (out, in) takes the factored path, as sparse_lora.functional decides for its own layers."""
    if not setting.method.factored:
        return setting.method.replaces_linears
    if setting.linear_path != "auto":
        return setting.linear_path == "factored"
    # Imported here because the package imports torch, which would delay error messages for wrong arguments.
    from sparse_lora.functional import cheaper_path

    support = _support(setting)
    kind, nnz = (setting.support, support.nonzeros(*shape, setting.sp_ratio)) if support else ("none", 0)
    rows = setting.batch_size * setting.max_length
    width = DTYPE_BYTES[setting.computes_in]
    return cheaper_path(rows, *shape, setting.rank, kind, nnz, setting.device_type, width) == "factored"


def _support(setting: MemorySetting) -> SupportKind | None:
    """Returns the kind of support of the sparse part; None without a sparse part."""
    return SUPPORTS[setting.support] if setting.method.sparse else None


def _layer_scratch(setting: MemorySetting) -> int:
    """Returns bytes of temporaries in a linear's backward pass, for the linear with the most."""
    # nn.Linear has none but a stored weight's values: its weight and gradient are counted in their own classes.
    if not setting.method.replaces_linears:
        return _dequantised(setting, max(map(math.prod, linear_shapes(setting.model))))
    if not setting.method.factored:
        return max(_beside_weight(setting, shape) for shape in linear_shapes(setting.model))
    return max(_linear_scratch(setting, shape) for shape in linear_shapes(setting.model))


def _dequantised(setting: MemorySetting, elements: int) -> int:
    """Returns bytes of the values of parameters that are stored in int8, which exist while they are used; 0 for plain ones."""
    return 0 if setting.weight_dtype is None else DTYPE_BYTES[setting.computes_in] * elements


def _lasting_scratch(setting: MemorySetting) -> int:
    """Returns bytes of the CPU's reused scratch memory: the largest weight that is built, or the largest reordered outputs."""
    if not setting.method.replaces_linears or setting.device_type != "cpu":
        return 0
    from sparse_lora.support import large_bytes

    width, shapes = DTYPE_BYTES[setting.computes_in], linear_shapes(setting.model)
    used = [shape for shape in shapes if _builds_matrix(setting, shape)]
    used += [_reordered(setting, shape) for shape in shapes]
    return max(large_bytes(shape, width) for shape in used)


def _builds_matrix(setting: MemorySetting, shape: tuple[int, int]) -> bool:
    """Tells whether a linear (out, in) builds a dense matrix of its weight's size: W, or S as a dense matrix."""
    support = _support(setting)
    return (support is not None and support.stored) or not _is_factored(setting, shape)


def _reordered(setting: MemorySetting, shape: tuple[int, int]) -> tuple[int, int]:
    """Returns (rows, columns) of the copy of a linear's outputs or gradients that a support reorders; 0 rows if none."""
    support = _support(setting)
    reordered = support is not None and support.reorders_outputs and _is_factored(setting, shape)
    return (setting.batch_size * setting.max_length if reordered else 0, shape[0])


def _linear_scratch(setting: MemorySetting, shape: tuple[int, int]) -> int:
    """Returns bytes of temporaries in the backward pass of a linear (out, in).

    Counted: the dense weight or its gradient if it is built; the decoded support; values and factors with their gradients; on the
    factored path also the gradient of x A^T and reordered output gradients.
    """
    rows, columns = shape
    width, factored = DTYPE_BYTES[setting.computes_in], _is_factored(setting, shape)
    support = _support(setting)
    nnz = support.nonzeros(rows, columns, setting.sp_ratio) if support else 0
    stored = support is not None and support.stored
    positions = _position_bytes(setting, shape) if setting.linear_cache == "none" else 0
    dense = rows * columns * width if _builds_matrix(setting, shape) else 0
    if stored and setting.device_type == "cuda" and width == 2 and setting.kernels != "torch":
        from sparse_lora.kernels import may_be_used, scratch_bytes

        # Counted whether or not Triton is installed here: the run may be planned for another machine.
        dense += scratch_bytes(rows, columns) if may_be_used(setting.kernels) else 0
    kept = width * setting.rank * setting.batch_size * setting.max_length if factored else 0
    kept += width * math.prod(_reordered(setting, shape))
    parameters = nnz + setting.rank * (rows + columns)
    return dense + 2 * positions + 2 * width * parameters + _dequantised(setting, parameters) + kept


def _beside_weight(setting: MemorySetting, shape: tuple[int, int]) -> int:
    """Returns bytes of temporaries of a linear's factors, beside a frozen weight or alone, in forward and backward pass."""
    rows = setting.batch_size * setting.max_length
    return DTYPE_BYTES[setting.computes_in] * (rows * (max(shape) + setting.rank) + setting.rank * sum(shape))


def _restart_scratch(setting: MemorySetting) -> int:
    """Returns bytes of temporaries of a restart: of merging factors into a slice of a weight, or of rebalancing a layer."""
    shapes, rank = linear_shapes(setting.model), setting.rank
    if setting.method.frozen_base:
        rounding = _ROUNDING_SCRATCH if setting.stochastic_rounding else 0
        factors = 4 * rank * max(sum(shape) for shape in shapes)
        return factors + (8 + rounding) * min(max(map(math.prod, shapes)), SLICE_ELEMENTS)
    if setting.rebalance and setting.method.factored:
        elements = rank * max(sum(shape) for shape in shapes)
        return 4 * (_REBALANCE_PER_ELEMENT * elements + _REBALANCE_PER_SQUARE * rank * rank)
    return 0


def _start_scratch(setting: MemorySetting) -> int:
    """Returns bytes of temporaries of --init svd, dense weight included; they are in host memory, before the optimizer exists."""
    if setting.init != "svd" or setting.device_type != "cpu" or not setting.method.factored:
        return 0
    largest = max(linear_shapes(setting.model), key=math.prod)
    decomposition = 8 * (_START_PER_ELEMENT * math.prod(largest) + _START_PER_SQUARE * min(largest) ** 2)
    return 4 * math.prod(largest) + decomposition


def _step_scratch(setting: MemorySetting, largest: int) -> int:
    """Returns bytes of temporaries of the optimizer's step of the largest tensor, or of GaLore's most demanding matrix."""
    if not setting.method.projected:
        return _plain_step_scratch(setting, largest)
    model = setting.model
    ordinary = _plain_step_scratch(setting, model.vocab_size * model.hidden_size)
    return max(ordinary, *(_subspace_scratch(setting, shape) for shape in linear_shapes(model)))


def _subspace_scratch(setting: MemorySetting, shape: tuple[int, int]) -> int:
    """Returns bytes of GaLore's temporaries for a matrix: its gradient's SVD, or its projected gradient, update and step."""
    width, elements = DTYPE_BYTES[setting.dtype], math.prod(shape)
    svd = 4 * (_SVD_PER_ELEMENT * elements + _SVD_PER_SQUARE * min(shape) ** 2) + (4 * elements if width < 4 else 0)
    shapes = subspace_shapes(shape, setting.rank, setting.proj_type)
    moments = math.prod(shapes.moments)
    inside = 2 * width * moments + _plain_step_scratch(replace(setting, stochastic_rounding=False), moments)
    if shapes.left and shapes.right:
        inside += width * math.prod(shapes.left)
    if setting.stochastic_rounding:
        inside += _ROUNDING_SCRATCH * min(elements, SLICE_ELEMENTS)
    return max(svd, inside)


def _plain_step_scratch(setting: MemorySetting, largest: int) -> int:
    optimizer = OPTIMIZERS[setting.optimizer]
    per_element = optimizer.scratch_per_element if optimizer.scratch_on_gpu or setting.device_type != "cuda" else 0
    if optimizer.steps_whole:
        return per_element * largest
    if setting.condition_gradients or optimizer.conditions_all_gradients:
        per_element = max(per_element, CONDITIONING_SCRATCH)
    rounds = setting.weight_dtype is not None or (setting.stochastic_rounding and setting.dtype == "bfloat16")
    rounding = _ROUNDING_SCRATCH if rounds else 0
    accumulating = _ACCUMULATION_SCRATCH if setting.gradient_accumulation > 1 and setting.accumulate == "moments" else 0
    of_slice = max(per_element + rounding, accumulating) * min(largest, SLICE_ELEMENTS)
    return of_slice if optimizer.matrix_bytes is None else max(_orthogonal_scratch(setting), of_slice)


def _orthogonal_scratch(setting: MemorySetting) -> int:
    """Returns bytes of temporaries of Muon's or Spectron's step of the largest matrix.

    Newton-Schulz holds three matrices of its size and two of its shorter side. A pair's first direction is kept while the second
    is computed.
    """
    width, optimizer = DTYPE_BYTES[setting.dtype], OPTIMIZERS[setting.optimizer]
    groups = tensor_groups(setting.model, **setting.method_arguments)
    matrices = [group.shape for group in groups if group.trained and len(group.shape) == 2 and not group.embedding]
    one = max(width * (3 * math.prod(shape) + 2 * min(shape) ** 2) for shape in matrices)
    largest = max(map(math.prod, matrices))
    return one + (width * largest if optimizer.steps_pairs else 0)
