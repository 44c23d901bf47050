"""Pretraining of LLaMA models with low-rank plus sparse linears: data, model, training loop, checkpoints, reports."""

import logging

__version__ = "0.1.0"

# transformers imports torchao if it is installed. torchao then logs which of its GPU kernels cannot be loaded (none is used) and
# which parts of torch are deprecated, in every process and before any message of ours.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
