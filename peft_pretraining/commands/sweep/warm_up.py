"""The full-rank run from whose weights a sweep starts a ReLoRA run: an entry's `warm_up`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from peft_pretraining.config.arguments import ROWS, Arguments, as_dict
from peft_pretraining.methods import METHODS, has_effect
from peft_pretraining.plan.plan import Plan
from peft_pretraining.plan.schedule import is_finished
from peft_pretraining.run.folder import differing_arguments, differing_shape

WARM_UP = "warm_up"


def unusable_warm_up(base: Mapping[str, Any], entry: Mapping[str, Any]) -> str | None:
    """Why what the entry says under `warm_up` cannot work, whatever its flags; None where it can."""
    flags, first = {**base, **entry}, entry.get(WARM_UP)
    if WARM_UP in base:
        return f"base: {WARM_UP} belongs to an entry of settings, beside peft_model: relora"
    method = METHODS.get(str(flags.get("peft_model")))
    if method is None or not method.frozen_base:
        return f"{WARM_UP}: only runs of peft_model: relora begin with a full-rank run's weights"
    if flags.get("warmed_up_model") is not None:
        return f"{WARM_UP} and warmed_up_model: a run begins with one of them; drop one of the two"
    if not isinstance(first, dict) or not first or any(isinstance(value, (dict, list)) for value in first.values()):
        return (
            f"{WARM_UP}: must map flags of the full-rank run to one value each, "
            f"e.g. {{lr: 0.001, num_training_steps: 150}}, not {first!r}"
        )
    before = METHODS.get(str(first.get("peft_model", Arguments.peft_model)))
    if before is None or not before.full_rank:
        return f"{WARM_UP}: peft_model {first['peft_model']}: ReLoRA begins with full-rank weights"
    open_lists = [
        name
        for name, value in base.items()
        if isinstance(value, list) and name in entry and name not in first and has_effect(name, "full")
    ]
    if open_lists:
        return (
            f"{WARM_UP}: {', '.join(open_lists)}: the base has a list and this entry its own value; say in {WARM_UP} which the "
            "full-rank run has"
        )
    return None


def warm_up_flags(
    base: Mapping[str, Any], entry: Mapping[str, Any], flags: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All flags of the full-rank run, and those that its name is made of: its own and, of the base's lists, the run's value.

    flags: of the run that begins with it. Lists of what full-rank training does not read make no second run.
    """
    first = dict(sorted(entry[WARM_UP].items()))
    varied = {
        name: flags[name]
        for name, value in base.items()
        if isinstance(value, list) and name not in entry and has_effect(name, "full")
    }
    single = {name: value for name, value in base.items() if not isinstance(value, list)}
    return {**single, **varied, **first, "peft_model": "full"}, {**varied, **first}


def disagreements(args: Arguments, plan: Plan, first: Arguments, first_plan: Plan) -> list[str]:
    """Why the run of `args` could not begin with the weights of `first`: what the program would refuse once they are there."""
    planned = asdict(first_plan)
    differing = differing_arguments(as_dict(first), planned, args, plan)
    if args.dataset != first.dataset:
        differing["dataset"] = (first.dataset, args.dataset)
    problems = [
        f"{name} {now}: its {WARM_UP} has {then}, and they must be the same"
        for name, (then, now) in differing.items()
        if not ROWS[name].warm_start
    ]
    problems += [
        f"{args.model_config}: {key} is {now}, that of its {WARM_UP} is {then}; they must be the same"
        for key, (then, now) in differing_shape(planned, plan).items()
    ]
    if is_finished(plan, first_plan.num_training_steps, first.max_train_tokens or 0):
        problems.append(
            f"num_training_steps {plan.num_training_steps}: the {first_plan.num_training_steps:,} updates of its {WARM_UP} "
            f"count, and leave it none; give {WARM_UP} a num_training_steps of its own"
        )
    return problems
