"""Checkpoints: a folder `step_XXXXXXXX` that is complete or absent, never half, and knows what it should hold.

Tensors go into a torch distributed checkpoint (DCP), everything else into JSON files beside it, with a manifest of all of
them. Written under a temporary name, flushed to disk, read back and compared with the manifest, then renamed. This file knows
no component: it sees names, tensors and JSON values.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_pretraining.checkpoint import manifest, tensor_store
from peft_pretraining.checkpoint.manifest import Digest
from peft_pretraining.distributed.world import World, gather_objects

if TYPE_CHECKING:
    import torch.distributed as dist

_NAME = re.compile(r"step_(\d{8})")
_TENSORS = "tensors"
_STATE = "state.json"
# Names of what is not (yet, or any more) a checkpoint; a crash may leave them.
_PARTIAL, _REPLACED, _REMOVED = ".partial-", ".old-", ".removed-"
_HEADER_BYTES = 2048  # what a tensor takes on disk beside its elements, about


class CheckpointError(ValueError):
    """A checkpoint that is not there, not whole, or does not fit."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint is made of.

    tensors: by name; a name that several processes give is written once, and of a DTensor each process writes its part. own:
    those of this process alone; every process has about as many. documents: JSON-able values by file name, written by rank 0;
    must hold "state.json". folders: folders to copy in, by the name they get (the tokenizer).
    """

    step: int
    tensors: Mapping[str, torch.Tensor]
    documents: Mapping[str, Any]
    folders: Mapping[str, Path] = field(default_factory=dict)
    own: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def num_bytes(self, processes: int) -> int:
        """About what it takes on disk, of all processes."""
        shared = sum(tensor.nbytes + _HEADER_BYTES for tensor in self.tensors.values())
        return shared + processes * sum(tensor.nbytes + _HEADER_BYTES for tensor in self.own.values())


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return run_folder / f"step_{step:08d}"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; whether they are sound is for `verify` to say."""
    if not run_folder.is_dir():
        return []
    found = [path for path in run_folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: path.name)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is meant as a checkpoint, sound or not, rather than as a run's folder."""
    parts = (manifest.MANIFEST, _STATE, _TENSORS)
    return bool(_NAME.fullmatch(path.name)) or any((path / name).exists() for name in parts)


