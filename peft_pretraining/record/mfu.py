"""Model FLOPs utilisation (MFU): the floating-point operations of training per second, as a share of the devices' peak.

Counted are the matrix products of linears, output head and attention, in the forward and the backward pass, two operations per
multiplication. "Own" is the model's own arithmetic, on the path that each factored linear takes; "dense" is that of the full-rank
model of the same shape, which makes methods comparable. Attention counts the causal half, T^2 / 2. Padding is counted in the
layers, which compute it, and not in the head, which skips it. Not counted: recomputation (--activation_checkpointing), norms and
activations, adding the nonzeros, the optimizer's step.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from peft_pretraining.config.arguments import Arguments
from peft_pretraining.distributed.device import torch_dtype
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.plan import Plan
from sparse_lora import SparseLowRankLinear, Support
from sparse_lora.functional import multiplications

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Peaks of one GPU in 10^12 operations per second, without sparsity: float32 without tensor cores, TF32, bfloat16 (None: the GPU
# has none); by a pattern of the name that CUDA gives it. From the vendors' data sheets of these products; half of the figure
# where a data sheet gives it with sparsity only, an eighth where it gives that of eight GPUs (HGX B200). A10G: the data sheet of
# Amazon's variant, 2022-02-17. GeForce: NVIDIA's architecture white papers, with float32 accumulation.
CARDS: tuple[tuple[str, float, float | None, float | None], ...] = (
    (r"\bGB200\b", 80.0, 1250.0, 2500.0),
    (r"\bB200\b", 75.0, 1125.0, 2250.0),
    (r"\bH[12]00 NVL\b", 60.0, 417.5, 835.5),
    (r"\bH100 PCIe\b", 51.0, 378.0, 756.0),
    (r"\bH100 .*HBM3\b|\bGH200\b|\bH200$", 67.0, 494.5, 989.5),
    (r"\bH20\b", 44.0, 74.0, 148.0),
    (r"\bA[18]00\b", 19.5, 156.0, 312.0),
    (r"\bA40$", 37.4, 74.8, 149.7),
    (r"\bA30$", 10.3, 82.0, 165.0),
    (r"\bA10G$", 35.0, 35.0, 70.0),
    (r"\bA10$", 31.2, 62.5, 125.0),
    (r"\bL40S$", 91.6, 183.0, 362.0),
    (r"\bL40$", 90.5, 90.5, 181.0),
    (r"\bL4$", 30.3, 60.0, 121.0),
    (r"\bRTX 6000 Ada\b", 91.1, 182.1, 364.2),
    (r"\bRTX A6000$", 38.7, 77.4, 154.8),
    (r"\bRTX 5090$", 104.8, 104.8, 209.5),
    (r"\bRTX 4090$", 82.6, 82.6, 165.2),
    (r"\bRTX 3090 Ti$", 40.0, 40.0, 80.0),
    (r"\bRTX 3090$", 35.6, 35.6, 71.2),
    (r"\bT4$", 8.1, None, None),
    (r"\bV100S", 16.4, None, None),
    (r"\bV100-SXM", 15.7, None, None),
    (r"\bV100-PCIE", 14.0, None, None),
    (r"\bMI300X\b", 163.4, 653.7, 1307.4),
)
# Cards that share a name above with a larger one.
_REDUCED = re.compile(r"MIG|Laptop|Mobile|Max-Q")


def flop_rates(args: Arguments, plan: Plan, world: World, model: LlamaForCausalLM, device: torch.device) -> dict[str, Any]:
    """Returns the coefficients of the record's keys: operations, or shares of the peak, per sequence and per token of text.

    A key's value is its first coefficient times the sequences per second plus its second times the tokens per second:
    flops_per_second, flops_per_second_dense, and mfu, mfu_dense where the peak is known. A notice says that it is not. {} except
    on rank 0, which writes the record.
    """
    if not world.is_main:
        return {}
    dtype = torch_dtype(args.compute_dtype or plan.dtype)
    builds = 1 / plan.gradient_accumulation if plan.linear_cache == "weights" else 2.0
    own, dense = training_flops(model, args.batch_size, args.max_length, builds, dtype)
    rates = {"flops_per_second": own, "flops_per_second_dense": dense}
    peak = 1e12 * args.peak_tflops if args.peak_tflops is not None else device_peak(device, dtype)
    if peak is None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        text = f"the peak of {name} in {str(dtype).removeprefix('torch.')} is not known, so the record has flops_per_second"
        print(f"notice: {text} and no mfu; --peak_tflops gives the peak of one device", file=sys.stderr)
        return rates
    whole = peak * world.size
    mfu = {"mfu": (own[0] / whole, own[1] / whole), "mfu_dense": (dense[0] / whole, dense[1] / whole)}
    return rates | mfu


def training_flops(
    model: LlamaForCausalLM, batch_size: int, length: int, builds: float = 2.0, dtype: torch.dtype | None = None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the operations of the model itself and of its dense equivalent: (per sequence, per token of text) each.

    batch_size: sequences per micro-batch, which share the work of building weights. builds: how often a weight is built per
    micro-batch, less than twice with --linear_cache weights. dtype: of the products (default: that of each layer's parameters).
    """
    rows, head, own, dense = batch_size * length, model.get_output_embeddings(), 0.0, 0.0
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "in_features") and layer is not head and not isinstance(layer, Support):
            own += _multiplications(layer, rows, builds, dtype)
            dense += 3 * rows * layer.out_features * layer.in_features
    config: Any = model.config
    width = config.num_attention_heads * config.head_dim
    # Per layer: scores and weighted values, over the causal half; in backward twice as much.
    attention = config.num_hidden_layers * 3 * 2 * (length * length / 2) * width
    per_token = 2.0 * 3 * config.vocab_size * config.hidden_size
    return (2 * (own / batch_size + attention), per_token), (2 * (dense / batch_size + attention), per_token)


