"""The names of methods, optimizers and supports are compared only in their own files; other code asks their objects."""

import ast
from functools import cache
from pathlib import Path

import pytest

from peft_pretraining.config.arguments import METHOD_NAMES
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.config.supports import SUPPORTS
from peft_pretraining.methods import METHODS
from peft_pretraining.optim.build import BUILDERS
from sparse_lora import linear

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "peft_pretraining"


@cache
def compared_names(text: str) -> list[tuple[int, str, str]]:
    """Returns (line, string, source of the comparison) of every string constant in a comparison or a match of `text`."""
    return [
        (part.lineno, part.value, ast.unparse(node))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Compare | ast.MatchValue)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def comparisons_of(names, allowed):
    """Yields the places where the package compares one of `names`, outside the files and folders `allowed`."""
    for path in [ROOT / "torchrun_main.py", *sorted(PACKAGE.rglob("*.py"))]:
        if not any(path.is_relative_to(PACKAGE / place) for place in allowed):
            for line, value, source in compared_names(path.read_text(encoding="utf-8")):
                # The projection "full" of GaLore's --proj_type has the same name as full-rank training.
                if value in names and "proj_type" not in source:
                    yield f"{path.relative_to(ROOT)}:{line}: {source}"


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        (METHODS, ["methods"]),
        (OPTIMIZERS, ["config/optimizers.py", "optim/build.py"]),
        (SUPPORTS, ["config/supports.py"]),
    ],
    ids=["methods", "optimizers", "supports"],
)
def test_names_are_not_compared_outside_their_files(names, allowed):
    assert list(comparisons_of(names, allowed)) == []


def test_the_search_finds_comparisons():
    text = 'if args.peft_model in ("full", "galore") or method != "relora" or {"adam": 1}:\n    pass'
    assert {value for _, value, _ in compared_names(text)} == {"full", "galore", "relora"}


def test_every_name_has_an_object():
    assert METHODS.keys() == METHOD_NAMES.keys()
    assert all(method.name == name and method.title and method.description for name, method in METHODS.items())
    assert OPTIMIZERS.keys() == BUILDERS.keys()
    assert SUPPORTS.keys() == linear.SUPPORTS.keys()
