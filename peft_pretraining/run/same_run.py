"""Compares a recorded run with the one that is asked for: which arguments differ that matter when the run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_pretraining.config.arguments import ROWS, Arguments, as_dict
from peft_pretraining.plan.plan import Plan

# Compared as resolved by the plan: their defaults depend on the machine, the data or other arguments.
_RESOLVED = ("data_lanes", "total_batch_size", "dtype", "eval_tokens")
# Compared by content, wherever the files lie: by `differing_shape`, and by the data's fingerprint.
_BY_CONTENT = ("model_config", "dataset")
_PATHS = ("warmed_up_model", "eval_dataset")
# The trained model does not depend on these, only the figures of its evaluations.
EVALUATION_FLAGS = ("eval_dataset", "eval_tokens")


def differing_arguments(
    arguments: Mapping[str, Any], plan: Mapping[str, Any], args: Arguments, own: Plan
) -> dict[str, tuple[Any, Any]]:
    """(then, now) of every argument with two values that may not change freely, by name; data and model's shape are not here.

    arguments, plan: of the recorded run, as in its run.json. args, own: of the run that is asked for.
    """
    then, now = dict(arguments), as_dict(args)
    for name in _RESOLVED:
        then[name], now[name] = plan.get(name), getattr(own, name)
    compared = {name for name, row in ROWS.items() if row.on_resume != "freely" and name not in _BY_CONTENT}
    if args.max_train_tokens is not None and then["max_train_tokens"] is not None:
        compared.remove("num_training_steps")  # has no effect in either run
    differing = {name: (then[name], now[name]) for name in sorted(compared) if then[name] != now[name]}
    return {name: values for name, values in differing.items() if name not in _PATHS or not _same_place(*values)}


def _same_place(one: Any, other: Any) -> bool:
    """Whether two paths lead to the same place."""
    return isinstance(one, str) and isinstance(other, str) and Path(one).resolve() == Path(other).resolve()


def differing_shape(plan: Mapping[str, Any], own: Plan) -> dict[str, tuple[Any, Any]]:
    """(then, now) of every entry of the model's configuration that differs, by name."""
    then = plan["model"]
    shape = {key: value for key, value in asdict(own.model).items() if key not in ("name", "path")}
    return {key: (then.get(key), value) for key, value in shape.items() if then.get(key) != value}
