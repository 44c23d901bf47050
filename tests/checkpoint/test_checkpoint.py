"""Checkpoints are complete or absent, bit-identical, refused with a reason if they do not fit, and cannot run code."""

import json
import os
import pickle
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from resealing import reseal
from torch.distributed.checkpoint import metadata

from peft_pretraining.checkpoint.step_folder import (
    CheckpointError,
    Content,
    list_checkpoints,
    load_tensors,
    recover_replaced,
    resolve,
    save_checkpoint,
    tensor_index,
    write_json,
)
from peft_pretraining.checkpoint.tensor_store import _HashingFile as HashingFile
from peft_pretraining.distributed.world import World

TENSORS = {
    "model/a": torch.randn(5, 3),
    "model/b": torch.randn(3).bfloat16(),
    "optimizer/a/step": torch.tensor(3.0),
    "optimizer/a/state1": torch.arange(9, dtype=torch.uint8),
    "model/index": torch.arange(4, dtype=torch.int32),
}


def save(folder, step=7, **more):
    return save_checkpoint(folder, Content(step, TENSORS, {"state.json": {"step": step}}), World(), **more)


def test_tensors_are_restored_bit_identically(tmp_path):
    path = save(tmp_path)
    back = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    load_tensors(path, back)
    assert all(torch.equal(back[name], tensor) for name, tensor in TENSORS.items())
    assert tensor_index(path) == {name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}


def test_a_failed_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    """A failure just before the rename leaves the older checkpoint and no new one."""
    old = save(tmp_path, step=1)

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_pretraining.checkpoint.step_folder._replace", broken)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, step=2)
    assert list_checkpoints(tmp_path) == [old]
    assert resolve(tmp_path) == old


