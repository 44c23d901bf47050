"""The memory account of a run: bytes by class and at the peak, per process; no torch.

`py` counts tensors exactly, `peak.py` says which of them are alive together. Bytes.
"""

from __future__ import annotations

import math
from dataclasses import replace

from peft_pretraining.config.model_config import linear_shapes
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.config.supports import SUPPORTS, SupportKind
from peft_pretraining.memory.allocator import LARGE_BLOCK_BYTES
from peft_pretraining.memory.counts import (
    DTYPE_BYTES,
    activation_bytes,
    first_part,
    loss_chunk_rows,
    parameter_counts,
    static_bytes,
    subspace_shapes,
    tensor_groups,
)
from peft_pretraining.memory.fsdp_units import Units, units_of
from peft_pretraining.memory.peak import Working, of_parts, of_whole
from peft_pretraining.memory.setting import Setting
from peft_pretraining.methods.method import TensorGroup

CLASSES = (
    *("parameters", "support", "gradients", "optimizer"),
    *("activations", "loss", "scratch", "runtime"),
)
# On a CPU: Python, torch, transformers, datasets and wandb, imported and idle, 0.51e9 resident with the pinned versions, and some
# 0.2e9 of freed blocks that malloc keeps (measured at 60M and 130M). On a GPU: the CUDA context and its libraries.
_RUNTIME = {"cpu": 710 * 10**6, "cuda": 500 * 10**6}
# Gaps that malloc leaves between the activations of one process, relative to them: a block that was freed has no room for
# another of its size, since torch asks for aligned ones (measured at 130M and 350M; docs/md).
_GAPS = 0.3
# Elements of a slice where an optimizer steps in slices (optim/slices.py), and bytes per element that stochastic rounding takes.
_SLICE_ELEMENTS = 2**21
_ROUNDING_SCRATCH = 36
# torch.linalg.svd in float32, its results included: so many elements per element of the matrix, and of a square of its shorter
# side. Measured on a CPU (LAPACK's gesdd; 1024 x 1024 to 2736 x 1024) within 10 % for upright matrices, less for lying ones.
_SVD_PER_ELEMENT, _SVD_PER_SQUARE = 3, 4
# A restart that rebalances a layer, in float32, with the new factors and what LAPACK needs: so many elements per element of B and
# A and per element of their r x r core. Measured on a CPU (1376 x 512 to 5461 x 2048, r a quarter of the shorter side): 11 % less
# to 8 % more.
_REBALANCE_PER_ELEMENT, _REBALANCE_PER_SQUARE = 2, 16
# --init svd, in float64: per element of the dense weight and of a square of its shorter side. Measured likewise: 11 % less to 2 %
# more.
_START_PER_ELEMENT, _START_PER_SQUARE = 1, 5
_BUCKET_BYTES = 25 * 2**20  # of DistributedDataParallel; a tensor that is larger has a bucket of its own


def account(setting: Setting) -> dict[str, int]:
    """Bytes by class, "total" (their sum) and "peak" (the most that is alive at one time).

    Of several processes with --parallel fsdp, process 0's, whose parts are the largest. Layers gathered for a while and buffers
    of collectives count as scratch, gradients that accumulate whole as gradients.
    """
    groups = parameter_groups(setting)
    units = units_of(setting.model, groups, setting.parts)
    stepped = [group for group in groups if group.trained]
    trained = units_of(setting.model, stepped, setting.parts)
    static = _static_bytes(setting)
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
    )
    largest = max(math.prod(first_part(group.shape, setting.parts)) for group in stepped)
    if setting.sharded and setting.gradient_accumulation > 1:
        static["gradients"] = DTYPE_BYTES[setting.reduces_in] * trained.whole
    elif not setting.gradients_stay:
        alone = max(trained.embedding.part, trained.layer.part, trained.root.part) if setting.sharded else largest
        static["gradients"] = DTYPE_BYTES[setting.dtype] * alone
    working = Working(
        static["gradients"],
        **kept,
        lasting=_lasting_scratch(setting),
        layer=_layer_scratch(setting) + _reduction_copy(setting, trained, largest),
        step=_step_scratch(setting, largest),
        restart=max(_restart_scratch(setting), _start_scratch(setting) - static["optimizer"]),
    )
    moments = of_parts(setting, working, units, trained) if setting.sharded else of_whole(setting, working)
    copy = _copy_of_state(setting, static)
    scratch = max(moment.scratch for moment in moments) + copy
    found = static | kept | {"scratch": scratch, "runtime": _runtime(setting, kept["activations"])}
    constant = sum(found[name] for name in ("parameters", "support", "optimizer", "runtime"))
    found["total"] = sum(found[name] for name in CLASSES)
    found["peak"] = constant + max(sum(moment) for moment in moments) + copy
    return found


