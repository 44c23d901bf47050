"""Checkpoint folders `step_XXXXXXXX`: written atomically and verified by checksums.

Tensors are stored as a torch distributed checkpoint (DCP), everything else as JSON files beside it, and a manifest lists all
files. A checkpoint is written under a temporary name, flushed to disk, read back and compared with the manifest, then renamed.
This module sees only names, tensors and JSON values; it does not know models or optimizers.
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
# Folder inside a run's folder for checkpoints that the run no longer continues from.
SET_ASIDE = "set_aside"
# Prefixes of folders that are being written, replaced or removed; a crash may leave such folders behind.
_PARTIAL, _REPLACED, _REMOVED = ".partial-", ".old-", ".removed-"
# Approximate bytes that a tensor takes on disk in addition to its elements.
_HEADER_BYTES = 2048


class CheckpointError(ValueError):
    """Raised for a checkpoint that is missing, damaged, or does not fit the model."""


@dataclass(frozen=True)
class Content:
    """The content of a checkpoint.

    step: number of updates made. tensors: by name; a name given by several processes is written once, and of a DTensor each
    process writes its part. own: tensors of this process alone; every process has about as many bytes of them.
    documents: JSON-serialisable values by file name, written by rank 0; must contain "state.json".
    folders: folders to copy into the checkpoint, by their name inside it (for example the tokenizer).
    """

    step: int
    tensors: Mapping[str, torch.Tensor]
    documents: Mapping[str, Any]
    folders: Mapping[str, Path] = field(default_factory=dict)
    own: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def num_bytes(self, processes: int) -> int:
        """Returns the approximate size on disk of all processes' content, bytes."""
        shared = sum(tensor.nbytes + _HEADER_BYTES for tensor in self.tensors.values())
        return shared + processes * sum(tensor.nbytes + _HEADER_BYTES for tensor in self.own.values())


def step_folder(run_folder: Path, step: int) -> Path:
    """Returns the folder of the checkpoint after `step` updates."""
    return run_folder / f"step_{step:08d}"


def num_updates(path: Path) -> int | None:
    """Returns the number of updates of a checkpoint, from its state or else from its name; None if neither tells."""
    try:
        number = read_json(path / _STATE)["train"]["update_step"]
        if type(number) is int:
            return number
    except (CheckpointError, KeyError, TypeError):
        pass
    match = _NAME.fullmatch(path.resolve().name)
    return int(match[1]) if match else None


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Returns the checkpoints in a run's folder by number of updates, whatever they are called, without verifying them.

    Of two with the same number the one named step_XXXXXXXX comes last; one whose number cannot be read (half a copy) comes first.
    Hidden folders (half written, or about to be removed) are left out, and links to places inside the run's folder.
    """
    if not run_folder.is_dir():
        return []
    inside = run_folder.resolve()
    checkpoints = [
        path
        for path in run_folder.iterdir()
        if not path.name.startswith(".")
        and os.path.isdir(path)
        and (_NAME.fullmatch(path.name) or _num_parts(path) > 1)
        and not (path.is_symlink() and path.resolve().is_relative_to(inside))
    ]
    numbers = {path: num_updates(path) for path in checkpoints}
    return sorted(checkpoints, key=lambda path: (-1 if (n := numbers[path]) is None else n, _is_own(path), path.name))


def _is_own(path: Path) -> bool:
    """Whether a checkpoint's folder has the name under which a run saves, and is no link."""
    return bool(_NAME.fullmatch(path.name)) and not path.is_symlink()


def missing_checkpoints(run_folder: Path) -> str | None:
    """Returns where the checkpoints of a folder without any went: set aside, or behind a link that leads nowhere; else None."""
    if aside := list_checkpoints(run_folder / SET_ASIDE):
        return f"its checkpoints are all in {SET_ASIDE}/; to resume from the newest of them: --continue_from {aside[-1]}"
    for path in sorted(path for path in run_folder.glob("*") if path.is_symlink() and not path.exists()):
        if _NAME.search(f"{path.name} {path.readlink()}"):
            return f"{path.name} is a link to {path.readlink()}, which does not exist; restore that folder, or remove the link"
    return None


def is_checkpoint(path: Path) -> bool:
    """Tells whether a folder is a checkpoint, intact or damaged, rather than a run's folder."""
    return bool(_NAME.fullmatch(path.name)) or _num_parts(path) > 0


def _num_parts(path: Path) -> int:
    """Counts what only checkpoints have together; a folder that may not be read has nothing."""
    return sum(os.path.exists(path / name) for name in (manifest.MANIFEST, _STATE, _TENSORS))


