"""Predicts memory at the points of an update where it may peak, in bytes of one process; this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from peft_pretraining.memory.counts import DTYPE_BYTES, SLICE_ELEMENTS, FsdpUnit, FsdpUnits, head_slice_bytes, loss_chunk_rows

if TYPE_CHECKING:
    from peft_pretraining.memory.setting import MemorySetting


class UpdatePoint(NamedTuple):
    """Bytes allocated at one point in time of an update, in addition to the memory that is always allocated."""

    gradients: int
    activations: int
    loss: int
    scratch: int


@dataclass(frozen=True)
class Working:
    """Sizes from which an update's peak is computed, bytes.

    gradients: all gradients, or in per-layer updates those of the largest step. layer_gradients: the largest one of a tensor that
    is neither embedding nor head. activations, loss: see
    memory.counts.activation_bytes. layer: temporaries of a linear's backward pass. step: temporaries of the largest optimizer
    step. lasting: the part of `layer` that is never freed. restart: temporaries of a restart, which happens between two updates.
    """

    gradients: int
    activations: int
    loss: int
    layer: int
    step: int
    lasting: int = 0
    restart: int = 0
    layer_gradients: int = 0

    def layers_left(self, count: int, num_layers: int) -> int:
        """Activations of `count` layers, bytes; with checkpointing about half of all are those of the recomputed layer."""
        return self.activations if count >= num_layers else self.activations * count // num_layers


def unsharded_points(setting: MemorySetting, working: Working) -> list[UpdatePoint]:
    """Returns the points of an unsharded run: loss, begin and end of the backward pass, optimizer step, restart."""
    if setting.steps_rows:
        return _points_stepping_rows(setting, working)
    # All gradients are allocated before the loss if DDP's buckets keep them or if they are accumulated.
    buckets = setting.world_size > 1 and not setting.per_layer
    before = working.gradients if (setting.gradient_accumulation > 1 and setting.gradients_stay) or buckets else 0
    head = DTYPE_BYTES[setting.dtype] * setting.model.vocab_size * setting.model.hidden_size
    one_layer = working.layers_left(1, setting.model.num_hidden_layers)
    at_loss = UpdatePoint(before, working.activations, working.loss, working.lasting)
    backward_begins = UpdatePoint(before or head, working.activations, 0, working.layer)
    if setting.gradients_stay:
        backward_ends = UpdatePoint(working.gradients, one_layer, 0, working.layer)
        at_step = UpdatePoint(working.gradients, 0, 0, working.step + working.lasting)
    else:
        backward_ends = at_step = UpdatePoint(working.gradients, one_layer, 0, max(working.layer, working.step + working.lasting))
    restart = UpdatePoint(working.gradients if buckets else 0, 0, 0, working.restart + working.lasting)
    return [at_loss, backward_begins, backward_ends, at_step, restart]


def _points_stepping_rows(setting: MemorySetting, working: Working) -> list[UpdatePoint]:
    """Returns the points of per-layer updates in which embedding and head are stepped slice by slice.

    Loss, step of the head, begin and end of the layers' backward pass, step of the embedding, restart.
    """
    model, width = setting.model, DTYPE_BYTES[setting.dtype]
    rows = setting.batch_size * setting.max_length
    states = 2 * width * rows * model.hidden_size
    slice_of_head = head_slice_bytes(model, rows, setting.dtype, loss_chunk_rows(setting.device_type))
    step, one_layer = working.step + working.lasting, working.layers_left(1, model.num_hidden_layers)
    slice_of_embedding = width * min(SLICE_ELEMENTS, model.vocab_size * model.hidden_size)
    return [
        UpdatePoint(0, working.activations, working.loss, working.lasting),
        UpdatePoint(0, working.activations, states + slice_of_head, step),
        UpdatePoint(0, working.activations, 0, working.layer),
        UpdatePoint(working.layer_gradients, one_layer, 0, max(working.layer, step)),
        # The embedding's rows, as they come from the first layer and summed by token.
        UpdatePoint(0, min(states, working.activations), 0, step + slice_of_embedding),
        UpdatePoint(0, 0, 0, working.restart + working.lasting),
    ]


def sharded_points(setting: MemorySetting, working: Working, units: FsdpUnits, trained: FsdpUnits) -> list[UpdatePoint]:
    """Returns the points of a run sharded by FSDP2, in the order of events of torch 2.13.

    Forward pass: the root's parameters are gathered and stay until the end of the backward pass. A unit is gathered into a flat
    buffer, copied out of it, and freed afterwards unless reshard_after_forward is off; the flat buffer stays until the next
    gather. Backward pass: while a layer is computed, the next layer's flat buffer is filled. A layer's whole gradient is copied
    into the input of a reduce-scatter, which stays until the next layer reaches the same point. The gradients of embedding and
    root stay whole until the end of the pass. gloo needs another buffer of the payload's size for a gather or a reduce-scatter.

    units: units of all parameters. trained: units of the parameters that have gradients.
    """
    buffers, num_layers = _Buffers(setting, units, trained), units.num_layers
    before = min(working.gradients, buffers.gradients(0))
    points = [
        UpdatePoint(before, 0, 0, buffers.gathering_embedding),
        UpdatePoint(before, working.activations, working.loss, buffers.at_loss),
    ]
    # Memory changes linearly over the layers except at the first (no reduce-scatter before it) and the last (the embedding
    # follows), so two layers at either end suffice.
    for number in sorted({0, 1, num_layers - 2, num_layers - 1} & set(range(num_layers))):
        gradients = min(working.gradients, buffers.gradients(number))
        left, below = (working.layers_left(num_layers - number - done, num_layers) for done in (0, 1))
        if setting.device_type == "cpu":
            # malloc keeps the blocks below 4 MiB that a layer's backward pass frees between gradients that stay.
            left = below = working.activations
        points += [
            UpdatePoint(gradients, left, 0, buffers.layer_begins(number, working.layer)),
            UpdatePoint(gradients, below, 0, buffers.layer_ends(number, working.layer, working.step)),
        ]
    gradients = min(working.gradients, buffers.gradients(num_layers))
    at_end = UpdatePoint(gradients, 0, 0, buffers.pass_ends(working.step))
    return [*points, at_end, UpdatePoint(working.gradients, 0, 0, working.step), UpdatePoint(0, 0, 0, working.restart)]


class _Buffers:
    """Computes FSDP2's temporary buffers: gathered parameters, whole gradients, inputs of reduce-scatters. Bytes."""

    def __init__(self, setting: MemorySetting, units: FsdpUnits, trained: FsdpUnits):
        self.units, self.trained, self.resharded = units, trained, setting.reshard_after_forward
        self.accumulates = setting.gradient_accumulation > 1
        self.per_layer, self.gloo = setting.per_layer, setting.device_type == "cpu"
        self._compute, self._reduce = DTYPE_BYTES[setting.computes_in], DTYPE_BYTES[setting.reduces_in]
        self._width = DTYPE_BYTES[setting.dtype]
        self.root, self.layer, self.embedding = map(self._gathered, (units.root, units.layer, units.embedding))

    def _gathered(self, unit: FsdpUnit) -> int:
        return self._compute * unit.padded

    def _gradient(self, unit: FsdpUnit, fresh: bool = True) -> int:
        """Whole gradient of a unit in this micro-batch; with accumulation a gradient that is not `fresh` is part of the sum."""
        return self._compute * unit.whole if fresh or not self.accumulates else 0

    def _reduced(self, unit: FsdpUnit) -> int:
        return self._reduce * unit.padded

    def _gathered_before(self, layers: int) -> int:
        """Gathered parameters: the root's and, unless they are freed after the forward pass, those of embedding and layers."""
        return self.root + (0 if self.resharded else self.embedding + layers * self.layer)

    def gradients(self, layers: int) -> int:
        """Gradients after the reduce-scatter of `layers` layers: their parts, and earlier micro-batches' sums for the rest."""
        sums = self._reduce * (self.trained.whole - layers * self.trained.layer.whole) if self.accumulates else 0
        return sums + (0 if self.per_layer else layers * self.trained.layer.part * self._width)

    @property
    def gathering_embedding(self) -> int:
        """Buffers during the embedding's gather, the second one: the root's flat buffer is still allocated."""
        return 2 * self.root + (2 if self.gloo else 1) * self.embedding

    @property
    def at_loss(self) -> int:
        """Buffers at the loss: the last layer's flat buffer is still allocated."""
        return self._gathered_before(self.units.num_layers) + self.layer

    def _at_layer(self, number: int) -> int:
        """Buffers after the backward pass of `number` layers: gathered parameters, head gradient, last reduce-scatter's input."""
        held = self._gathered_before(self.units.num_layers - number) + self._gradient(self.trained.root, fresh=False)
        if self.resharded:
            following = self.embedding if number == self.units.num_layers - 1 else self.layer
            held += self.layer + following
        return held + (self._reduced(self.trained.layer) if number else 0)

    def layer_begins(self, number: int, temporaries: int) -> int:
        """Buffers at the start of a layer's backward pass, in which the next layer is already gathered."""
        gathering = self.layer if self.gloo and self.resharded else 0
        return self._at_layer(number) + max(temporaries, gathering)

    def layer_ends(self, number: int, temporaries: int, step: int) -> int:
        """Buffers at the end of a layer's backward pass: its gradients complete, or copied for their reduce-scatter."""
        gradient, reduced = self._gradient(self.trained.layer), self._reduced(self.trained.layer)
        before = self._at_layer(number)
        reducing = before - self.layer - (reduced if number else 0) + reduced + self._reduce * self.trained.layer.part
        moved = max(gradient, reduced if self.gloo else 0, step if self.per_layer else 0)
        return max(before + gradient + temporaries, reducing + moved)

    def pass_ends(self, step: int) -> int:
        """Buffers at the pass's end: the embedding's gradient complete, or the root's being reduced with its last tensor kept."""
        head = self._gradient(self.trained.root, fresh=False)
        complete = self.root + self._reduced(self.trained.layer) + head + self._gradient(self.trained.embedding)
        reduced, part = self._reduced(self.trained.root), self._reduce * self.trained.root.part
        moved = max(reduced if self.gloo else 0, step if self.per_layer else 0)
        reducing = head + reduced + part + moved + self._gradient(self.trained.embedding, fresh=False)
        return self.embedding + max(complete, reducing)
