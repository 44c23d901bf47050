"""The SLTrain layer: a linear whose weight is low-rank plus sparse (arXiv 2406.02214). Needs torch only.

linear.py          SparseLowRankLinear, a drop-in for nn.Linear
functional.py      sparse_lowrank_linear (memory-saving autograd), the choice between its two paths, dense_reference
support.py         Support: the positions of S; SparsePart: the arithmetic of S; generator_for; scratch memory
uniform.py         random positions over the whole matrix, as published, and their storage format
block.py           positions in dense blocks of consecutive inputs and interleaved outputs
kernels.py         W and the values' gradient by Triton kernels (kernels_triton.py), where they are measured faster
cache.py           what linears may keep between passes: decoded positions, W during an update
adapted.py         AdaptedLinear: a pretrained linear plus a low-rank plus sparse part, for fine-tuning
relora.py          ReLoRALinear: a frozen dense weight plus factors that are merged into it
reparameterize.py  SLTrainConfig, reparameterize(model, config), attach_relora(model), merge(model), prepare_for_inference(model)
"""

from .adapted import AdaptedLinear, adapter_parameters, adapter_state
from .functional import dense_reference, sparse_lowrank_linear
from .linear import SparseLowRankLinear
from .relora import ReLoRALinear
from .reparameterize import SLTrainConfig, attach_relora, merge, prepare_for_inference, reparameterize
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
