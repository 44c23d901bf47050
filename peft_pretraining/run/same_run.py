"""In what a recorded run and the one that is asked for differ, where it matters to a run that goes on from the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_pretraining.config.arguments import CHANGEABLE, UNCHANGEABLE, Arguments, as_dict
from peft_pretraining.plan.plan import Plan

# As resolved: their defaults depend on where a run is made.
_RESOLVED = ("data_lanes", "total_batch_size", "dtype")


def differing_arguments(
    arguments: Mapping[str, Any], plan: Mapping[str, Any], args: Arguments, own: Plan
) -> dict[str, tuple[Any, Any]]:
    """(then, now) of every argument of CHANGEABLE and UNCHANGEABLE with two values, by name; data and model's shape are not here.

    arguments, plan: of the recorded run, as in its run.json. args, own: of the one that is asked for.
    """
    then, now = dict(arguments), as_dict(args)
    for name in _RESOLVED:
        then[name], now[name] = plan.get(name), getattr(own, name)
    compared = {*CHANGEABLE, *UNCHANGEABLE} - {"model_config", "dataset"}
    if args.max_train_tokens is not None and then["max_train_tokens"] is not None:
        compared.remove("num_training_steps")  # has no effect in either
    differing = {name: (then[name], now[name]) for name in sorted(compared) if then[name] != now[name]}
    if _same_place(*differing.get("warmed_up_model", (None, None))):
        del differing["warmed_up_model"]
    return differing


def _same_place(one: Any, other: Any) -> bool:
    """Whether two paths are one, written in two ways."""
    return isinstance(one, str) and isinstance(other, str) and Path(one).resolve() == Path(other).resolve()


def differing_shape(plan: Mapping[str, Any], own: Plan) -> dict[str, tuple[Any, Any]]:
    """(then, now) of every entry of the model's configuration with two values, by name."""
    then = plan["model"]
    shape = {key: value for key, value in asdict(own.model).items() if key not in ("name", "path")}
    return {key: (then.get(key), value) for key, value in shape.items() if then.get(key) != value}
