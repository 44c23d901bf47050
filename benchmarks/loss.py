"""Compares the loss of this program with torch.nn.functional.linear_cross_entropy: memory, time and error.

`OMP_NUM_THREADS=1 python benchmarks/loss.py [--rows 4096] [--width 512] [--vocab 32000]`: each loss in a process of its own on
the CPU, forward and backward pass twice; the second one's CPU seconds. Errors are relative to float64: of the loss, and the L2
norm of the error of the head's gradient.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_pretraining.distributed.device import set_allocator
from peft_pretraining.model.loss import chunked_cross_entropy

KINDS = ("whole", "slices", "library")


def loss_of(kind: str, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Returns the summed loss: of this program, by its way to the head's gradient, or of the library in chunks."""
    if kind == "library":
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, head, labels, reduction="sum", options=options)
    return chunked_cross_entropy(hidden, head, labels, head_gradient=kind)


def measure(kind: str, dtype: torch.dtype, rows: int, width: int, vocab: int) -> dict[str, float]:
    """Returns the peak above the inputs in 10^6 bytes, seconds and errors."""
    generator = torch.Generator().manual_seed(0)
    # In place, because freed temporaries would already be in the peak before the loss.
    hidden = torch.empty(rows, width, dtype=dtype).normal_(generator=generator).requires_grad_()
    head = torch.empty(vocab, width, dtype=dtype).normal_(std=0.05, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        hidden.grad = head.grad = None
        start = time.process_time()
        loss = loss_of(kind, hidden, head, labels)
        loss.backward()
        seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    exact_head = head.detach().double().requires_grad_()
    exact = F.cross_entropy(hidden.detach().double() @ exact_head.T, labels, reduction="sum")
    exact.backward()
    assert head.grad is not None
    assert exact_head.grad is not None
    error = torch.linalg.vector_norm(head.grad - exact_head.grad) / torch.linalg.vector_norm(exact_head.grad)
    loss_error = abs(float(loss.detach()) / float(exact.detach()) - 1)
    return {"megabytes": peak * 1024 / 1e6, "seconds": seconds, "loss_error": loss_error, "gradient_error": float(error)}


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 4096), ("width", 512), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "DTYPE"), help="measure one loss in this process and print JSON")
    args = parser.parse_args()
    # As in the trainer.
    set_allocator()
    sizes = (args.rows, args.width, args.vocab)
    if args.one:
        print(json.dumps(measure(args.one[0], getattr(torch, args.one[1]), *sizes)))
        return
    print("| dtype | loss | 10^6 bytes | CPU seconds | relative error of the loss | of the head's gradient |")
    print("|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        for kind in KINDS:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", kind, dtype]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells = [
                f"{row['megabytes']:.0f}",
                f"{row['seconds']:.2f}",
                f"{row['loss_error']:.1e}",
                f"{row['gradient_error']:.1e}",
            ]
            print(f"| {dtype} | {kind} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
