"""Sizes, in elements, of the units that FSDP2 gathers and reduces together; this module does not import torch.

A unit is a decoder layer, the embedding, or the rest (final norm and output head, the "root"). Every parameter's rows are divided
over the processes as by torch.chunk, and padded to equal parts for communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.memory.counts import first_part
from peft_pretraining.methods.method import TensorGroup


@dataclass(frozen=True)
class Unit:
    """Elements of a unit's parameters: `whole`, and process 0's `part`, the size to which all parts are padded."""

    whole: int = 0
    part: int = 0
    processes: int = 1

    @property
    def padded(self) -> int:
        """Elements that are gathered or reduced, padding included."""
        return self.part * self.processes


@dataclass(frozen=True)
class Units:
    """The FSDP2 units of a model: the embedding (empty if tied to the head), `num_layers` equal layers, and the root."""

    embedding: Unit
    layer: Unit
    root: Unit
    num_layers: int

    @property
    def whole(self) -> int:
        """Elements of all units."""
        return self.embedding.whole + self.num_layers * self.layer.whole + self.root.whole

    @property
    def part(self) -> int:
        """Elements of process 0's parts of all units."""
        return self.embedding.part + self.num_layers * self.layer.part + self.root.part

    @property
    def padded(self) -> int:
        """Elements of all units, padded."""
        return self.embedding.padded + self.num_layers * self.layer.padded + self.root.padded


def units_of(cfg: ModelConfig, groups: list[TensorGroup], processes: int) -> Units:
    """Returns the units of a model whose parameters are `groups` (see memory.counts.tensor_groups)."""
    layers = cfg.num_hidden_layers
    embedding, layer, root = [], [], []
    for group in groups:
        if group.embedding:
            root.append((group.shape, 1))
            embedding.append((group.shape, group.count - 1))
        else:
            final_norm = group.count == 2 * layers + 1
            root.append((group.shape, int(final_norm)))
            layer.append((group.shape, (group.count - final_norm) // layers))
    return Units(_unit(embedding, processes), _unit(layer, processes), _unit(root, processes), layers)


def _unit(shapes: list[tuple[tuple[int, ...], int]], processes: int) -> Unit:
    """Returns the unit of parameters given as (shape, number of parameters of this shape)."""
    return Unit(
        whole=sum(count * math.prod(shape) for shape, count in shapes),
        part=sum(count * math.prod(first_part(shape, processes)) for shape, count in shapes),
        processes=processes,
    )
