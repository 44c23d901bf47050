"""Copies and links of checkpoints under any name: a run goes on from each, counts updates, and never begins again by itself."""

import json
import os
import shutil
from pathlib import Path

import pytest
from outcomes import record, tensors_of
from tiny_runs import flags_of

import torchrun_main
from peft_pretraining.checkpoint.step_folder import list_checkpoints

NAMES = ["step_00000002", "step_00000004", "step_00000006", "step_00000008"]


@pytest.fixture(scope="module")
def flags(tiny_run) -> list[str]:
    return [*flags_of("lowrank", tiny_run), "--save_every", "2", "--eval_every", "4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, flags) -> Path:
    """A run of 8 updates with four checkpoints; tests change copies of it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert torchrun_main.main([*flags, "--save_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(tmp_path, finished) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def copy_called_best(run):
    shutil.copytree(run / NAMES[1], run / "best")
    return run / "best", [NAMES[0], "best", NAMES[1]]


def copy_whose_original_is_gone(run):
    (run / NAMES[1]).rename(run / "z-best")
    return run / "z-best", [NAMES[0], "z-best"]


def link_called_latest(run):
    (run / "latest").symlink_to(NAMES[1])
    return run / "latest", NAMES[:2]


def link_from_elsewhere(run):
    (run.parent / "zzz").symlink_to(run / NAMES[1])
    return run.parent / "zzz", NAMES[:2]


def link_to_the_run(run):
    (run.parent / "current").symlink_to("run")
    return run.parent / "current" / NAMES[1], NAMES[:2]


def moved_to_another_disk(run):
    (run / NAMES[1]).rename(run.parent / "moved")
    (run / NAMES[1]).symlink_to("../moved")
    return run / NAMES[1], NAMES[:2]


CASES = [copy_called_best, copy_whose_original_is_gone, link_called_latest]
CASES += [link_from_elsewhere, link_to_the_run, moved_to_another_disk]


@pytest.mark.parametrize("case", CASES)
def test_going_back_to_any_name_keeps_earlier_checkpoints_and_goes_on_from_it(run, flags, finished, monkeypatch, case, capsys):
    """Only later ones are set aside; killed before its first save, the same command without the name goes on from there."""
    path, left = case(run)
    command = [*flags, "--save_dir", str(run)]
    # A kill after the first update: nothing is saved, and no handler runs.
    with monkeypatch.context() as patch:
        patch.setattr("torchrun_main.loop", lambda *_: (_ for _ in ()).throw(SystemExit(9)))
        with pytest.raises(SystemExit):
            torchrun_main.main([*command, "--continue_from", str(path)])
    assert names(run) == left
    assert names(run / "set_aside") == NAMES[2:]
    assert record(run)[-1]["update_step"] == 4
    assert record_of_old(run)[-1]["update_step"] == 8
    capsys.readouterr()
    assert torchrun_main.main(command) == 0
    assert record(run) == record(finished)
    expected = tensors_of(finished)
    assert all(tensor.equal(expected[name]) for name, tensor in tensors_of(run / NAMES[3]).items())
    assert (path / "state.json").exists()


def record_of_old(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.old-1.jsonl").read_text().splitlines()]


def test_a_copy_is_gone_on_from_where_nothing_else_is_left(run, flags, finished, monkeypatch):
    """Under the id at wandb that the environment asks for."""
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    (run / NAMES[2]).rename(run / "best")
    for name in (NAMES[0], NAMES[1], NAMES[3]):
        shutil.rmtree(run / name)
    assert torchrun_main.main([*flags, "--save_dir", str(run)]) == 0
    assert record(run) == record(finished)
    assert names(run) == ["best", NAMES[3]]
    assert json.loads((run / "run.json").read_text())["wandb_id"] == "mine"


def all_set_aside(run):
    (run / "set_aside").mkdir()
    for name in NAMES:
        (run / name).rename(run / "set_aside" / name)
    return f"--continue_from {run / 'set_aside' / NAMES[3]}"


def disk_that_is_not_mounted(run):
    for name in NAMES:
        shutil.rmtree(run / name)
        (run / name).symlink_to(f"/no/such/disk/{name}")
    return "step_00000002 is a link to /no/such/disk/step_00000002, which does not exist"


def half_a_copy(run):
    shutil.copytree(run / NAMES[3], run / "best")
    (run / "best" / "state.json").unlink()
    for name in NAMES:
        shutil.rmtree(run / name)
    return "best is damaged: state.json is missing"


@pytest.mark.parametrize("case", [all_set_aside, disk_that_is_not_mounted, half_a_copy])
def test_a_run_whose_checkpoints_are_out_of_reach_does_not_begin_again(run, flags, case, capsys):
    words = case(run)
    before = (run / "metrics.jsonl").read_bytes()
    assert torchrun_main.main([*flags, "--save_dir", str(run)]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "--resume never" in message
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_was_set_aside_is_gone_on_from(run, flags, finished):
    all_set_aside(run)
    path = run / "set_aside" / NAMES[2]
    assert torchrun_main.main([*flags, "--save_dir", str(run), "--continue_from", str(path)]) == 0
    assert names(run) == [NAMES[3]]
    assert names(run / "set_aside") == NAMES


def test_a_link_into_another_run_starts_a_run_of_its_own(run, flags, finished):
    """It gets the record up to there, and its own id at wandb; nothing of the other run is touched."""
    branch = run.parent / "branch"
    branch.mkdir()
    (branch / "start").symlink_to(run / NAMES[1])
    (branch / "metrics.jsonl").write_text("of a run that never saved\n")
    assert torchrun_main.main([*flags, "--save_dir", str(branch), "--continue_from", str(branch / "start")]) == 0
    assert record(branch) == record(finished)
    assert (branch / "metrics.old-1.jsonl").read_text() == "of a run that never saved\n"
    assert names(run) == NAMES
    ids = [json.loads((folder / "run.json").read_text())["wandb_id"] for folder in (run, branch)]
    assert ids[0] != ids[1]


def test_retention_counts_and_removes_only_what_runs_saved(run, flags):
    shutil.copytree(run / NAMES[0], run / "best")
    shutil.copytree(run / NAMES[0], run.parent / "moved")
    (run / NAMES[0]).rename(run.parent / "gone")
    (run / NAMES[0]).symlink_to("../moved")
    shutil.rmtree(run / NAMES[3])
    assert torchrun_main.main([*flags, "--save_dir", str(run), "--keep_checkpoints", "2"]) == 0
    assert names(run) == ["best", NAMES[0], *NAMES[2:]]
    assert (run.parent / "moved" / "state.json").exists()
    assert not [name for name in os.listdir(run) if name.startswith(".")]
