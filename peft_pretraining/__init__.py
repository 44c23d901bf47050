"""Pretraining of LLaMA models with low-rank plus sparse linears: data, model, training loop, checkpoints, reports."""

import logging

__version__ = "0.1.0"

# transformers imports torchao wherever it is installed, which says on import which of its GPU kernels do not load here (none is
# used) and what of its own torch will deprecate. In every process of every run that would come before anything that matters.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