def test_a_full_disk_raises_oserror(tmp_path, monkeypatch):
    """torch raises an error that is not an Exception."""
    old = save(tmp_path, step=1)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"step_00000002 could not be saved.*No space left"):
        save(tmp_path, step=2)
    assert list_checkpoints(tmp_path) == [old]


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbled"])
def test_damaged_tensor_files_are_refused(tmp_path, damage):
    path = save(tmp_path)
    (file,) = (path / "tensors").glob("*.distcp")
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 3] if damage == "truncated" else b"x" * len(content))
    with pytest.raises(CheckpointError, match="its tensors cannot be read"):
        load_tensors(path, {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path)
    assert list_checkpoints(tmp_path) == [save(tmp_path)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000007"]


def test_retention_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step=step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]


def test_retention_keeps_multiples_for_good(tmp_path):
    """Where the multiple itself has no checkpoint, because its save had to wait, the next one is kept: 41 here."""
    for step in (10, 19, 20, 25, 30, 39, 41, 42, 51, 52, 53):
        folder = save(tmp_path, step=step, keep=2, keep_every=20)
    assert [path.name[-2:] for path in list_checkpoints(tmp_path)] == ["20", "41", "52", "53"]
    assert folder.name == "step_00000053"


def test_checkpoints_are_listed_by_updates_whatever_they_are_called(tmp_path):
    """And nothing else is: what a save, a removal or a copy left incomplete, links within the folder, and other folders."""
    run = tmp_path / "run"
    run.mkdir()
    for name, step in {"z-first": 1, "best": 5, "a-copy": 30, "step_00000005": 5}.items():
        save(tmp_path, step).rename(run / name)
        (run / name / "state.json").write_text(json.dumps({"train": {"update_step": step}}))
    save(run, step=9)
    shutil.copytree(run / "best", run / "half-copied", ignore=shutil.ignore_patterns("state.json"))
    shutil.copytree(run / "a-copy", run / ".partial-step_00000031")
    shutil.copytree(run / "a-copy", run / "set_aside" / "step_00000030")
    (run / "latest").symlink_to("a-copy")
    (run / "undone").symlink_to("set_aside/step_00000030")
    (run / "gone").symlink_to("step_00000099")
    save(tmp_path, step=12)
    (run / "linked").symlink_to("../step_00000012")
    for name in ("tokenizer", "wandb", "nonfinite", "an-export"):
        (run / name).mkdir()
    (run / "an-export" / "manifest.json").write_text("{}")
    names = [path.name for path in list_checkpoints(run)]
    assert names == ["half-copied", "z-first", "best", "step_00000005", "step_00000009", "linked", "a-copy"]


@pytest.fixture
def done(monkeypatch):
    """What was flushed to disk (inodes) and renamed (new names), in order."""
    done = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(handle):
        done.append(os.fstat(handle).st_ino)
        fsync(handle)

    def noted_rename(source, target, **more):
        done.append(f"rename to {os.path.basename(target)}")
        rename(source, target, **more)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    return done


def test_every_file_and_folder_is_on_disk_before_the_checkpoint_gets_its_name(tmp_path, done):
    """A power failure at any moment leaves the whole checkpoint or none: the order of fsync and rename is what ensures it."""
    (tmp_path / "tokenizer" / "inner").mkdir(parents=True)
    for name in ("words.json", "inner/merges.txt"):
        (tmp_path / "tokenizer" / name).write_text("[]")
    content = Content(7, TENSORS, {"state.json": {}, "run.json": {}}, {"tokenizer": tmp_path / "tokenizer"})
    path = save_checkpoint(tmp_path / "new" / "run", content, World())
    named = done.index("rename to step_00000007")
    inside = [path, *path.rglob("*")]
    assert len(inside) == 1 + 3 + 7  # the folder, three in it, and seven files
    assert [str(entry) for entry in inside if entry.stat().st_ino not in done[:named]] == []
    # The entries of the new names: of the checkpoint in the run's folder, and of that folder and its parent in theirs.
    assert path.parent.stat().st_ino in done[named:]
    assert {tmp_path.stat().st_ino, (tmp_path / "new").stat().st_ino} <= set(done)
    # A folder after its last entry was made.
    assert done.index(path.stat().st_ino) > max(done.index(entry.stat().st_ino) for entry in path.iterdir() if entry.is_file())


def test_a_json_file_is_on_disk_before_and_after_it_gets_its_name(tmp_path, done):
    write_json(tmp_path / "run.json", {"a": 1})
    assert done == [(tmp_path / "run.json").stat().st_ino, "rename to run.json", tmp_path.stat().st_ino]


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint and contains none"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"model/a": torch.zeros(5, 4)}, "model/a is .5, 3. torch.float32 in the checkpoint and .5, 4."),
        ({"model/b": torch.zeros(3)}, "model/b is .3,. torch.bfloat16 in the checkpoint and .3,. torch.float32 in the model"),
        ({"model/c": torch.zeros(3)}, "model/c is missing"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_named(tmp_path, wanted, words):
    path = save(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        load_tensors(path, wanted)


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_an_index_cannot_run_code(tmp_path):
    path = save(tmp_path)
    bomb = _RunsCode()
    bomb.target = str(tmp_path / "it-ran")
    (path / "tensors" / ".metadata").write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match="not the index of a checkpoint"):
        tensor_index(path)
    assert not (tmp_path / "it-ran").exists()


class _ByGetattr:
    """Pickled as a call of getattr, as Python before 3.11.4 pickles members of an enumeration."""

    def __init__(self, owner, name):
        self.arguments = (owner, name)

    def __reduce__(self):
        return getattr, self.arguments


def test_a_checkpoint_of_an_older_python_is_read(tmp_path, monkeypatch):
    kind = metadata._MEM_FORMAT_ENCODING
    with monkeypatch.context() as patch:
        patch.setattr(kind, "__reduce_ex__", lambda member, protocol: (getattr, (kind, member.name)))
        path = save(tmp_path)
    assert b"getattr" in (path / "tensors" / ".metadata").read_bytes()
    back = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    load_tensors(path, back)
    assert all(torch.equal(back[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("owner", "name"), [(metadata.TensorProperties, "__init__"), (metadata._MEM_FORMAT_ENCODING, "__class__")]
)
def test_an_index_cannot_read_other_attributes(tmp_path, owner, name):
    path = save(tmp_path)
    (path / "tensors" / ".metadata").write_bytes(pickle.dumps(_ByGetattr(owner, name)))
    with pytest.raises(CheckpointError, match=r"getattr\(.*is not allowed in a checkpoint's index"):
        tensor_index(path)


def damage(path, how):
    """Flips a bit of a file, truncates it or deletes it."""
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[:-1])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def files_of(path):
    return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_detected_and_the_previous_checkpoint_used(tmp_path, capsys, how):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "words.json").write_text("[]")
    content = Content(1, TENSORS, {"state.json": {}, "run.json": {}}, {"tokenizer": tmp_path / "tokenizer"})
    run = tmp_path / "run"
    old = save_checkpoint(run, content, World())
    new = save_checkpoint(run, replace(content, step=2), World())
    shutil.copytree(new, tmp_path / "whole")
    names = files_of(new)
    expected = [
        "state.json",
        "run.json",
        "manifest.json",
        "tensors/.metadata",
        "tensors/__0_0.distcp",
        "tokenizer/words.json",
    ]
    assert sorted(map(str, names)) == sorted(expected)
    for name in names:
        damage(new / name, how)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(new))} is damaged: {re.escape(str(name))}"):
            resolve(new)
        capsys.readouterr()
        assert resolve(run) == old
        message = capsys.readouterr().err
        assert f"step_00000002 is damaged: {name}" in message
        assert "using step_00000001, the newest intact checkpoint" in message
        shutil.rmtree(new)
        shutil.copytree(tmp_path / "whole", new)
    assert resolve(run) == new


