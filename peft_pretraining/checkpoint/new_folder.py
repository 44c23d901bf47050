"""Creates an output folder atomically: it appears complete or not at all. This module does not import torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_pretraining.checkpoint.manifest import MANIFEST


def folder_problem(out: Path) -> str | None:
    """Returns why --out cannot become a new folder, or None. Writes nothing, so missing permissions are not detected."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return f"--out {out}: exists and is not an empty folder; name another folder, or remove it"
    if out.resolve() == Path.cwd():
        return f"--out {out}: is the current working directory; name a folder inside it"
    return inside_checkpoint(out)


def inside_checkpoint(out: Path) -> str | None:
    """Returns why nothing can be written to --out if it is inside a checkpoint, whose manifest allows no additional files."""
    for folder in (out.resolve(), *out.resolve().parents):
        if (folder / MANIFEST).is_file() and (folder / "run.json").is_file():
            return f"--out {out}: is inside the checkpoint {folder}, which would then count as damaged; name another folder"
    return None


def make_folder(out: Path) -> None:
    """Creates the folder --out and its missing parents. Raises OSError that names the folder; ValueError inside a checkpoint."""
    if (problem := inside_checkpoint(out)) is not None:
        raise ValueError(problem)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out {out}: cannot be created ({error.strerror}); name another folder") from None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`; it is renamed to `out` at the block's end, or removed if the block raises.

    out: absent or an empty folder. A folder that cannot be created raises before the block runs.

    Raises:
        OSError: the folder cannot be created there.
    """
    target = out.resolve()
    partial, existed = target.with_name(f".{target.name}.partial"), target.exists()
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if existed:
            # Fails for a mount point, which rename cannot replace.
            target.rmdir()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"--out {out}: cannot be created ({error.strerror}); name another folder") from None
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if existed:
            target.mkdir(exist_ok=True)
        raise