def verify(path: Path) -> None:
    """Reads a whole checkpoint and compares it with its manifest. Raises CheckpointError that names the damaged file."""
    try:
        manifest.verify(path)
    except manifest.DamagedError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def resolve(path: Path) -> Path:
    """Returns the checkpoint that `path` names: `path` itself, or the newest intact checkpoint in a run's folder.

    The checkpoint is read whole and verified. Damaged checkpoints in a run's folder are skipped with a warning.

    Raises:
        CheckpointError: there is no checkpoint, or the named one or all of them are damaged.
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
            print(f"warning: {line}; using {candidate.name}, the newest intact checkpoint", file=sys.stderr)
        return candidate
    if damaged:
        raise CheckpointError(
            f"{path}: all checkpoints are damaged: {'; '.join(damaged)}; restore one of them from a copy, or start a new run in "
            "a new folder with --resume never"
        )
    raise CheckpointError(
        f"{path} is not a checkpoint and contains none; name a step_XXXXXXXX folder, or a run's folder with one"
    )


def save_checkpoint(
    run_folder: Path,
    content: Content,
    world: World,
    *,
    keep: int | None = None,
    keep_every: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes a checkpoint atomically and verifies it before renaming it to its final name; every process calls it.

    Args:
        run_folder: the folder in which the checkpoint is created.
        content: the tensors, documents and folders to write.
        world: this process's rank among all processes.
        keep: how many of the newest checkpoints are kept; None keeps all.
        keep_every: checkpoints after multiples of this many updates are kept too.
        group: process group for the exchange, None for the default one. A thread needs a group that no other thread uses.

    Raises:
        OSError: on every process, if any process could not write (disk full, not writable). Earlier checkpoints are untouched,
            and the partial one is removed.
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
            # The disk may be full: free the space of the partial checkpoint.
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f"{target} could not be saved: {error}") from None
        raise
    if world.is_main:
        # The new checkpoint is complete and other processes have continued: a failed removal is no error.
        with contextlib.suppress(OSError):
            _remove_old(run_folder, keep, keep_every)
    return target


def _together(act: Callable[[], object], world: World, group: dist.ProcessGroup | None) -> None:
    """Calls `act` on every process; an OSError of any process is raised on all, so that none waits for another."""
    failure = None
    try:
        act()
    except OSError as error:
        failure = str(error)
    for text in gather_objects(failure, world, group):
        if text is not None:
            raise OSError(text)


def _prepare(partial: Path, num_bytes: int) -> None:
    """Creates the temporary folder if the disk has num_bytes free. Raises OSError."""
    run_folder = partial.parent
    make_run_folder(run_folder)
    recover_replaced(run_folder)
    for prefix in (_PARTIAL, _REPLACED, _REMOVED):
        for left in run_folder.glob(f"{prefix}step_*"):
            _remove(left)
    free = shutil.disk_usage(run_folder).free
    if free < num_bytes:
        raise OSError(
            f"no space: a checkpoint takes about {num_bytes:,} bytes, and {free:,} are free; free some, or keep fewer "
            "checkpoints with --keep_checkpoints",
        )
    partial.mkdir()


def _complete(partial: Path, target: Path, content: Content, files: dict[str, Digest]) -> None:
    """Writes the documents, folders and manifest, verifies the checkpoint and renames it. Raises OSError."""
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
        raise OSError(f"verification after writing failed: {error}") from None
    _replace(partial, target)


def _replace(partial: Path, target: Path) -> None:
    """Renames a finished folder to its final name; replaces an older checkpoint of the same step (a run that went back)."""
    old = target.with_name(f"{_REPLACED}{target.name}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _sync_folder(target.parent)
    _remove(old)


def recover_replaced(run_folder: Path) -> None:
    """Restores the name of a checkpoint that was being replaced when the process was killed."""
    for old in run_folder.glob(f"{_REPLACED}step_*"):
        target = old.with_name(old.name.removeprefix(_REPLACED))
        if not target.exists():
            with contextlib.suppress(OSError):
                old.rename(target)


def make_run_folder(path: Path) -> None:
    """Creates a folder and its missing parents, and flushes their names to disk. Raises OSError."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    # Some file systems do not support flushing a folder.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_old(run_folder: Path, keep: int | None, keep_every: int | None) -> None:
    """Removes all but the newest `keep` of the checkpoints that runs saved; copies under other names and links stay.

    With keep_every = N, the first checkpoint from each multiple of N updates on stays too: it is the multiple's own unless that
    save had to wait, after a skipped update or a failed save. Each is renamed first, so that none is ever partly removed.
    """
    if keep is None:
        return
    own = [path for path in list_checkpoints(run_folder) if _is_own(path)]
    for_good: dict[int, Path] = {}
    if keep_every is not None:
        for path in own:
            for_good.setdefault((num_updates(path) or 0) // keep_every, path)
    for_good.pop(0, None)
    for path in own[:-keep]:
        if path in for_good.values():
            continue
        with contextlib.suppress(OSError):
            _remove(path.rename(path.with_name(f"{_REMOVED}{path.name}")))


def _remove(path: Path) -> None:
    """Removes a folder, or a link to one, as far as that is possible."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _write_file(path: Path, content: bytes) -> Digest:
    """Writes a file, flushes it to disk and returns its digest; creates missing parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return manifest.digest_of(content)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically and flushes it to disk."""
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    _write_file(partial, _as_json(value))
    partial.rename(path)
    _sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Reads a JSON file of a checkpoint or run folder. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def tensor_index(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Returns the shape and dtype of every tensor in a checkpoint. Raises CheckpointError."""
    try:
        return tensor_store.tensor_index(path / _TENSORS)
    except tensor_store.StoreError as error:
        raise CheckpointError(f"{path}: its tensors cannot be read ({error})") from None


def load_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills the given tensors, in place, from a checkpoint.

    Raises:
        CheckpointError: tensors are missing or have another shape or dtype (the first five are named), or a file cannot be read.
    """
    problems = list(_misfits(tensor_index(path), tensors))
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path} does not fit this model: {'; '.join(problems[:5])}{more}; use the --model_config and flags of its run"
        )
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
            yield f"{name} is {tuple(size)} {dtype} in the checkpoint and {tuple(tensor.shape)} {tensor.dtype} in the model"
