"""Checkpoints: a folder `step_XXXXXXXX` that is complete or absent, never half.

Tensors go into a torch distributed checkpoint (DCP), everything else into JSON files beside it. Written under a temporary
name, flushed to disk, then renamed. This file knows no component: it sees names, tensors and JSON values. Nothing that is
read back can run code: DCP's index is a pickle, so it is read with an unpickler that knows DCP's own classes only.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from peft_pretraining.distributed import World, barrier

_NAME = re.compile(r"step_(\d{8})")
_TENSORS = "tensors"


class CheckpointError(ValueError):
    """A checkpoint that is not there, not whole, or does not fit."""


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return run_folder / f"step_{step:08d}"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not run_folder.is_dir():
        return []
    found = [path for path in run_folder.iterdir() if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=lambda path: path.name)


def is_complete(path: Path) -> bool:
    """True for a folder that holds a checkpoint's index and its state."""
    return (path / _TENSORS / ".metadata").is_file() and (path / "state.json").is_file()


def resolve(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest one in a run's folder. Raises CheckpointError."""
    if is_complete(path):
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path} is no checkpoint and holds none (looked for step_XXXXXXXX folders)")
    return found[-1]


def save_checkpoint(
    run_folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    documents: Mapping[str, Any],
    world: World,
    *,
    folders: Mapping[str, Path] | None = None,
    keep: int | None = None,
) -> Path:
    """Write the checkpoint of `step` atomically; every process calls it.

    Args:
        tensors: by name; a name that several processes give is written once.
        documents: JSON-able values by file name, written by rank 0. Must hold "state.json".
        folders: folders to copy in, by the name they get (the tokenizer).
        keep: how many of the newest checkpoints stay; None keeps all.

    Raises:
        OSError: the disk is full or not writable; what was there before is untouched.
    """
    target = step_folder(run_folder, step)
    partial = run_folder / f".partial-{target.name}"
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier(world)
    writer = dcp.FileSystemWriter(partial / _TENSORS, sync_files=True)
    try:
        with _no_single_process_warning():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=world.size == 1)
    except CheckpointException as error:
        raise OSError(f"{target} could not be saved: {_first_failure(error)}; earlier checkpoints are whole") from None
    if world.is_main:
        for name, value in documents.items():
            write_json(partial / name, value)
        for name, folder in (folders or {}).items():
            shutil.copytree(folder, partial / name)
        _replace(partial, target)
        _remove_old(run_folder, keep)
    barrier(world)
    return target


@contextlib.contextmanager
def _no_single_process_warning() -> Iterator[None]:
    """DCP warns that no process group is there, which is what we ask for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _replace(partial: Path, target: Path) -> None:
    """Rename a finished folder to its name; an older one of that name (a run gone back) makes way."""
    old = target.with_name(f".old-{target.name}")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    partial.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_old(run_folder: Path, keep: int | None) -> None:
    if keep is not None:
        for path in list_checkpoints(run_folder)[:-keep]:
            shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint or run folder. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


class _IndexUnpickler(pickle.Unpickler):
    """Reads DCP's index and nothing else: any other class in the pickle is refused."""

    _ALLOWED = frozenset(
        [
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
                "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
            )),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch._utils", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("pathlib._local", "PosixPath"),
        ]
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class _SafeReader(dcp.FileSystemReader):
    """DCP's reader, with the index read by `_IndexUnpickler`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
        except Exception as error:
            raise CheckpointError(f"{path}: not the index of a checkpoint ({error})") from None
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: not the index of a checkpoint (it holds a {type(metadata).__name__})")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def tensor_index(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint. Raises CheckpointError."""
    metadata = _SafeReader(path / _TENSORS).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the given tensors, in place, from a checkpoint.

    Raises:
        CheckpointError: a tensor is missing or has another shape or dtype (all of them named, up to five), or the files
            cannot be read.
    """
    problems = list(_misfits(tensor_index(path), tensors))
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"{path} does not fit this model: {'; '.join(problems[:5])}{more}")
    try:
        with _no_single_process_warning():
            dcp.load({**tensors}, storage_reader=_SafeReader(path / _TENSORS), no_dist=True)
    except CheckpointError:
        raise
    except CheckpointException as error:
        raise CheckpointError(f"{path}: its tensors cannot be read ({_first_failure(error)})") from None
    except Exception as error:  # DCP raises whatever its files provoke
        raise CheckpointError(f"{path}: its tensors cannot be read ({type(error).__name__}: {error})") from None


def _first_failure(error: CheckpointException) -> str:
    """What went wrong on the first process that failed; torch wraps it up with a stack trace."""
    for failure, _ in error.failures.values():
        return f"{type(failure).__name__}: {failure}"
    return str(error)


def _misfits(index: Mapping[str, tuple[torch.Size, torch.dtype]], tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if name not in index:
            yield f"{name} is missing"
            continue
        size, dtype = index[name]
        if size != tensor.shape or dtype != tensor.dtype:
            yield f"{name} is {tuple(size)} {dtype} there and {tuple(tensor.shape)} {tensor.dtype} here"
