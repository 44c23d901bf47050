"""The moments of an update at which most memory is in use, and what is alive in each; no torch. Bytes of one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from peft_pretraining.memory.counts import DTYPE_BYTES
from peft_pretraining.memory.fsdp_units import Unit, Units

if TYPE_CHECKING:
    from peft_pretraining.memory.setting import Setting


class Moment(NamedTuple):
    """What is alive at one time beside what always is."""

    gradients: int
    activations: int
    loss: int
    scratch: int


@dataclass(frozen=True)
class Working:
    """What an update's moments are made of.

    gradients: where all of them are there, or of the largest step. activations, loss: see memory.activation_bytes.
    layer: temporaries of a linear's backward pass. step: those of the largest step. lasting: what of `layer` is never given back.
    restart: those of a restart, which comes between two updates.
    """

    gradients: int
    activations: int
    loss: int
    layer: int
    step: int
    lasting: int = 0
    restart: int = 0

    def layers_left(self, count: int, num_layers: int) -> int:
        """Activations of so many layers; with checkpointing about half of them are those of the layer that is at work."""
        return self.activations if count >= num_layers else self.activations * count // num_layers


def of_whole(setting: Setting, working: Working) -> list[Moment]:
    """One process, or DDP, where each has everything: the loss, the backward pass's begin and end, the step."""
    # DDP's buckets hold all gradients from the first update on; so does accumulation, from its first micro-batch.
    buckets = setting.world_size > 1 and not setting.per_layer
    before = working.gradients if setting.gradient_accumulation > 1 or buckets else 0
    head = DTYPE_BYTES[setting.dtype] * setting.model.vocab_size * setting.model.hidden_size
    one_layer = working.layers_left(1, setting.model.num_hidden_layers)
    at_loss = Moment(before, working.activations, working.loss, working.lasting)
    backward_begins = Moment(before or head, working.activations, 0, working.layer)
    if setting.gradients_stay:
        backward_ends = Moment(working.gradients, one_layer, 0, working.layer)
        at_step = Moment(working.gradients, 0, 0, working.step + working.lasting)
    else:
        backward_ends = at_step = Moment(working.gradients, one_layer, 0, max(working.layer, working.step + working.lasting))
    restart = Moment(working.gradients if buckets else 0, 0, 0, working.restart + working.lasting)
    return [at_loss, backward_begins, backward_ends, at_step, restart]


def of_parts(setting: Setting, working: Working, units: Units, trained: Units) -> list[Moment]:
    """FSDP2, where each process has a part of every parameter. Its order of events, torch 2.13:

    Forward: the root's parameters are gathered and stay until the end of the backward pass. A unit is gathered into a flat
    buffer, copied out of it, and freed afterwards unless reshard_after_forward is off; the flat buffer waits for the next one.
    Backward: while a layer is at work, the next one's flat buffer is filled. Its whole gradient is copied into the input of a
    reduce-scatter, which stays until the layer before it comes to the same point. Embedding and root get no gradient of their
    inputs, so that theirs wait, whole, for the end of the pass.
    gloo takes another buffer of the payload's size for a gather or a reduce-scatter.

    units: what is gathered. trained: of it, what has gradients.
    """
    buffers, num_layers = _Buffers(setting, units, trained), units.num_layers
    before = min(working.gradients, buffers.gradients(0))
    found = [
        Moment(before, 0, 0, buffers.gathering_embedding),
        Moment(before, working.activations, working.loss, buffers.at_loss),
    ]
    # From layer to layer all changes evenly, but at the first, which has no reduce-scatter before it, and the last, which has the
    # embedding after it.
    for number in sorted({0, 1, num_layers - 2, num_layers - 1} & set(range(num_layers))):
        gradients = min(working.gradients, buffers.gradients(number))
        left, below = (working.layers_left(num_layers - number - done, num_layers) for done in (0, 1))
        if setting.device_type == "cpu":
            # malloc keeps what a layer's backward pass frees, blocks of less than 4 MiB between gradients that stay.
            left = below = working.activations
        found += [
            Moment(gradients, left, 0, buffers.layer_begins(number, working.layer)),
            Moment(gradients, below, 0, buffers.layer_ends(number, working.layer, working.step)),
        ]
    gradients = min(working.gradients, buffers.gradients(num_layers))
    at_end = Moment(gradients, 0, 0, buffers.pass_ends(working.step))
    return [*found, at_end, Moment(working.gradients, 0, 0, working.step), Moment(0, 0, 0, working.restart)]


