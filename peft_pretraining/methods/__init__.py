"""Training methods: one object for each, in a file of its own. No torch is imported here; methods load it where they need it."""

from __future__ import annotations

import importlib
from typing import cast

from peft_pretraining.config.arguments import METHOD_NAMES
from peft_pretraining.methods.method import Method

# Every file of this folder that defines METHOD, by the file's name.
METHODS: dict[str, Method] = {
    name: cast(Method, importlib.import_module(f"peft_pretraining.methods.{name}").METHOD) for name in METHOD_NAMES
}


def register(method: Method) -> None:
    """Make a method that is defined outside this folder known to the program, as a choice of --peft_model too."""
    METHODS[method.name] = method
    METHOD_NAMES[method.name] = method.name


def has_effect(flag: str, method: str) -> bool:
    """Whether a run of this method reads the argument `flag`."""
    return method not in METHODS or flag in METHODS[method].flags or not any(flag in other.flags for other in METHODS.values())


def owners(flag: str) -> list[str]:
    """Names of the methods that read the argument `flag`; none for an argument that does not depend on the method."""
    return [name for name, method in METHODS.items() if flag in method.flags]
