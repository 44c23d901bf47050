"""What linears keep so that they do not compute it in every pass: decoded positions of uniform supports, and W during an update.

Neither changes a result, but for roundings under autocast. Positions take 4 bytes per nonzero (8 in weights of more than 2^31
entries). W takes as much memory as a dense weight, which gives up what the method saves there; its gradient is not kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .linear import SparseLowRankLinear
from .support import Support


def cache_positions(model: nn.Module) -> None:
    """Keeps the decoded positions of every uniform support, until they are drawn or loaded by load_state_dict again.

    Whoever writes into `support.code` directly must call this function afterwards.
    """
    for module in model.modules():
        if isinstance(module, Support):
            module.cache_positions()


class WeightCache:
    """Builds the weights of linears once for all passes of an update, in which parameters do not change before they are used.

    Linears that take the factored path are left alone: they build no weight.
    """

    def __init__(self, model: nn.Module, num_rows: int) -> None:
        """num_rows: rows of a micro-batch, which decide the path of a linear whose path is "auto"."""
        # An AdaptedLinear, which is a subclass, does not use a cached weight.
        layers = [module for module in model.modules() if type(module) is SparseLowRankLinear]
        self.layers = [layer for layer in layers if layer.builds_weight(num_rows)]

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Holds every layer's weight inside the block."""
        try:
            with torch.no_grad():
                for layer in self.layers:
                    layer.cached_weight = layer.dense_weight()
            yield
        finally:
            for layer in self.layers:
                layer.cached_weight = None