def _multiplications(layer: Any, rows: int, builds: float, dtype: torch.dtype | None) -> float:
    """Returns the multiplications of a linear's forward and backward pass for this number of input rows.

    A layer other than SLTrain's multiplies its input by each of its matrices: once in forward, once for the input's gradient and,
    if the matrix is trained, once for its own.
    """
    if not isinstance(layer, SparseLowRankLinear):
        matrices = [parameter for parameter in layer.parameters(recurse=False) if parameter.dim() == 2]
        return float(sum((3 if matrix.requires_grad else 2) * rows * matrix.numel() for matrix in matrices))
    kind, nnz = ("none", 0) if layer.support is None else (layer.support.kind, layer.support.nnz)
    sizes = (rows, layer.out_features, layer.in_features, layer.rank, kind, nnz)
    width = (dtype or layer.lora_A.dtype).itemsize
    path = "materialised" if layer.builds_weight(rows, width) else "factored"
    saved = (2 - builds) * layer.rank * layer.out_features * layer.in_features if path == "materialised" else 0.0
    return multiplications(path, *sizes, None, width) - saved


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the peak operations per second of one device in products of this dtype; measured on a CPU; None if not known."""
    if device.type == "cuda":
        return card_peak(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")
    return _measured_peak(dtype, torch.get_num_threads()) if device.type == "cpu" else None


def card_peak(name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """Returns a GPU's peak operations per second from CARDS; None for an unknown GPU or a dtype that it lacks.

    tf32: whether float32 products run in TF32.
    """
    row = next((peaks for pattern, *peaks in CARDS if re.search(pattern, name)), None)
    if row is None or _REDUCED.search(name):
        return None
    fp32, with_tf32, bf16 = row
    peak = bf16 if dtype == torch.bfloat16 else with_tf32 if tf32 and with_tf32 is not None else fp32
    return None if peak is None else 1e12 * peak


@functools.cache
def _measured_peak(dtype: torch.dtype, num_threads: int) -> float:
    """Returns the operations per second of the fastest of a few square products on the CPU; takes at most half a second.

    num_threads: torch's present number of threads, for which the result holds.
    """
    fastest, seconds = 0.0, 0.0
    for size in (256, 512, 1024):
        if 8 * seconds > 0.1:
            break
        # Not random, which would move the run's generator.
        matrix = torch.full((size, size), 0.5, dtype=dtype)
        matrix @ matrix
        times = []
        for _ in range(3):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        seconds = max(min(times), 1e-9)
        fastest = max(fastest, 2 * size**3 / seconds)
    return fastest
