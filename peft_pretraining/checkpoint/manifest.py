"""The manifest of a checkpoint: size and SHA-256 of every file in it, guarded by a SHA-256 of its own.

Its bytes follow from its contents, so that reading it is comparing it with what would be written: a flipped bit in the
manifest is found like one in any other file. No torch in here.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
_READ_BYTES = 2**22


class DamagedError(ValueError):
    """Files that are not what their manifest says; the message names the first of them, from the folder on."""


class Digest(NamedTuple):
    """What is known of a file: its size in bytes and its SHA-256 in hex."""

    num_bytes: int
    sha256: str


def digest_of(content: bytes) -> Digest:
    """The digest of a file with this content."""
    return Digest(len(content), hashlib.sha256(content).hexdigest())


def render(files: Mapping[str, Digest]) -> bytes:
    """The manifest of these files, by their path inside the folder."""
    entries = {name: {"bytes": files[name].num_bytes, "sha256": files[name].sha256} for name in sorted(files)}
    own = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return (json.dumps({"files": entries, "sha256": own}, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Digest]:
    """The files that the folder's manifest lists. Raises DamagedError."""
    path = folder / MANIFEST
    try:
        if path.is_symlink():
            raise DamagedError(f"{MANIFEST} is a link")
        content = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{MANIFEST} {_cannot(error)}") from None
    try:
        files = {str(name): _entry(value) for name, value in json.loads(content)["files"].items()}
        intact = render(files) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(f"{MANIFEST} is not as it was written")
    for name in files:
        if not stays_inside(name):
            raise DamagedError(f"{MANIFEST} lists {name!r}, which is no path inside the checkpoint")
    return files


def _entry(value: Any) -> Digest:
    num_bytes, sha256 = value["bytes"], value["sha256"]
    if type(num_bytes) is not int or not isinstance(sha256, str):
        raise ValueError("no size and digest")
    return Digest(num_bytes, sha256)


def stays_inside(name: str) -> bool:
    """Whether a path, with forward slashes, leads to a file below the folder that it starts from (links aside)."""
    parts = PurePosixPath(name).parts
    safe = bool(parts) and ".." not in parts and not PurePosixPath(name).is_absolute()
    return safe and "\\" not in name and "\0" not in name and ":" not in name


def verify(folder: Path) -> None:
    """Compare every file with the manifest: sizes first, so that what is cut short is found at once, then contents.

    Raises:
        DamagedError: a file is missing, longer, shorter or other than it was, a link (which may lead anywhere), or one that the
            manifest does not list. Hidden ones that are not listed (.DS_Store, .nfs...) are passed over.
    """
    files = read_manifest(folder)
    try:
        found = dict(_regular_files(folder, folder))
    except OSError as error:
        raise DamagedError(f"{error.filename or folder} {_cannot(error)}") from None
    for name, expected in files.items():
        if name not in found:
            raise DamagedError(f"{name} is missing")
        if found[name] != expected.num_bytes:
            raise DamagedError(f"{name} has {found[name]:,} bytes instead of {expected.num_bytes:,}")
    for name in found:
        if name not in files and name != MANIFEST and not PurePosixPath(name).name.startswith("."):
            raise DamagedError(f"{name} is not in the manifest, so nobody knows whose it is; move it elsewhere")
    for name, expected in files.items():
        try:
            intact = _sha256(folder / name) == expected.sha256
        except OSError as error:
            raise DamagedError(f"{name} {_cannot(error)}") from None
        if not intact:
            raise DamagedError(f"{name} has other contents than were written (its SHA-256 differs)")


def _regular_files(folder: Path, top: Path) -> Iterator[tuple[str, int]]:
    """(path from `top` on, bytes) of every file below a folder; no link is followed. Raises DamagedError, OSError."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            name = path.relative_to(top).as_posix()
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                yield from _regular_files(path, top)
            elif stat.S_ISREG(mode):
                yield name, entry.stat(follow_symlinks=False).st_size
            else:
                raise DamagedError(f"{name} is a link or a special file, which a checkpoint does not hold")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _cannot(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
