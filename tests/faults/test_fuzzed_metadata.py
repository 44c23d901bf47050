"""Arbitrary contents of a checkpoint's metadata files give a message or are accepted, and never raise an unexpected error."""

import contextlib
import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from resealing import reseal

import torchrun_main
from peft_pretraining.checkpoint.step_folder import CheckpointError, list_checkpoints
from peft_pretraining.config.arguments import Arguments, ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.model_config import ModelConfigError
from peft_pretraining.distributed.world import World
from peft_pretraining.export.load import load_model
from peft_pretraining.plan.plan import Plan, make_plan
from peft_pretraining.run.build import build_data, build_token_loss, build_updates
from peft_pretraining.run.folder import check_same_data, open_run_folder
from peft_pretraining.run.resume import RunParts, finished_state, restore_data, restore_run
from peft_pretraining.training.update import TrainState

CPU = torch.device("cpu")
REFUSED = (CheckpointError, ConfigError, ModelConfigError)
limited = settings(max_examples=40, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))


@dataclass
class Case:
    """A run with one checkpoint, and freshly built parts to restore it into."""

    args: Arguments
    plan: Plan
    parts: RunParts
    source: object
    held_out: object
    checkpoint: Path
    original: Path

    def restored(self) -> Path:
        """Undoes all changes of the checkpoint; returns its folder."""
        shutil.rmtree(self.checkpoint)
        shutil.copytree(self.original, self.checkpoint)
        return self.checkpoint

    def resume(self) -> None:
        """Reads everything that a resumed run reads from the checkpoint."""
        folder = open_run_folder(self.args, self.plan, World())
        finished_state(folder.path, folder.checkpoint, self.args, self.plan)
        check_same_data(folder.checkpoint, self.args, self.source, self.held_out)
        restore_data(folder.checkpoint, self.parts.loader)
        restore_run(folder.checkpoint, self.parts, World())


@pytest.fixture(scope="module")
def case(tmp_path_factory, tiny_run) -> Case:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("fuzzed")
    flags = [*tiny_run, "--num_training_steps", "2", "--warmup_steps", "1", "--batch_size", "2", "--max_length", "32"]
    flags += ["--peft_model", "sltrain", "--rank", "4", "--sp_ratio", "0.1", "--optimizer", "adam8bit"]
    flags += ["--device", "cpu", "--dtype", "float32", "--workers", "0", "--wandb", "disabled"]
    flags += ["--save_dir", str(folder / "run")]
    assert torchrun_main.main(flags) == 0
    args = parse_args(flags)
    plan = make_plan(args, World())
    data = build_data(args, plan, World(), CPU)
    model = build_token_loss(args, plan, World(), CPU).model
    parts = RunParts(model, build_updates(args, model, World(), CPU), data.loader, TrainState())
    (path,) = list_checkpoints(folder / "run")
    shutil.copytree(path, folder / "original")
    return Case(args, plan, parts, data.source, data.held_out, path, folder / "original")


def places(value, path=()):
    """Yields the path (keys and indices) of every value in a JSON document."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


REMOVED = object()
scalars = st.none() | st.booleans() | st.integers() | st.sampled_from([2**63, -1, 1e308, float("nan"), "", "../../x", "9" * 30])
json_values = st.recursive(
    scalars | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def changed(document, path, value):
    if not path:
        return value
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if value is REMOVED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


def check(case: Case) -> None:
    """Resumes from the checkpoint and loads its model; only the expected errors are allowed."""
    for read in (case.resume, lambda: load_model(case.checkpoint, CPU)):
        with contextlib.suppress(*REFUSED):
            read()


@limited
@given(data=st.data(), name=st.sampled_from(["state.json", "run.json"]))
def test_changed_json_values_with_valid_checksums_are_accepted_or_refused(case, data, name):
    file = case.restored() / name
    document = json.loads(file.read_text())
    path = data.draw(st.sampled_from(list(places(document))))
    value = data.draw(json_values | (st.just(REMOVED) if path else st.nothing()))
    file.write_text(json.dumps(changed(document, path, value)))
    reseal(case.checkpoint)
    check(case)


def test_a_list_in_place_of_any_recorded_argument_is_accepted_or_refused(case):
    """Lists cannot be looked up in tables of names."""
    document = json.loads((case.restored() / "run.json").read_text())
    for name in document["arguments"]:
        (case.restored() / "run.json").write_text(json.dumps(changed(document, ("arguments", name), [])))
        reseal(case.checkpoint)
        with contextlib.suppress(*REFUSED):
            case.resume()


@limited
@given(
    name=st.sampled_from(["state.json", "run.json", "config.json", "manifest.json", "tensors/.metadata"]),
    where=st.floats(0, 1, exclude_max=True),
    change=st.one_of(st.binary(max_size=8), st.sampled_from([b"[" * 50_000, b"\xff\xfe", b"\0" * 100])),
    length=st.integers(0, 8),
    resealed=st.booleans(),
)
def test_changed_bytes_are_accepted_or_refused(case, name, where, change, length, resealed):
    """Some bytes of a file are replaced by others, fewer or more; with and without recomputed checksums."""
    file = case.restored() / name
    content = file.read_bytes()
    start = int(where * len(content))
    file.write_bytes(content[:start] + change + content[start + length :])
    if resealed and name != "manifest.json":
        reseal(case.checkpoint)
        check(case)
    elif file.read_bytes() != content:
        with pytest.raises(CheckpointError, match=r"damaged: (.*/)?" + name.replace(".", r"\.")):
            case.resume()


@pytest.mark.parametrize("numbers", [[], [[]], {}])
def test_a_lane_without_its_numbers_is_refused(case, numbers):
    file = case.restored() / "state.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), ("data", "lanes", "0"), numbers)))
    reseal(case.checkpoint)
    with pytest.raises(CheckpointError, match="data position cannot be restored"):
        case.resume()