def _runtime(setting: Setting, activations: int) -> int:
    """What is there beside tensors."""
    # Larger blocks are the system's as soon as they are freed.
    block = setting.batch_size * setting.max_length * setting.model.hidden_size * DTYPE_BYTES[setting.computes_in]
    leaves_gaps = setting.device_type == "cpu" and not setting.sharded and block < LARGE_BLOCK_BYTES
    return _RUNTIME[setting.device_type] + (int(_GAPS * activations) if leaves_gaps else 0)


def parameter_groups(setting: Setting) -> list[TensorGroup]:
    """Every parameter of the run, grouped by shape."""
    return tensor_groups(
        setting.model,
        method=setting.peft_model,
        rank=setting.rank,
        sparsity=setting.sp_ratio,
        train_scaling=setting.train_scaling,
        support=setting.support,
    )


def _static_bytes(setting: Setting) -> dict[str, int]:
    counts = parameter_counts(
        setting.model,
        method=setting.peft_model,
        rank=setting.rank,
        sparsity=setting.sp_ratio,
        train_scaling=setting.train_scaling,
        support=setting.support,
    )
    return static_bytes(
        setting.model,
        counts,
        method=setting.peft_model,
        dtype=setting.dtype,
        optimizer=setting.optimizer,
        beta1=setting.beta1,
        embedding_bits=setting.embedding_bits,
        stochastic_rounding=setting.stochastic_rounding,
        proj_type=setting.proj_type,
        parts=setting.parts,
    )


def _copy_of_state(setting: Setting, static: dict[str, int]) -> int:
    """What --async_save writes from; it stays from the first save on. That of a GPU's state is in the machine's memory."""
    if not setting.async_save or setting.device_type != "cpu":
        return 0
    return sum(static[name] for name in ("parameters", "support", "optimizer"))