class _Buffers:
    """What FSDP2 holds for a while: gathered parameters, whole gradients, inputs of reduce-scatters. Bytes."""

    def __init__(self, setting: Setting, units: Units, trained: Units):
        self.units, self.trained, self.resharded = units, trained, setting.reshard_after_forward
        self.accumulates = setting.gradient_accumulation > 1
        self.per_layer, self.gloo = setting.per_layer, setting.device_type == "cpu"
        self._compute, self._reduce = DTYPE_BYTES[setting.computes_in], DTYPE_BYTES[setting.reduces_in]
        self._width = DTYPE_BYTES[setting.dtype]
        self.root, self.layer, self.embedding = map(self._gathered, (units.root, units.layer, units.embedding))

    def _gathered(self, unit: Unit) -> int:
        return self._compute * unit.padded

    def _gradient(self, unit: Unit, fresh: bool = True) -> int:
        """Of the micro-batch at work. With accumulation what is not `fresh` is already part of the sum."""
        return self._compute * unit.whole if fresh or not self.accumulates else 0

    def _reduced(self, unit: Unit) -> int:
        return self._reduce * unit.padded

    def _gathered_before(self, layers: int) -> int:
        """The root, and where nothing is freed after forward also the embedding and `layers` layers."""
        return self.root + (0 if self.resharded else self.embedding + layers * self.layer)

    def gradients(self, layers: int) -> int:
        """After the reduce-scatter of so many layers: their parts, and of the others what earlier micro-batches left."""
        sums = self._reduce * (self.trained.whole - layers * self.trained.layer.whole) if self.accumulates else 0
        return sums + (0 if self.per_layer else layers * self.trained.layer.part * self._width)

    @property
    def gathering_embedding(self) -> int:
        """The first gather but one: the root's flat buffer is still there."""
        return 2 * self.root + (2 if self.gloo else 1) * self.embedding

    @property
    def at_loss(self) -> int:
        """The last layer's flat buffer is still there."""
        return self._gathered_before(self.units.num_layers) + self.layer

    def _at_layer(self, number: int) -> int:
        """Gathered parameters, the head's gradient, the input of the reduce-scatter before; `number` layers are done."""
        held = self._gathered_before(self.units.num_layers - number) + self._gradient(self.trained.root, fresh=False)
        if self.resharded:
            following = self.embedding if number == self.units.num_layers - 1 else self.layer
            held += self.layer + following
        return held + (self._reduced(self.trained.layer) if number else 0)

    def layer_begins(self, number: int, temporaries: int) -> int:
        """The next one is gathered beforehand."""
        gathering = self.layer if self.gloo and self.resharded else 0
        return self._at_layer(number) + max(temporaries, gathering)

    def layer_ends(self, number: int, temporaries: int, step: int) -> int:
        """The layer's gradients are complete; then they lie in the input of their reduce-scatter, and the layer is freed."""
        gradient, reduced = self._gradient(self.trained.layer), self._reduced(self.trained.layer)
        before = self._at_layer(number)
        reducing = before - self.layer - (reduced if number else 0) + reduced + self._reduce * self.trained.layer.part
        moved = max(gradient, reduced if self.gloo else 0, step if self.per_layer else 0)
        return max(before + gradient + temporaries, reducing + moved)

    def pass_ends(self, step: int) -> int:
        """The embedding's gradient is complete; then the root's is reduced, of which torch keeps the last tensor meanwhile."""
        head = self._gradient(self.trained.root, fresh=False)
        complete = self.root + self._reduced(self.trained.layer) + head + self._gradient(self.trained.embedding)
        reduced, part = self._reduced(self.trained.root), self._reduce * self.trained.root.part
        moved = max(reduced if self.gloo else 0, step if self.per_layer else 0)
        reducing = head + reduced + part + moved + self._gradient(self.trained.embedding, fresh=False)
        return self.embedding + max(complete, reducing)
