"""The SLTrain layer: a linear whose weight is low-rank plus sparse (arXiv 2406.02214). Needs torch only.

linear.py          SparseLowRankLinear, a drop-in for nn.Linear
functional.py      sparse_lowrank_linear (memory-saving autograd) and dense_reference (plain autograd)
cost.py            which of its two paths takes less time
support.py         Support: which entries the sparse part has, and the arithmetic of that part; generator_for
uniform.py         anywhere, as published; layout.py: in how many bytes they are stored
block.py           in dense blocks of consecutive inputs and interleaved outputs
kinds.py           their names
few_rows.py        products of few rows without gradients, as text is generated
scratch.py         memory for one passing matrix at a time
kernels.py         W, and the values' gradient, by Triton kernels (kernels_triton.py) where there are Triton and a GPU
adapted.py         AdaptedLinear: a pretrained linear with the two parts added, for fine-tuning; its counts and its state
relora.py          ReLoRALinear: a frozen dense weight plus factors that are merged into it
decomposition.py   balanced factors of a product, the best ones of a dense matrix
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
