"""The SLTrain layer: a linear whose weight is low-rank plus sparse (arXiv 2406.02214). Needs torch only.

linear.py          SparseLowRankLinear, a drop-in for nn.Linear
functional.py      sparse_lowrank_linear (memory-saving autograd), which of its two paths takes less time, dense_reference
support.py         Support: the positions of S; SparsePart: its arithmetic; generator_for; scratch memory
uniform.py         positions anywhere, as published, and how they are stored
block.py           positions in dense blocks of consecutive inputs and interleaved outputs
few_rows.py        products of few rows without gradients, for generating text
kernels.py         W, and the values' gradient, by Triton kernels (kernels_triton.py) on a GPU with Triton
adapted.py         AdaptedLinear: a pretrained linear with the two parts added, for fine-tuning; its counts and its state
relora.py          ReLoRALinear: a frozen dense weight plus factors that are merged into it
reparameterize.py  SLTrainConfig, reparameterize(model, config), attach_relora(model), merge(model)
"""

from .adapted import AdaptedLinear, adapter_parameters, adapter_state
from .few_rows import prepare_for_inference
from .functional import dense_reference, sparse_lowrank_linear
from .linear import SparseLowRankLinear
from .relora import ReLoRALinear
from .reparameterize import SLTrainConfig, attach_relora, merge, reparameterize
from .support import Support, generator_for

__all__ = [
    "AdaptedLinear",
    "ReLoRALinear",
    "SLTrainConfig",
    "SparseLowRankLinear",
    "Support",
    "adapter_parameters",
    "adapter_state",
    "attach_relora",
    "dense_reference",
    "generator_for",
    "merge",
    "prepare_for_inference",
    "reparameterize",
    "sparse_lowrank_linear",
]
