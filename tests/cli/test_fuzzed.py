"""Arbitrary command lines and model files give a plan, or a message that names the problem."""

import json
import string
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import TINY_MODEL

from peft_pretraining.config.arguments import ROWS, ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.model_config import ModelConfigError, load_model_config
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in ROWS if name != "config"]
NUMBERS = ["0", "1", "-1", "3", "2.5", "-0.0", "1e-9", "1e308", "1e999", "nan", "inf", "9" * 30, "150M", "1.1B", "0x10"]
WORDS = [
    "",
    " ",
    "sltrain",
    "galore",
    "galore_adamw",
    "relora",
    "svd",
    "adam8bit",
    "cosine",
    "c4",
    "demo",
    "true",
    "false",
    "null",
    "auto",
    "cpu",
    "../..",
    "\0x",
    "é",
]
VALID_NUMBERS = ["1", "2", "0.5"]
VALUES = st.one_of(st.sampled_from(NUMBERS + WORDS), st.text(string.printable, max_size=8))


def flags_with_values(name):
    """A flag with no value, an odd one, or one that is right for it alone: a choice of its own."""
    own = st.sampled_from(list(ROWS[name].choices or VALID_NUMBERS))
    return st.tuples(st.just(name), st.one_of(st.none(), VALUES, own))


FLAGS = st.lists(st.sampled_from(NAMES).flatmap(flags_with_values), max_size=5)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True)


def test_any_command_line_gives_a_plan_or_a_message():
    # Without further flags the line gives a plan, so that the lines below are refused for their own flags alone.
    started_from = ["--model_config", str(ROOT / "configs" / "llama_9m.json"), "--batch_size", "1"]
    assert problems_of(started_from) == []

    @QUICK
    @given(FLAGS)
    def check(flags):
        argv = list(started_from)
        for name, value in flags:
            argv += [f"--{name}"] if value is None else [f"--{name}", value]
        assert all(problem.strip() for problem in problems_of(argv))

    check()


def problems_of(argv: list[str]) -> list[str]:
    """Returns the problems of a command line; [] if it gives a plan."""
    try:
        make_plan(parse_args(argv), World())
    except ConfigError as error:
        return list(error.problems)
    return []


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)
CHANGES = st.dictionaries(st.one_of(st.sampled_from(sorted(TINY_MODEL)), st.text(max_size=12)), JSON, max_size=3)


@QUICK
@given(CHANGES, st.lists(st.sampled_from(sorted(TINY_MODEL)), max_size=2))
def test_any_change_of_a_model_file_gives_a_model_or_a_message(tmp_path, changes, removed):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({k: v for k, v in (TINY_MODEL | changes).items() if k not in removed}))
    assert_plan_or_message(path)


@QUICK
@given(st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_bytes_as_a_model_file_give_a_message(tmp_path, content):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    assert_plan_or_message(path)


def assert_plan_or_message(path: Path) -> None:
    """The file is refused with a message that names it, or a command line with it gives a plan or problems."""
    message = ""
    try:
        load_model_config(path)
    except ModelConfigError as error:
        message = str(error)
    if message:
        assert str(path) in message
    else:
        problems_of(["--model_config", str(path), "--max_length", "16", "--batch_size", "1"])
