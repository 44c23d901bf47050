"""Training methods: one object per method, each in one file. Methods import torch only inside functions."""

from __future__ import annotations

import importlib
from typing import cast

from peft_pretraining.config.arguments import METHOD_NAMES
from peft_pretraining.methods.method import Method

# METHOD of each method's file in this folder, by file name.
METHODS: dict[str, Method] = {
    name: cast(Method, importlib.import_module(f"peft_pretraining.methods.{name}").METHOD) for name in METHOD_NAMES
}


def register(method: Method) -> None:
    """Registers a method defined outside this folder, also as a choice of --peft_model."""
    METHODS[method.name] = method
    METHOD_NAMES[method.name] = method.name


def has_effect(flag: str, method: str) -> bool:
    """Whether a run of this method reads the argument `flag`."""
    return method not in METHODS or flag in METHODS[method].flags or not any(flag in other.flags for other in METHODS.values())


def owners(flag: str) -> list[str]:
    """Names of the methods that read the argument `flag`; empty for an argument that every method reads."""
    return [name for name, method in METHODS.items() if flag in method.flags]
