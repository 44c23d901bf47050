"""Checkpoints are complete or absent, bit-identical, refused with a reason if they do not fit, and cannot run code."""

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
