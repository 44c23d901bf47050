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
    """Why an entry's `warm_up` cannot work, whatever the other flags; None if it can."""
    flags, first = {**base, **entry}, entry.get(WARM_UP)
    if WARM_UP in base:
        return f"base: {WARM_UP} belongs to an entry of settings, beside peft_model: relora"
    method = METHODS.get(str(flags.get("peft_model")))
    if method is None or not method.frozen_base:
        return f"{WARM_UP}: only runs of peft_model: relora start from a full-rank run's weights; remove it"
    if flags.get("warmed_up_model") is not None:
        return f"{WARM_UP} and warmed_up_model: a run starts from one of them; remove the other"
    if not isinstance(first, dict) or not first or any(isinstance(value, (dict, list)) for value in first.values()):
        return (
            f"{WARM_UP}: must map flags of the full-rank run to one value each, "
            f"e.g. {{lr: 0.001, num_training_steps: 150}}, not {first!r}"
        )
    first_method = METHODS.get(str(first.get("peft_model", Arguments.peft_model)))
    if first_method is None or not first_method.full_rank:
        return f"{WARM_UP}: peft_model {first['peft_model']}: ReLoRA starts from full-rank weights; leave peft_model out"
    ambiguous = [
        name
        for name, value in base.items()
        if isinstance(value, list) and name in entry and name not in first and has_effect(name, "full")
    ]
    if ambiguous:
        return (
            f"{WARM_UP}: {', '.join(ambiguous)}: the base has a list, and this entry overrides it; give the full-rank "
            f"run's value in {WARM_UP}"
        )
    return None


def warm_up_flags(
    base: Mapping[str, Any], entry: Mapping[str, Any], flags: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns all flags of the full-rank run, and those in its name: its own flags and the value taken from the base's lists.

    flags: of the run that starts from it. Lists of flags that full-rank training ignores make no additional run.
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
    """Why the run of `args` cannot start from the weights of the run of `first`; the checks that torchrun_main.py makes later."""
    planned = asdict(first_plan)
    differing = differing_arguments(as_dict(first), planned, args, plan)
    if args.dataset != first.dataset:
        differing["dataset"] = (first.dataset, args.dataset)
    problems = [
        f"{name} {now}: its {WARM_UP} has {then}; they must be equal"
        for name, (then, now) in differing.items()
        if not ROWS[name].warm_start
    ]
    problems += [
        f"{args.model_config}: {key} is {now}, that of its {WARM_UP} is {then}; they must be equal"
        for key, (then, now) in differing_shape(planned, plan).items()
    ]
    if is_finished(plan, first_plan.num_training_steps, first.max_train_tokens or 0):
        problems.append(
            f"num_training_steps {plan.num_training_steps}: includes the {first_plan.num_training_steps:,} updates of its "
            f"{WARM_UP}, so none are left; give {WARM_UP} a smaller num_training_steps"
        )
    return problems
