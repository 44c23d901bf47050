"""Every --help of the program answers, and without a command the commands are listed."""

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrun_main
from peft_pretraining.__main__ import COMMANDS, build_parser
from peft_pretraining.__main__ import main as command

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "ArgumentParser(" in path.read_text(encoding="utf-8"))


def children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's sub-commands, by name."""
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(choices[0]) if choices else {}


def parsers(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and sub-command, the program itself first."""
    yield words
    for name, child in children(parser).items():
        yield from parsers(child, (*words, name))


def help_of(run, words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        run([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", list(parsers(build_parser())), ids=" ".join)
def test_every_help_of_every_command_is_printed(words, capsys):
    text = help_of(command, list(words), capsys)
    assert "usage: " + " ".join(("python -m peft_pretraining", *words)) in text
    assert "%(" not in text
    assert "%%" not in text


def test_the_help_of_training_is_printed(capsys):
    assert "--model_config" in help_of(torchrun_main.main, [], capsys)


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_every_help_of_a_benchmark_is_printed(path, capsys, monkeypatch):
    """Parsers that are built are formatted; nothing is measured."""
    formatted = []

    def stop(self, args=None, namespace=None):
        formatted.append(self.format_help())
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit):
        module.main()
    assert "usage:" in formatted[0]


def test_without_a_command_the_commands_are_listed(capsys):
    assert command([]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^    {name}\s", listed, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", [name for name, parser in children(build_parser()).items() if children(parser)])
def test_without_an_action_the_actions_are_listed(name, capsys):
    assert command([name]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^    {action}\s", listed, re.MULTILINE) for action in children(children(build_parser())[name]))
