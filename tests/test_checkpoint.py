"""Checkpoints are whole or absent, keep every bit, fit or say why not, and cannot run code."""

import os
import pickle

import pytest
import torch

from peft_pretraining.checkpoint import (
    CheckpointError,
    Content,
    list_checkpoints,
    load_tensors,
    resolve,
    save_checkpoint,
    tensor_index,
)
from peft_pretraining.distributed import World

TENSORS = {
    "model/a": torch.randn(5, 3),
    "model/b": torch.randn(3).bfloat16(),
    "optimizer/a/step": torch.tensor(3.0),
    "optimizer/a/state1": torch.arange(9, dtype=torch.uint8),
    "model/index": torch.arange(4, dtype=torch.int32),
}


def save(folder, step=7, **more):
    return save_checkpoint(folder, Content(step, TENSORS, {"state.json": {"step": step}}), World(), **more)


def test_every_bit_comes_back(tmp_path):
    path = save(tmp_path)
    back = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    load_tensors(path, back)
    assert all(torch.equal(back[name], tensor) for name, tensor in TENSORS.items())
    assert tensor_index(path) == {name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}


def test_half_written_checkpoint_does_not_exist(tmp_path, monkeypatch):
    """A failure at the last moment, before the rename, leaves the older checkpoint and no new one."""
    old = save(tmp_path, step=1)

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_pretraining.checkpoint._replace", broken)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, step=2)
    assert list_checkpoints(tmp_path) == [old]
    assert resolve(tmp_path) == old


def test_full_disk_is_an_error_that_can_be_caught(tmp_path, monkeypatch):
    """torch raises something that `except Exception` does not see."""
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


def test_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no checkpoint and holds none"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"model/a": torch.zeros(5, 4)}, "model/a is .5, 3. torch.float32 there and .5, 4."),
        ({"model/b": torch.zeros(3)}, "model/b is .3,. torch.bfloat16 there and .3,. torch.float32 here"),
        ({"model/c": torch.zeros(3)}, "model/c is missing"),
    ],
)
def test_checkpoint_of_another_model_is_refused_by_name(tmp_path, wanted, words):
    path = save(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        load_tensors(path, wanted)


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_index_of_a_stranger_cannot_run_code(tmp_path):
    path = save(tmp_path)
    bomb = _RunsCode()
    bomb.target = str(tmp_path / "it-ran")
    (path / "tensors" / ".metadata").write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match="not the index of a checkpoint"):
        tensor_index(path)
    assert not (tmp_path / "it-ran").exists()
