"""A folder that appears complete or not at all. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def folder_problem(out: Path) -> str | None:
    """Why --out cannot become a new folder, if it cannot, as far as is known without writing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return f"--out {out}: holds something already; name another folder, or remove it"
    if out.resolve() == Path.cwd():
        return f"--out {out}: is the folder that this runs in; name one inside it"
    return None


def make_folder(out: Path) -> None:
    """Make the folder --out and those it lies in, where they are not there. Raises OSError, naming it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into. It becomes `out` once the block has ended, and is removed where it ends otherwise.

    out: absent or empty. Whatever keeps it from being made does so before the block.

    Raises:
        OSError: the folder cannot be made there.
    """
    target = out.resolve()
    partial, was_there = target.with_name(f".{target.name}.partial"), target.exists()
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if was_there:
            target.rmdir()  # a mount point stays
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if was_there:
            target.mkdir(exist_ok=True)
        raise
