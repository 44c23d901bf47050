"""Predicts how many bytes processes exchange in an update, and how update time scales with processes; does not import torch.

A payload is the whole buffer that a collective sums, gathers or scatters. In a ring each of N processes sends and receives
(N - 1) / N of a gathered or scattered payload, and twice that of an all-reduced payload.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft_pretraining.memory.account import parameter_groups
from peft_pretraining.memory.counts import DTYPE_BYTES, units_of
from peft_pretraining.memory.setting import MemorySetting


@dataclass(frozen=True)
class Traffic:
    """Payloads of one update, bytes. gathered_forward and gathered_backward are per micro-batch, the others per update.

    reductions: how many of the micro-batches sum their gradients over processes: the last one, or all.
    """

    world_size: int
    micro_batches: int
    all_reduced: int = 0
    gathered_forward: int = 0
    gathered_backward: int = 0
    reduce_scattered: int = 0
    reductions: int = 1

    @property
    def all_gathered(self) -> int:
        """Payload of all gathers in an update, bytes."""
        return self.micro_batches * (self.gathered_forward + self.gathered_backward)

    @property
    def sent(self) -> float:
        """Bytes that each process sends in an update."""
        return self._share * (2 * self.all_reduced + self.all_gathered + self.reduce_scattered)

    @property
    def _share(self) -> float:
        return (self.world_size - 1) / self.world_size

    @property
    def sent_forward(self) -> float:
        """Bytes that each process sends in the forward pass of a micro-batch."""
        return self._share * self.gathered_forward

    def sent_backward(self, last: bool) -> float:
        """Bytes that each process sends in a micro-batch's backward pass. last: whether it is the update's last one."""
        reduces = last or self.reductions == self.micro_batches
        gradients = (2 * self.all_reduced + self.reduce_scattered) / self.reductions if reduces else 0
        return self._share * (self.gathered_backward + gradients)


def traffic(setting: MemorySetting) -> Traffic:
    """Returns the traffic of an update, without evaluation, checkpoints and the few numbers for loss, token counts and norms.

    DDP sums all gradients in the reduce dtype, in the last micro-batch, or in each one with accumulation in moments. FSDP2
    gathers every unit in the forward pass, and all but the root's again in the backward pass where reshard_after_forward freed
    them, in the dtype of the arithmetic; it reduces and scatters gradients in the last micro-batch, in the reduce dtype.
    """
    groups = parameter_groups(setting)
    units = units_of(setting.model, groups, setting.parts)
    trained = units_of(setting.model, [group for group in groups if group.trained], setting.parts)
    size, accumulation = setting.world_size, setting.gradient_accumulation
    if size == 1:
        return Traffic(1, accumulation)
    reduced = DTYPE_BYTES[setting.reduces_in] * trained.padded
    if not setting.sharded:
        reductions = accumulation if setting.accumulate == "moments" else 1
        return Traffic(size, accumulation, all_reduced=reductions * reduced, reductions=reductions)
    compute = DTYPE_BYTES[setting.computes_in]
    again = units.padded - units.root.padded if setting.reshard_after_forward else 0
    return Traffic(size, accumulation, 0, compute * units.padded, compute * again, reduced)


def full_rank(setting: MemorySetting) -> MemorySetting:
    """Returns the setting of the same run with dense weights."""
    return replace(setting, peft_model="full")


@dataclass(frozen=True)
class Link:
    """The network link of a process.

    bytes_per_s: bytes sent, and at the same time received, per second. overlap: share of a pass's communication that can run in
    parallel with its arithmetic, from 0 to 1.
    """

    bytes_per_s: float
    overlap: float = 1.0


def backward_share(setting: MemorySetting) -> float:
    """Returns the backward pass's share of a micro-batch's arithmetic.

    The backward pass has two products for each of the forward pass, and repeats the forward pass with activation checkpointing.
    """
    return 3 / 4 if setting.activation_checkpointing else 2 / 3


def update_seconds(setting: MemorySetting, tokens_per_s: float, link: Link) -> float:
    """Predicts the seconds of an update. tokens_per_s: measured speed of one process that waits for no other.

    Forward and backward pass of every micro-batch take the maximum of arithmetic and communication (overlap 1) or their sum
    (overlap 0). Ignored: latency, the optimizer's step, and that a pass's first gather and last reduction cannot overlap.
    """
    payloads = traffic(setting)
    micro_batch = setting.batch_size * setting.max_length / tokens_per_s
    backward = backward_share(setting) * micro_batch
    forward = micro_batch - backward
    earlier = setting.gradient_accumulation - 1
    return (
        setting.gradient_accumulation * _pass_seconds(forward, payloads.sent_forward, link)
        + earlier * _pass_seconds(backward, payloads.sent_backward(last=False), link)
        + _pass_seconds(backward, payloads.sent_backward(last=True), link)
    )


def _pass_seconds(arithmetic: float, sent: float, link: Link) -> float:
    communication = sent / link.bytes_per_s
    return arithmetic + communication - link.overlap * min(arithmetic, communication)


def in_processes(setting: MemorySetting, world_size: int) -> MemorySetting:
    """Returns the setting of an update of the same number of sequences in another number of processes.

    The micro-batch keeps its size unless a process's share is smaller; shares are rounded up.
    """
    sequences = setting.batch_size * setting.gradient_accumulation * setting.world_size
    share = math.ceil(sequences / world_size)
    batch_size = min(setting.batch_size, share)
    accumulation = math.ceil(share / batch_size)
    return replace(setting, world_size=world_size, batch_size=batch_size, gradient_accumulation=accumulation)


@dataclass(frozen=True)
class Scaling:
    """Predicted speed of an update in `world_size` processes.

    efficiency: tokens_per_s per process, relative to one process that waits for no other.
    """

    world_size: int
    seconds_per_update: float
    tokens_per_s: float
    efficiency: float


def scaling(setting: MemorySetting, world_size: int, tokens_per_s: float, link: Link) -> Scaling:
    """Predicts the speed of the setting's update in `world_size` processes."""
    seconds = update_seconds(in_processes(setting, world_size), tokens_per_s, link)
    tokens = setting.batch_size * setting.gradient_accumulation * setting.world_size * setting.max_length
    return Scaling(world_size, seconds, tokens / seconds, tokens / seconds / (world_size * tokens_per_s))


