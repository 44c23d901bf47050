"""What README.md and docs/ name is there: links, flags, files, and command lines that parse."""

import argparse
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_pretraining.__main__ import COMMANDS
from peft_pretraining.config.command_line import build_parser

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("sparse_lora", "peft_pretraining", "configs", "scripts", "tests", "docs", "benchmarks", ".ci")

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^()\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--([a-zA-Z][\w-]*)")
REPOSITORY_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[^\s`'\"(),;:|]*")
# A path below one of the packages, such as data/source.py, or a bare name, such as memory.py.
SOURCE_FILE = re.compile(r"(?<![\w./*<-])\w[\w./-]*\.(?:py|sh)(?![\w*])")
PLACEHOLDER = re.compile(r"[<>{}$…]|\.\.\.")

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def prose(text: str) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", text)


def code(text: str) -> list[str]:
    """Inline code, and code blocks of a shell or of no language (the annotated tree)."""
    blocks = [block for language, block in FENCE.findall(text) if language in ("bash", "")]
    return INLINE_CODE.findall(prose(text)) + blocks


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Option strings of a parser and of the commands below it."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """One parser for each `python -m peft_pretraining COMMAND`."""
    parsers = {}
    for name, module in COMMANDS.items():
        parsers[name] = argparse.ArgumentParser(prog=name, allow_abbrev=False)
        module.add_arguments(parsers[name])
    return parsers


def torchrun_options() -> set[str]:
    from torch.distributed.run import get_args_parser

    return set(options(get_args_parser()))


@functools.cache
def known_flags() -> set[str]:
    """Flags of the program, of its commands, of the scripts and benchmarks, of torchrun, and what the scripts know of Slurm's."""
    flags = set(options(build_parser())) | torchrun_options()
    for parser in command_parsers().values():
        flags.update(options(parser))
    for script in (ROOT / "scripts").glob("*.sh"):
        flags.update(re.findall(r'"(--[\w-]+)" \]', script.read_text(encoding="utf-8")))  # [ "$1" = "--full" ]
    for line in (ROOT / "scripts" / "cluster" / "slurm.sh").read_text(encoding="utf-8").splitlines():
        if "sbatch" in line.lower():
            flags.update(re.findall(r"(--[a-z-]+)", line))  # Slurm's own
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        flags.update(re.findall(r'add_argument\(\s*"(--[\w-]+)"', benchmark.read_text(encoding="utf-8")))
    return flags


def heading_anchors(path: Path) -> set[str]:
    """Anchors that a Markdown viewer makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def command_lines(text: str) -> list[list[str]]:
    """The words of every command in the shell blocks: continued lines joined, comments and redirections left out."""
    commands = []
    for language, block in FENCE.findall(text):
        if language != "bash":
            continue
        block = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            end = next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))
            commands.append(words[:end])
    return commands


@every_document
def test_no_placeholder_is_left(path):
    assert "@@" not in path.read_text(encoding="utf-8")


@every_document
def test_relative_links_lead_somewhere(path):
    """To a file of the repository and, where the link names one, to a heading in it."""
    broken = []
    for target in LINK.findall(prose(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in heading_anchors(file)):
            broken.append(target)
    assert not broken


@every_document
def test_every_flag_exists(path):
    named = {f"--{name}" for name in FLAG.findall(path.read_text(encoding="utf-8"))}
    assert not named - known_flags()


@every_document
def test_every_repository_path_exists(path):
    missing = []
    for text in code(path.read_text(encoding="utf-8")):
        for name in REPOSITORY_PATH.findall(text):
            if not PLACEHOLDER.search(name) and not any(ROOT.glob(name.rstrip("./"))):
                missing.append(name)
        for name in SOURCE_FILE.findall(text):
            if not (ROOT / name).exists() and not any(any((ROOT / folder).rglob(name)) for folder in FOLDERS):
                missing.append(name)
    assert not missing


@every_document
def test_commands_of_the_program_parse(path):
    """Flags and kinds of values; whether the files that they name exist is asked elsewhere."""
    for words in command_lines(path.read_text(encoding="utf-8")):
        if "torchrun_main.py" in words:
            own = words[words.index("torchrun_main.py") + 1 :]
            _, unknown = build_parser().parse_known_args(own)
            assert not unknown
        elif words[1:3] == ["-m", "peft_pretraining"]:
            _, unknown = command_parsers()[words[3]].parse_known_args(words[4:])
            assert not unknown


def test_the_checks_find_what_is_wrong(tmp_path):
    """Each pattern sees the thing it is there for, so that a silent test means something."""
    text = "See [x](y.md) and `scripts/none.sh --no_such`.\n```bash\npython a.py \\\n  --b  # c\n```\n"
    assert LINK.findall(prose(text)) == ["y.md"]
    assert FLAG.findall(text) == ["no_such", "b"]
    assert [REPOSITORY_PATH.findall(part) for part in code(text)] == [["scripts/none.sh"], []]
    assert command_lines(text) == [["python", "a.py", "--b"]]
    assert "--sp_ratio" in known_flags()
    assert "--max_new_tokens" in known_flags()
    assert "--no_such" not in known_flags()
    (tmp_path / "x.md").write_text("## A look inside: `all`\n")
    assert heading_anchors(tmp_path / "x.md") == {"a-look-inside-all"}