def _reduction_copy(setting: Setting, units: Units, largest: int) -> int:
    """Gradients in another dtype for their all-reduce: those of one of DDP's buckets, or of one tensor in per-layer updates."""
    if setting.world_size == 1 or setting.sharded or setting.reduces_in == setting.dtype:
        return 0
    bucket = max(_BUCKET_BYTES // DTYPE_BYTES[setting.dtype], largest)
    return DTYPE_BYTES[setting.reduces_in] * (largest if setting.per_layer else min(bucket, units.whole))


def _is_factored(setting: Setting, shape: tuple[int, int]) -> bool:
    """Whether a linear (out, in) is computed by its factors, as sparse_lora.functional decides for its own layers."""
    if not setting.method.factored:
        return setting.method.replaces_linears
    if setting.linear_path != "auto":
        return setting.linear_path == "factored"
    from sparse_lora.cost import cheaper_path  # the package imports torch, which refused arguments must not wait for

    support = _support(setting)
    kind, nnz = (setting.support, support.nonzeros(*shape, setting.sp_ratio)) if support else ("none", 0)
    rows = setting.batch_size * setting.max_length
    return cheaper_path(rows, *shape, setting.rank, kind, nnz, setting.device_type) == "factored"


def _support(setting: Setting) -> SupportKind | None:
    """The kind of support of the sparse part; None without one."""
    return SUPPORTS[setting.support] if setting.method.sparse else None


def _layer_scratch(setting: Setting) -> int:
    """Temporaries of the backward pass of the linear that has most of them."""
    if not setting.method.replaces_linears:
        return 0  # weight and gradient are counted as what they are
    if not setting.method.factored:
        return max(_beside_weight(setting, shape) for shape in linear_shapes(setting.model))
    return max(_linear_scratch(setting, shape) for shape in linear_shapes(setting.model))


def _lasting_scratch(setting: Setting) -> int:
    """What stays of the largest weight that is built, or of the largest outputs put in order: a CPU's scratch memory."""
    if not setting.method.replaces_linears or setting.device_type != "cpu":
        return 0
    from sparse_lora.scratch import large_bytes

    width, shapes = DTYPE_BYTES[setting.computes_in], linear_shapes(setting.model)
    used = [shape for shape in shapes if _builds_matrix(setting, shape)]
    used += [_reordered(setting, shape) for shape in shapes]
    return max(large_bytes(shape, width) for shape in used)


def _builds_matrix(setting: Setting, shape: tuple[int, int]) -> bool:
    """Whether a linear (out, in) makes a matrix of its weight's size: W, or S as a dense one."""
    support = _support(setting)
    return (support is not None and support.stored) or not _is_factored(setting, shape)


def _reordered(setting: Setting, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the copy of a linear's outputs, or of their gradients, that a support reorders; 0 rows without one."""
    support = _support(setting)
    reordered = support is not None and support.reorders_outputs and _is_factored(setting, shape)
    return (setting.batch_size * setting.max_length if reordered else 0, shape[0])


def _linear_scratch(setting: Setting, shape: tuple[int, int]) -> int:
    """Of a linear (out, in): its weight or that weight's gradient, where it is built; the decoded support, values and factors
    with their gradients; and the gradients of x A^T and, put in order, of the outputs, where it is computed by its factors."""
    rows, columns = shape
    width, factored = DTYPE_BYTES[setting.computes_in], _is_factored(setting, shape)
    support = _support(setting)
    nnz = support.nonzeros(rows, columns, setting.sp_ratio) if support else 0
    stored = support is not None and support.stored
    positions = nnz * (4 if rows * columns <= 2**31 else 8) if stored else 0
    dense = rows * columns * width if _builds_matrix(setting, shape) else 0
    if stored and setting.device_type == "cuda" and width == 2:
        # Counted whether or not Triton is installed here: the run may be planned for another machine.
        from sparse_lora.kernels import scratch_bytes

        dense += scratch_bytes(rows, columns)
    kept = width * setting.rank * setting.batch_size * setting.max_length if factored else 0
    kept += width * math.prod(_reordered(setting, shape))
    return dense + 2 * positions + width * (2 * nnz + 2 * setting.rank * (rows + columns)) + kept


def _beside_weight(setting: Setting, shape: tuple[int, int]) -> int:
    """Temporaries of a linear's factors in forward and backward, where they stand beside a frozen weight or alone."""
    rows = setting.batch_size * setting.max_length
    return DTYPE_BYTES[setting.computes_in] * (rows * (max(shape) + setting.rank) + setting.rank * sum(shape))


def _restart_scratch(setting: Setting) -> int:
    """Temporaries of a restart: a slice of a weight that factors are merged into, or the balanced factors of a layer."""
    shapes, rank = linear_shapes(setting.model), setting.rank
    if setting.method.frozen_base:
        rounding = _ROUNDING_SCRATCH if setting.stochastic_rounding else 0
        factors = 4 * rank * max(sum(shape) for shape in shapes)
        return factors + (8 + rounding) * min(max(map(math.prod, shapes)), _SLICE_ELEMENTS)
    if setting.rebalance and setting.method.factored:
        elements = rank * max(sum(shape) for shape in shapes)
        return 4 * (_REBALANCE_PER_ELEMENT * elements + _REBALANCE_PER_SQUARE * rank * rank)
    return 0


def _start_scratch(setting: Setting) -> int:
    """Temporaries of --init svd, the dense weight among them, which are a CPU's and there before the optimizer is."""
    if setting.init != "svd" or setting.device_type != "cpu" or not setting.method.factored:
        return 0
    largest = max(linear_shapes(setting.model), key=math.prod)
    decomposition = 8 * (_START_PER_ELEMENT * math.prod(largest) + _START_PER_SQUARE * min(largest) ** 2)
    return 4 * math.prod(largest) + decomposition


def _step_scratch(setting: Setting, largest: int) -> int:
    """Temporaries of the optimizer's step of the largest tensor, or of the matrix that GaLore needs most for."""
    if not setting.method.projected:
        return _plain_step_scratch(setting, largest)
    model = setting.model
    ordinary = _plain_step_scratch(setting, model.vocab_size * model.hidden_size)
    return max(ordinary, *(_subspace_scratch(setting, shape) for shape in linear_shapes(model)))


def _subspace_scratch(setting: Setting, shape: tuple[int, int]) -> int:
    """Of a matrix: the SVD of its gradient, or its projected gradient and step with that step's own temporaries."""
    width, elements = DTYPE_BYTES[setting.dtype], math.prod(shape)
    svd = 4 * (_SVD_PER_ELEMENT * elements + _SVD_PER_SQUARE * min(shape) ** 2) + (4 * elements if width < 4 else 0)
    shapes = subspace_shapes(shape, setting.rank, setting.proj_type)
    moments = math.prod(shapes.moments)
    inside = 2 * width * moments + _plain_step_scratch(replace(setting, stochastic_rounding=False), moments)
    if shapes.left and shapes.right:
        inside += width * math.prod(shapes.left)
    if setting.stochastic_rounding:
        inside += _ROUNDING_SCRATCH * min(elements, _SLICE_ELEMENTS)
    return max(svd, inside)


def _plain_step_scratch(setting: Setting, largest: int) -> int:
    optimizer = OPTIMIZERS[setting.optimizer]
    on_gpu = setting.device_type == "cuda"
    per_element = optimizer.scratch_per_element_cuda if on_gpu else optimizer.scratch_per_element
    if optimizer.steps_whole:
        return per_element * largest
    rounding = _ROUNDING_SCRATCH if setting.stochastic_rounding and setting.dtype == "bfloat16" else 0
    return (per_element + rounding) * min(largest, _SLICE_ELEMENTS)
