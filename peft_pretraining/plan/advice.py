"""Flags that make a run fit into a device's memory: as few changes of the training as possible, each flag once.

Every proposal is checked as if it had been typed: it passes `check`, and its peak is the account's. A user's method stays unless
nothing else fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft_pretraining.config.arguments import EMBEDDING_STATES, ROWS, Arguments, ConfigError
from peft_pretraining.config.optimizers import OPTIMIZERS, PUBLISHED_NAMES
from peft_pretraining.distributed.device import DeviceMemory
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.account import CLASSES, account
from peft_pretraining.memory.setting import MemorySetting, memory_setting
from peft_pretraining.methods import METHODS
from peft_pretraining.plan.checks import check
from peft_pretraining.plan.plan import GIB, Plan


@dataclass(frozen=True)
class Proposal:
    """Arguments to change, and the peak in bytes that follows. text: the flags to add to the command line."""

    changes: Mapping[str, Any]
    text: str
    peak: int


@dataclass(frozen=True)
class _Option:
    """A change of one flag, with what it needs of others.

    alters: how much the arithmetic of the training changes, 0 for a change after which a run may be resumed. moves: how far the
    value moves.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    alters: int = 0
    moves: float = 0.0


@dataclass(frozen=True)
class Advisor:
    """Finds proposals for a planned run on a type of device, cpu or cuda."""

    args: Arguments
    plan: Plan
    device_type: str

    def single(self) -> list[Proposal]:
        """Returns changes of single flags that lower the peak, the lowest peak first; the method only if nothing else does."""
        for method in self._methods():
            # A flag that lowers the peak no further than the change of the method alone is not worth naming.
            alone = [self.proposal(method)] if method else []
            lower = [one for one in alone if one.peak < self.plan.bytes["peak"]]
            highest = lower[0].peak if lower else self.plan.bytes["peak"]
            dimensions = [
                [option for option in options if option.changes][:1]
                for options in self._dimensions(method, one_micro_batch=False)
            ]
            changes = [{**method, **options[0].changes} for options in dimensions if options]
            lower += [one for one in map(self.proposal, changes) if one.peak < highest]
            if accepted := [one for one in lower if self.accepted(one.changes)]:
                return sorted(accepted, key=lambda one: one.peak)
        return []

    def fitting(self, limit: int, *, other_method: bool = False, one_micro_batch: bool = False) -> Proposal | None:
        """Returns the smallest change with a peak of at most `limit` bytes; None if there is none.

        other_method: with the method that needs less memory instead of the user's. one_micro_batch: with an update of as many
        sequences as fit at once, so that no gradients are kept between micro-batches, instead of the user's batch.
        """
        methods = [method for method in self._methods() if bool(method) == other_method]
        by_method = (self._first(limit, method, self._dimensions(method, one_micro_batch)) for method in methods)
        return next(by_method, None)

    def _methods(self) -> Iterator[dict[str, Any]]:
        """Yields the changes of the method: none, then the lighter method with the values it needs."""
        args, method = self.args, METHODS[self.args.peft_model]
        yield {}
        if method.lighter is not None:
            # The optimizer's published name, galore_..., would select the method again.
            optimizer = {"optimizer": args.optimizer} if method.projected else {}
            yield {"peft_model": method.lighter, "rank": args.rank, "sp_ratio": args.sp_ratio, **optimizer}

    def _dimensions(self, method: Mapping[str, Any], one_micro_batch: bool) -> list[list[_Option]]:
        """Returns, for each flag that could lower memory, its options, leaving it first."""
        args = _applied(self.args, method)
        optimizers = list(smaller_optimizers(args.optimizer))
        per_layer: dict[str, Any] = {} if args.per_layer else {"per_layer": True}
        if per_layer and args.grad_clipping:
            per_layer["grad_clipping"] = None
        accumulating = [{**per_layer, "accumulate": "moments"}] if args.accumulate == "gradients" else []
        of_embedding = EMBEDDING_STATES[args.embedding_states or "32bit"]
        options: list[list[dict[str, Any]]] = [
            [{"parallel": "fsdp"}] if self.plan.world_size > 1 and args.parallel != "fsdp" else [],
            [{"reshard_after_forward": True}] if not args.reshard_after_forward else [],
            [{"activation_checkpointing": "layer"}] if args.activation_checkpointing != "layer" else [],
            [{"dtype": "bfloat16"}] if self.plan.dtype != "bfloat16" else [],
            [{"async_save": False}] if args.async_save else [],
            [{"linear_cache": "none"}] if self.plan.linear_cache != "none" else [],
            [per_layer, *accumulating] if per_layer else accumulating,
            [_optimizer_change(args, name) for name in optimizers],
            [{"embedding_states": name} for name, bits in EMBEDDING_STATES.items() if bits < of_embedding],
            [{"head_gradient": "slices"}] if args.head_gradient != "slices" else [],
            [int8_weights(args)] if args.weight_dtype is None else [],
        ]
        dimensions = [[_Option(), *(_weighed(changes, number) for number, changes in enumerate(rows, 1))] for rows in options]
        return [*dimensions, list(self._batches(one_micro_batch))]

    def _batches(self, one_micro_batch: bool) -> Iterator[_Option]:
        """Yields micro-batches of fewer sequences: more of them, so that the update stays the same, or a single one."""
        args, plan = self.args, self.plan
        for size in range(plan.batch_size, 0, -1):
            if plan.batch_size % size:
                continue
            per_micro_batch = size * plan.world_size
            total = per_micro_batch if one_micro_batch else plan.total_batch_size
            wanted = {"batch_size": size, "gradient_accumulation": args.gradient_accumulation and total // per_micro_batch}
            follows = per_micro_batch if args.gradient_accumulation is None else total
            changes: dict[str, Any] = {name: value for name, value in wanted.items() if value != getattr(args, name)}
            if (args.total_batch_size or follows) != total:
                changes["total_batch_size"] = total
            yield _Option(changes, moves=math.log2(plan.batch_size / size))

    def _first(self, limit: int, method: Mapping[str, Any], dimensions: Sequence[Sequence[_Option]]) -> Proposal | None:
        """Returns the first accepted combination that fits, in order of what it changes."""

        def cost(options: Sequence[_Option]) -> tuple[float, ...]:
            changed = [option for option in options if option.changes]
            return (sum(option.alters for option in changed), len(changed), sum(option.moves for option in changed))

        for options in sorted(itertools.product(*dimensions), key=cost):
            changes = dict(method)
            for option in options:
                changes |= option.changes
            if not changes or (
                "embedding_states" in changes and not OPTIMIZERS[changes.get("optimizer", self.args.optimizer)].low_bit
            ):
                continue
            proposal = self.proposal(changes)
            if proposal.peak <= limit and self.accepted(changes):
                return proposal
        return None

    def setting(self, changes: Mapping[str, Any]) -> MemorySetting:
        """Returns the memory setting of the run with these changes."""
        args, plan = _applied(self.args, changes), self.plan
        per_micro_batch = args.batch_size * plan.world_size
        accumulation = args.gradient_accumulation or (args.total_batch_size or per_micro_batch) // per_micro_batch
        world = World(size=plan.world_size)
        setting = memory_setting(args, plan.model, world, args.dtype or plan.dtype, accumulation, self.device_type)
        return replace(setting, linear_cache=plan.linear_cache) if args.linear_cache == "auto" else setting

    def proposal(self, changes: Mapping[str, Any]) -> Proposal:
        """Returns the proposal of these changes, whether or not they are accepted."""
        return Proposal(changes, _text(self.args, changes), account(self.setting(changes))["peak"])

    def accepted(self, changes: Mapping[str, Any]) -> bool:
        """Tells whether the arguments pass the checks with these changes."""
        try:
            check(_applied(self.args, changes), World(size=self.plan.world_size))
        except ConfigError:
            return False
        return True


def _applied(args: Arguments, changes: Mapping[str, Any]) -> Arguments:
    """The arguments as they are with the changes typed after them."""
    return replace(args, **changes, given=args.given | changes.keys()) if changes else args


def _weighed(changes: Mapping[str, Any], number: int) -> _Option:
    """The option of a flag's `number`-th change. Flags that a resumed run may change freely leave the arithmetic as it is."""
    free = all(ROWS[name].on_resume == "freely" for name in changes)
    return _Option(changes, 0 if free else number, number)


def smaller_optimizers(name: str) -> Iterator[str]:
    """Yields the optimizers to suggest instead, with fewer bytes each."""
    while (smaller := OPTIMIZERS[name].smaller) is not None:
        yield (name := smaller)


def _optimizer_change(args: Arguments, name: str) -> dict[str, Any]:
    """Another optimizer; with the method, where the present optimizer's published name selects it and the new one has none."""
    method = {"peft_model": args.peft_model} if _selects_method(args) and _published(args, name) is None else {}
    return {"optimizer": name, **method}


def int8_weights(args: Arguments) -> dict[str, Any]:
    """Parameters stored in int8, rounded stochastically unless the user has decided about that."""
    return {"weight_dtype": "int8", **({} if "stochastic_rounding" in args.given else {"stochastic_rounding": True})}


def _selects_method(args: Arguments) -> bool:
    """Whether --optimizer galore_... is what selects the method."""
    return METHODS[args.peft_model].projected and "peft_model" not in args.given


def _published(args: Arguments, optimizer: str) -> str | None:
    meaning = {"optimizer": optimizer, "peft_model": args.peft_model}
    return next((alias for alias, flags in PUBLISHED_NAMES.items() if flags == meaning), None)


def _text(args: Arguments, changes: Mapping[str, Any]) -> str:
    """The changes as flags."""
    words = []
    for name, value in changes.items():
        if name == "stochastic_rounding" and "weight_dtype" in changes:
            # It follows from --weight_dtype.
            continue
        if name == "optimizer":
            published = _published(args, value) if _selects_method(args) and "peft_model" not in changes else None
            # Per-layer updates that the optimizer's name asked for stay.
            suffix = "_per_layer" if args.per_layer and "per_layer" not in args.given else ""
            words.append(f"--optimizer {published or value}{suffix}")
        elif value is True or (value is not None and value == ROWS[name].const):
            words.append(f"--{name}")
        else:
            words.append(f"--{name} {0 if value is None else str(value).lower()}")
    return " ".join(words)


def out_of_memory_problem(plan: Plan, args: Arguments, device_type: str, message: str) -> str:
    """The message of a run that ran out of memory; `message`: the allocator's own."""
    largest = max(CLASSES, key=lambda name: plan.bytes[name])
    lower = _listed(Advisor(args, plan, device_type).single())
    return (
        f"memory ran out ({message}); by the plan the peak is {plan.bytes['peak'] / GIB:.1f} GiB, most of it {largest} "
        f"({plan.bytes[largest] / GIB:.1f} GiB); "
        + (f"peak in GiB with one change: {lower}" if lower else "no flag lowers it: take a smaller model or another device")
    )


def memory_problems(plan: Plan, args: Arguments, device: DeviceMemory) -> list[str]:
    """How much memory the run needs beyond the device's, and the flags that would make it fit; [] where it fits."""
    limit = device.num_bytes
    if plan.bytes["peak"] <= limit:
        return []
    advisor = Advisor(args, plan, device.device_type)
    needed = f"this run needs about {plan.bytes['peak'] / GIB:.1f} GiB at the peak, and {device.name} has {limit / GIB:.1f} GiB"
    single = _listed(advisor.single())
    alone = [f"peak in GiB with one change: {single}"] if single else []
    kept = f"{plan.bytes['gradients'] / GIB:.1f} GiB of gradients stay between the {plan.gradient_accumulation} micro-batches"
    accumulates = plan.gradient_accumulation > 1 and args.accumulate == "gradients"
    if (proposal := advisor.fitting(limit)) is not None:
        reason = f", and {kept} although --per_layer frees them afterwards" if args.per_layer and accumulates else ""
        return [f"{needed} per process{reason}; it would fit with {proposal.text}", *alone]
    reason = kept if accumulates else "smaller micro-batches keep their gradients until the last of an update"
    another_batch = f"the batch is the reason: {reason}; with one micro-batch per update, which changes the training,"
    changes = {
        another_batch: advisor.fitting(limit, one_micro_batch=True),
        "with another method": advisor.fitting(limit, other_method=True),
    }
    if not any(changes.values()):
        changes = {
            "with another method and one micro-batch per update": advisor.fitting(limit, other_method=True, one_micro_batch=True)
        }
    ways = [f"{change} it would fit with {proposal.text}" for change, proposal in changes.items() if proposal is not None]
    missing = (
        "no flags make it fit as it is" if ways else "no flag makes it fit: take a smaller model or a device with more memory"
    )
    return [f"{needed} per process; {missing}", *ways, *alone]


def _listed(proposals: Sequence[Proposal]) -> str:
    return ", ".join(f"{proposal.peak / GIB:.1f} with {proposal.text}" for proposal in proposals)