def verify(path: Path) -> None:
    """Read all of a checkpoint and compare it with its manifest. Raises CheckpointError naming the file that is damaged."""
    try:
        manifest.verify(path)
    except manifest.DamagedError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def resolve(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest sound one in a run's folder. It is read whole, to be sure.

    In a run's folder damaged ones are passed over, with a warning each that names the file.

    Raises:
        CheckpointError: there is none, the one that was named is damaged, or all of them are.
    """
    if is_checkpoint(path):
        verify(path)
        return path
    damaged = []
    for candidate in reversed(list_checkpoints(path)):
        try:
            verify(candidate)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for line in damaged:
            print(f"warning: {line}; {candidate.name}, the newest sound one, is taken instead", file=sys.stderr)
        return candidate
    if damaged:
        raise CheckpointError(
            f"{path} holds no sound checkpoint: {'; '.join(damaged)}; restore one of them from a copy, or start afresh beside it "
            "with --resume never"
        )
    raise CheckpointError(f"{path} is no checkpoint and holds none (looked for step_XXXXXXXX folders)")


def save_checkpoint(
    run_folder: Path,
    content: Content,
    world: World,
    *,
    keep: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint atomically, verified before it gets its name; every process calls it.

    Args:
        keep: how many of the newest checkpoints stay; None keeps all.
        group: the processes' own group for this, None for the default one. A thread needs a group that nobody else uses.

    Raises:
        OSError: on every process, where any of them could not write: the disk is full or not writable. What was there before
            is untouched, and what was written is removed.
    """
    target = step_folder(run_folder, content.step)
    partial = run_folder / f"{_PARTIAL}{target.name}"
    try:
        _together(lambda: _prepare(partial, content.num_bytes(world.size)) if world.is_main else None, world, group)
        tensors = {**content.tensors, **content.own}
        written = tensor_store.write_tensors(partial / _TENSORS, tensors, alone=world.size == 1, group=group)
        files: dict[str, Digest] = {}
        for digests in gather_objects(written, world, group):
            files |= {f"{_TENSORS}/{name}": digest for name, digest in digests.items()}
        _together(lambda: _complete(partial, target, content, files) if world.is_main else None, world, group)
    except BaseException as error:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # its space may be what is missing
        if isinstance(error, OSError):
            raise OSError(f"{target} could not be saved: {error}") from None
        raise
    if world.is_main:
        with contextlib.suppress(OSError):  # the new one is there, and the other processes have gone on
            _remove_old(run_folder, keep)
    return target


def _together(act: Callable[[], object], world: World, group: dist.ProcessGroup | None) -> None:
    """Do something on every process; an OSError of any of them is raised on all, so that none waits for another."""
    failure = None
    try:
        act()
    except OSError as error:
        failure = str(error)
    for text in gather_objects(failure, world, group):
        if text is not None:
            raise OSError(text)


def _prepare(partial: Path, num_bytes: int) -> None:
    """Make an empty folder, if the disk has room for what is to go in. Raises OSError."""
    run_folder = partial.parent
    run_folder.mkdir(parents=True, exist_ok=True)
    recover_replaced(run_folder)
    for prefix in (_PARTIAL, _REPLACED, _REMOVED):
        for left in run_folder.glob(f"{prefix}step_*"):
            shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(run_folder).free
    if free < num_bytes:
        raise OSError(
            f"no space: it takes about {num_bytes:,} bytes, and {free:,} are free; free some, or keep fewer with "
            "--keep_checkpoints",
        )
    partial.mkdir()


def _complete(partial: Path, target: Path, content: Content, files: dict[str, Digest]) -> None:
    """Everything beside the tensors, the manifest, the proof, the name. Raises OSError."""
    for name, value in content.documents.items():
        files[name] = _write_file(partial / name, _as_json(value))
    for name, folder in content.folders.items():
        for source in sorted(path for path in folder.rglob("*") if path.is_file()):
            inside = f"{name}/{source.relative_to(folder).as_posix()}"
            files[inside] = _write_file(partial / inside, source.read_bytes())
    _write_file(partial / manifest.MANIFEST, manifest.render(files))
    for folder in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
        _sync_folder(folder)
    try:
        manifest.verify(partial)
    except manifest.DamagedError as error:
        raise OSError(f"read back, {error}") from None
    _replace(partial, target)


def _replace(partial: Path, target: Path) -> None:
    """Rename a finished folder to its name; an older one of that name (a run gone back) makes way."""
    old = target.with_name(f"{_REPLACED}{target.name}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_replaced(run_folder: Path) -> None:
    """Give a checkpoint its name back that was making way for a new one when the process was killed."""
    for old in run_folder.glob(f"{_REPLACED}step_*"):
        target = old.with_name(old.name.removeprefix(_REPLACED))
        if not target.exists():
            with contextlib.suppress(OSError):
                old.rename(target)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_old(run_folder: Path, keep: int | None) -> None:
    """Remove all but the newest; the newest has just been verified, so a sound one stays. Renamed first: never half there."""
    if keep is None:
        return
    for path in list_checkpoints(run_folder)[:-keep]:
        with contextlib.suppress(OSError):
            removed = path.rename(path.with_name(f"{_REMOVED}{path.name}"))
            shutil.rmtree(removed, ignore_errors=True)


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _write_file(path: Path, content: bytes) -> Digest:
    """Write a file, flushed to disk; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return manifest.digest_of(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    _write_file(partial, _as_json(value))
    partial.rename(path)


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint or run folder. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def tensor_index(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint. Raises CheckpointError."""
    try:
        return tensor_store.tensor_index(path / _TENSORS)
    except tensor_store.StoreError as error:
        raise CheckpointError(f"{path}: its tensors cannot be read ({error})") from None


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
        tensor_store.read_tensors(path / _TENSORS, tensors)
    except tensor_store.StoreError as error:
        raise CheckpointError(f"{path}: its tensors cannot be read ({error})") from None


def _misfits(index: Mapping[str, tuple[torch.Size, torch.dtype]], tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if name not in index:
            yield f"{name} is missing"
            continue
        size, dtype = index[name]
        if size != tensor.shape or dtype != tensor.dtype:
            yield f"{name} is {tuple(size)} {dtype} there and {tuple(tensor.shape)} {tensor.dtype} here"
