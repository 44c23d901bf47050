"""What tests that run on a CPU and on a GPU share: a tiny model with its loss, and micro-batches in pinned memory."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_model import TINY_MODEL

from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.data.loader import Batch
from peft_pretraining.model.llama import build_model
from peft_pretraining.model.loss import TokenLoss
from sparse_lora import SLTrainConfig, generator_for, reparameterize

KINDS = ("full", "uniform", "block")


def tiny_loss(
    folder: Path, device: torch.device, kind: str, dtype: torch.dtype = torch.bfloat16, document_end: int | None = None
) -> TokenLoss:
    """Returns the tiny model of one of KINDS with its loss, the same on every device."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY_MODEL))
    apply: Callable[[torch.nn.Module], object] | None = None
    if kind != "full":
        settings = SLTrainConfig(rank=4, sparsity=0.1, alpha=8.0, support=kind)

        def apply(model):
            return reparameterize(model, settings)

    model = build_model(load_model_config(path), dtype=dtype, device=device, seed=3, reparameterize=apply)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):  # zero at the start, which makes A's gradient zero
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator_for(0, name)))
    return TokenLoss(model, document_end=document_end)


def padded_batches(device: torch.device) -> list[Batch]:
    """Returns two micro-batches of three sequences of 16 tokens, the second with padding, as the loader gives them."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for length in (16, 9):
        ids = torch.randint(2, TINY_MODEL["vocab_size"], (3, 16), generator=generator)
        labels = ids.clone()
        labels[1, length:] = -100
        if device.type == "cuda":
            ids, labels = ids.pin_memory(), labels.pin_memory()
        batches.append(Batch(ids, labels, 32 + length, 29 + length))
    return batches