def stops_scaling_at(setting: MemorySetting, tokens_per_s: float, link: Link) -> int | None:
    """Returns the smallest number of processes that divides the sequences evenly and has an efficiency below one half.

    None if there is no such number up to one sequence per process.
    """
    sequences = setting.batch_size * setting.gradient_accumulation * setting.world_size
    even = (size for size in range(2, sequences + 1) if sequences % size == 0)
    return next((size for size in even if scaling(setting, size, tokens_per_s, link).efficiency < 0.5), None)


def world_sizes(setting: MemorySetting) -> Iterator[int]:
    """Returns the powers of two, up to one sequence per process, that divide the sequences evenly, and the setting's own size."""
    sequences = setting.batch_size * setting.gradient_accumulation * setting.world_size
    powers = {2**exponent for exponent in range(sequences.bit_length()) if sequences % 2**exponent == 0}
    return iter(sorted(powers | {setting.world_size}))


def wire_figures(setting: MemorySetting, bandwidth: float | None, tokens_per_s: float | None) -> dict[str, Any]:
    """Returns the communication figures of the `estimate` command, JSON-serialisable.

    bandwidth: bytes that a process sends per second, in 10^9, None if unknown. tokens_per_s: measured speed of one process,
    None if unknown; used only with a bandwidth.
    """
    own, dense = traffic(setting), traffic(full_rank(setting))
    figures: dict[str, Any] = {
        "parallel": setting.parallel,
        **asdict(own),
        "all_gathered": own.all_gathered,
        "sent": round(own.sent),
        "sent_full_rank": round(dense.sent),
    }
    if bandwidth is None:
        return figures
    link = Link(bandwidth * 1e9)
    figures |= {"seconds": own.sent / link.bytes_per_s, "seconds_full_rank": dense.sent / link.bytes_per_s}
    if tokens_per_s is not None:
        figures["backward_share"] = backward_share(setting)
        for name, overlap in (("overlapped", 1.0), ("not_overlapped", 0.0)):
            at = replace(link, overlap=overlap)
            rows = [asdict(scaling(setting, size, tokens_per_s, at)) for size in world_sizes(setting)]
            figures[name] = {"scaling": rows, "stops_scaling_at": stops_scaling_at(setting, tokens_per_s, at)}
    return figures


def format_wire(figures: dict[str, Any]) -> str:
    """Formats the bytes of `wire_figures` as one line for a terminal."""
    if figures["world_size"] == 1:
        return "none (a single process)"
    parts = {
        "all-reduce": figures["all_reduced"],
        "all-gather": figures["all_gathered"],
        "reduce-scatter": figures["reduce_scattered"],
    }
    payloads = " + ".join(f"{name} {size / 1e9:.3f}" for name, size in parts.items() if size)
    share = figures["sent"] / figures["sent_full_rank"]
    return (
        f"{figures['sent'] / 1e9:.3f} GB sent per update and process by {figures['parallel']} ({payloads}), "
        f"{share:.0%} of full-rank's {figures['sent_full_rank'] / 1e9:.3f}"
    )


def format_scaling(figures: dict[str, Any]) -> str:
    """Formats the times of `wire_figures` as a table for a terminal."""
    lines = []
    if "seconds" in figures:
        lines.append(
            f"communication without overlap {figures['seconds']:.3f} s per update, full-rank {figures['seconds_full_rank']:.3f} s"
        )
    if "overlapped" in figures:
        lines.append("the same update in more processes; overlapped: communication runs in parallel with arithmetic")
        lines.append(f"{'processes':>9} {'overlapped tok/s':>17} {'efficiency':>10} {'sequential':>12} {'efficiency':>10}")
        for best, worst in zip(*(figures[name]["scaling"] for name in ("overlapped", "not_overlapped")), strict=True):
            lines.append(
                f"{best['world_size']:>9,} {best['tokens_per_s']:>17,.0f} {best['efficiency']:>10.0%} "
                f"{worst['tokens_per_s']:>12,.0f} {worst['efficiency']:>10.0%}"
            )
        best, worst = (figures[name]["stops_scaling_at"] or "no number of" for name in ("overlapped", "not_overlapped"))
        lines.append(f"efficiency below one half from {best} processes on (overlapped), {worst} (sequential)")
    return "\n".join(lines)
