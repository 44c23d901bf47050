"""y = x W^T for few rows, without gradients: generating text asks for a row at a time, and its time goes into reading weights.

Factors and values are read once each; nothing of the weight's size is built, and no copy of B is scaled or put in order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .support import Support
from .uniform import UniformSupport

# A choice, not a measured crossover: text is generated for a few prompts at a time.
MOST_ROWS = 32


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Eval mode, no gradients, and where entries are anywhere a table of them by row, which products of few rows read.

    The table takes 2 bytes a nonzero (4 from 32,769 inputs on) and 4 a row. It is that of the positions as they are:
    prepare again after loading others. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, UniformSupport):
            module.keep_rows()
    return model.eval().requires_grad_(False)


def serves(x: Tensor, support: Support | None) -> bool:
    """Whether x, (..., I), has few rows, is not being compiled, and the support is ready; ask with gradients disabled."""
    if torch.compiler.is_compiling() or x.shape[:-1].numel() > MOST_ROWS or x.is_meta:
        return False
    return (support is None or support.ready_for_few_rows) and not torch.is_autocast_enabled(x.device.type)


def few_rows_output(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    sparse_value: Tensor | None,
    support: Support | None,
    scaling: float | Tensor,
    bias: Tensor | None,
) -> Tensor:
    """As functional.sparse_lowrank_linear: (..., I) -> (..., O), for what `serves`."""
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO = F.linear((F.linear(x_TI, lora_A) * scaling).to(x.dtype), lora_B, bias)
    if sparse_value is not None and support is not None:
        support.add_few_rows_(y_TO, x_TI, sparse_value)
    return y_TO.view(*x.shape[:-1], lora_B.shape[0])
