"""The language of code and documents: no private phrases, and a docstring for every public definition."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = [ROOT / "torchrun_main.py", *sorted(ROOT.glob("peft_pretraining/**/*.py")), *sorted(ROOT.glob("sparse_lora/**/*.py"))]
OTHER_TEXTS = ("*.md", "docs/*.md", "scripts/**/*.sh", "benchmarks/**/*.py", "tests/**/*.py")
TEXTS = [*CODE, *(path for pattern in OTHER_TEXTS for path in sorted(ROOT.glob(pattern)) if path != Path(__file__).resolve())]

# A pattern of a private phrase, and the plain words to write instead.
PRIVATE_PHRASES = {
    r"spoilt": "had non-finite gradients",
    r"nobody knows": "unexpected file, not listed in manifest.json",
    r"vouch": "verified by a checksum",
    r"same data and course": "data order and schedule are unchanged",
    r"not the same bits": "not bit-identical",
    r"had the bits": "bit-identical",
    r"\bupright\b": "tall",
    r"would have been taken": "cheaper_path would have chosen",
    r"newest sound one": "newest intact checkpoint",
    r"holds no sound": "all checkpoints are damaged",
    r"ended at once": "ended immediately",
    r"run starts afresh": "starts from the beginning",
    r"own message says why": "see its error message",
    r"copy it anew": "copy it again",
    r"[Ll]ikeliest": "most likely",
    r"[Ww]hat became of": "the result of",
    r"[Tt]aken? apart|[Tt]akes apart": "decomposed",
    r"\bas ever\b": "the default",
    r"is no number": "is not a number",
    r"[Nn]umbers that are not finite": "non-finite numbers",
    r"in the midst of": "during",
    r"[Aa]gain and again": "periodically",
    r"holds something already": "exists and is not an empty folder",
}
# Ways of beginning a docstring that leave out its noun.
RIDDLES = re.compile(r"^(Those of|That of|The same as|Then |It |What of)\b")


@pytest.mark.parametrize("phrase", PRIVATE_PHRASES)
def test_private_phrases_are_replaced_by_plain_ones(phrase):
    pattern = re.compile(phrase.replace(" ", r"\s+"))
    places = [str(path.relative_to(ROOT)) for path in TEXTS if pattern.search(path.read_text(encoding="utf-8"))]
    assert not places, f"write {PRIVATE_PHRASES[phrase]!r} instead"


def public_docstrings(path: Path) -> dict[str, str | None]:
    """Docstrings of a module and of its public classes and functions, by name; None where one is missing."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    definitions = [node for node in module.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    docstrings = {node.name: ast.get_docstring(node) for node in definitions if not node.name.startswith("_")}
    return {"the module": ast.get_docstring(module), **docstrings}


@pytest.mark.parametrize("path", [path for path in CODE if path.read_text(encoding="utf-8").strip()], ids=lambda path: path.name)
def test_public_definitions_have_docstrings_that_begin_with_a_sentence(path):
    for name, docstring in public_docstrings(path).items():
        assert docstring, f"{name} has no docstring"
        if re.fullmatch(r"[a-z, ]+", docstring):
            continue  # the title of a group of flags in --help
        first = docstring.split("\n\n")[0]
        assert re.search(r"[.!:](\s|$)", first), f"{name}: the first paragraph of its docstring has no end of a sentence"
        assert not RIDDLES.match(first), f"{name}: {first.splitlines()[0]!r} does not name what it describes"