def test_an_error_names_the_damage_of_all_checkpoints(tmp_path):
    for step in (1, 2):
        damage(save(tmp_path, step=step) / "state.json", "flip")
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged.*step_00000002 is damaged.*step_00000001 is damaged"):
        resolve(tmp_path)


def test_a_checkpoint_that_fails_verification_is_not_kept(tmp_path, monkeypatch):
    """Simulates a disk that changes data between writing and reading."""
    old = save(tmp_path, step=1)
    write = HashingFile.write

    def lossy(self, content):
        write(self, content)
        self._file.flush()
        with open(self._file.name, "r+b") as file:
            file.write(b"?")
        return len(content)

    monkeypatch.setattr(HashingFile, "write", lossy)
    with pytest.raises(OSError, match="step_00000002 could not be saved: verification after writing failed: tensors/"):
        save(tmp_path, step=2)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]


def test_too_little_disk_space_is_detected_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    monkeypatch.setattr(dcp, "save", lambda *_, **__: pytest.fail("the checkpoint was written"))
    with pytest.raises(OSError, match=r"no space: a checkpoint takes about [\d,]+ bytes, and 100 are free"):
        save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target_is_there", [True, False])
def test_a_crash_while_a_checkpoint_is_replaced_loses_neither(tmp_path, target_is_there):
    path = save(tmp_path)
    aside = tmp_path / ".old-step_00000007"
    (shutil.copytree if target_is_there else shutil.move)(path, aside)
    recover_replaced(tmp_path)
    assert resolve(tmp_path) == path
    save(tmp_path, step=8)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_00000007", "step_00000008"]


def test_remains_of_crashes_are_removed_by_the_next_save(tmp_path):
    for name in (".partial-step_00000003", ".removed-step_00000001"):
        (tmp_path / name / "tensors").mkdir(parents=True)
    save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def crafted(path, change):
    """Changes a checkpoint's index and recomputes the checksums, as an attacker could."""
    index = path / "tensors" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))
    reseal(path)


@pytest.mark.parametrize("name", ["../../secret", "/secret", "sub/__0_0.distcp", "..", "", "__0_0.distcp\0", 3])
def test_an_index_that_names_files_outside_is_refused(tmp_path, name):
    path = save(tmp_path)

    def elsewhere(metadata):
        for place in metadata.storage_data.values():
            place.relative_path = name

    crafted(path, elsewhere)
    for read in (lambda: tensor_index(path), lambda: load_tensors(path, {"model/a": torch.zeros(5, 3)})):
        with pytest.raises(CheckpointError, match="which is not a tensor file of this checkpoint"):
            read()


def test_a_tensor_file_that_is_a_link_is_refused(tmp_path):
    """The reader refuses it even without verifying checksums."""
    path = save(tmp_path)
    file = path / "tensors" / "__0_0.distcp"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        tensor_index(path)


def _huge(metadata):
    metadata.state_dict_metadata["model/a"].size = torch.Size([2**40])


def _backwards(metadata):
    next(iter(metadata.storage_data.values())).offset = -5


def _beyond(metadata):
    next(iter(metadata.storage_data.values())).length = 2**40


def _transformed(metadata):
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]


def _without_dtype(metadata):
    metadata.state_dict_metadata["model/a"].properties.dtype = None


def _no_places(metadata):
    metadata.storage_data = None


@pytest.mark.parametrize("change", [_huge, _backwards, _beyond, _transformed, _without_dtype, _no_places])
def test_an_impossible_index_is_refused_before_memory_is_allocated(tmp_path, change):
    path = save(tmp_path)
    crafted(path, change)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        tensor_index(path)
