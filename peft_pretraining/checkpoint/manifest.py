"""The manifest of a checkpoint: the size and SHA-256 of every file, and a SHA-256 of the manifest itself.

The manifest's bytes are determined by its contents. Reading renders the parsed contents again and compares, so a flipped bit in
the manifest is detected like one in any other file. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from peft_pretraining.config.files import lfs_reason

MANIFEST = "manifest.json"
_READ_BYTES = 2**22


class DamagedError(ValueError):
    """Raised when files differ from their manifest; the message names the first such file, relative to the folder."""


class Digest(NamedTuple):
    """A file's size in bytes and its SHA-256 in hexadecimal."""

    num_bytes: int
    sha256: str


def digest_of(content: bytes) -> Digest:
    """Returns the digest of a file with the given content."""
    return Digest(len(content), hashlib.sha256(content).hexdigest())


def render(files: Mapping[str, Digest]) -> bytes:
    """Returns the manifest's bytes for files given by their paths inside the folder."""
    entries = {name: {"bytes": files[name].num_bytes, "sha256": files[name].sha256} for name in sorted(files)}
    checksum = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return (json.dumps({"files": entries, "sha256": checksum}, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Digest]:
    """Returns the digests of the files that the folder's manifest lists. Raises DamagedError."""
    path = folder / MANIFEST
    try:
        if path.is_symlink():
            raise DamagedError(f"{MANIFEST} is a symbolic link")
        content = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{MANIFEST} {_cannot(error)}") from None
    try:
        files = {str(name): _entry(value) for name, value in json.loads(content)["files"].items()}
        intact = render(files) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(f"{MANIFEST} was changed after it was written (its own SHA-256 differs)")
    for name in files:
        if not stays_inside(name):
            raise DamagedError(f"{MANIFEST} lists {name!r}, which is not a path inside the checkpoint")
    return files


def _entry(value: Any) -> Digest:
    num_bytes, sha256 = value["bytes"], value["sha256"]
    if type(num_bytes) is not int or not isinstance(sha256, str):
        raise ValueError("the entry has no size and SHA-256")
    return Digest(num_bytes, sha256)


def stays_inside(name: str) -> bool:
    """Tells whether a relative path (forward slashes) stays below its starting folder; symbolic links are not considered."""
    parts = PurePosixPath(name).parts
    safe = bool(parts) and ".." not in parts and not PurePosixPath(name).is_absolute()
    return safe and "\\" not in name and "\0" not in name and ":" not in name


def verify(folder: Path) -> None:
    """Compares every file with the manifest: first all sizes, which detects truncated files quickly, then all contents.

    Raises:
        DamagedError: a file is missing, has another size or content, is a symbolic link, or is not listed in the manifest.
            Unlisted hidden files (.DS_Store, .nfs...) are ignored.
    """
    files = read_manifest(folder)
    try:
        sizes = dict(_regular_files(folder, folder))
    except OSError as error:
        raise DamagedError(f"{error.filename or folder} {_cannot(error)}") from None
    for name, expected in files.items():
        if name not in sizes:
            raise DamagedError(f"{name} is missing")
        if sizes[name] != expected.num_bytes:
            reason = f"has {sizes[name]:,} bytes instead of {expected.num_bytes:,}"
            raise DamagedError(f"{name} {lfs_reason(folder / name, reason)}")
    for name in sizes:
        if name not in files and name != MANIFEST and not PurePosixPath(name).name.startswith("."):
            raise DamagedError(f"{name} is an unexpected file, not listed in {MANIFEST}; move it out of the folder")
    for name, expected in files.items():
        try:
            intact = _sha256(folder / name) == expected.sha256
        except OSError as error:
            raise DamagedError(f"{name} {_cannot(error)}") from None
        if not intact:
            raise DamagedError(f"{name} was changed after it was written (its SHA-256 differs)")


def _regular_files(folder: Path, top: Path) -> Iterator[tuple[str, int]]:
    """Yields (path relative to `top`, bytes) of every file below a folder. Raises DamagedError for links, OSError."""
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
                raise DamagedError(f"{name} is a symbolic link or a special file; a checkpoint contains only regular files")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _cannot(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
