"""Copies files of a data set from a network to a folder: resumable, and verified if the server announces checksums."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.data import DataError
from peft_pretraining.data.network import network_file_info, open_network_file
from peft_pretraining.data.source import RetryPolicy, Shard, is_remote, open_source, refuse_if_offline

# Bytes of one request.
_BLOCK_BYTES = 2**24
_STEP_BYTES = 2**20
_SHA256 = re.compile(r'(?:W/)?"?([0-9a-f]{64})"?')


@dataclass(frozen=True)
class Remote:
    """What the server reports about a file. mark: a tag that changes with the content. None: not reported."""

    size_bytes: int | None
    mark: str | None
    sha256: str | None


def fetch(
    dataset: str, out: Path, *, shards: int, validation_shards: int, text_field: str = "text", progress: bool = True
) -> list[Path]:
    """Copies the first files of both splits; files that were copied before are not requested again.

    Raises:
        DataError: not a data set on a network, not accessible, or its content differs from what the server announced.
        NetworkGone: no answer; the same call resumes the copy.
    """
    train = open_source(dataset, "train", text_field=text_field)
    if not train.is_remote:
        raise DataError(f"dataset {dataset!r} is here already: fetch copies from a network")
    files = list(train.shards[:shards])
    if train.keep == "all":
        files += open_source(dataset, "validation", text_field=text_field).shards[:validation_shards]
    try:
        return [fetch_file(shard, out, train.retry, progress) for shard in files]
    except OSError as error:
        raise DataError(f"cannot write to {error.filename or out}: {error.strerror or error}") from error


def fetch_file(shard: Shard, out: Path, retry: RetryPolicy, progress: bool = True) -> Path:
    """Copies one file to `out` under its name; it appears when it is complete. Raises DataError, NetworkGone, OSError."""
    target = out / shard.name
    assert is_remote(shard.url)
    if not target.resolve().is_relative_to(out.resolve()):
        raise DataError(f"{shard.url}: its name {shard.name!r} leads out of {out}")
    refuse_if_offline(shard.url)
    remote = _remote(network_file_info(shard.url, retry))
    if target.is_file() and remote.size_bytes in (None, target.stat().st_size):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    checksum = _resumed_checksum(partial, remote)
    with partial.open("ab") as file, _bar(shard.name, remote, partial.stat().st_size, progress) as bar:
        _copy_rest(shard.url, retry, file, checksum, bar)
        file.flush()
        os.fsync(file.fileno())
    _check(partial, shard.url, remote, checksum.hexdigest())
    partial.rename(target)
    _notes(partial).unlink(missing_ok=True)
    return target


def _remote(info: dict[str, Any]) -> Remote:
    size = info.get("size")
    mark = next((str(info[key]) for key in ("blob_id", "ETag", "etag", "Content-MD5") if info.get(key)), None)
    lfs = info.get("lfs") or {}
    # The hub's file system reports the checksum of large files; over plain HTTP it is their ETag.
    digest = _SHA256.fullmatch(str(lfs.get("sha256") or mark or ""))
    return Remote(size if isinstance(size, int) else None, mark, digest[1] if digest else None)


def _notes(partial: Path) -> Path:
    return partial.with_suffix(".json")


def _resumed_checksum(partial: Path, remote: Remote) -> Any:
    """Returns the checksum of the part copied so far; removes that part if it may belong to another version of the file."""
    notes = _notes(partial)
    checksum = hashlib.sha256()
    try:
        same = json.loads(notes.read_text(encoding="utf-8")) == asdict(remote)
    except (OSError, ValueError):
        same = False
    if not same or (remote.size_bytes is not None and partial.exists() and partial.stat().st_size > remote.size_bytes):
        partial.unlink(missing_ok=True)
        notes.write_text(json.dumps(asdict(remote)), encoding="utf-8")
    partial.touch()
    with partial.open("rb") as file:
        while content := file.read(_STEP_BYTES):
            checksum.update(content)
    return checksum


def _copy_rest(url: str, retry: RetryPolicy, file: Any, checksum: Any, bar: Any) -> None:
    with open_network_file(url, retry, _BLOCK_BYTES) as source:
        source.seek(file.tell())
        while content := source.read(_STEP_BYTES):
            file.write(content)
            checksum.update(content)
            bar.update(len(content))


def _check(partial: Path, url: str, remote: Remote, sha256: str) -> None:
    size = partial.stat().st_size
    if remote.size_bytes is not None and size != remote.size_bytes:
        problem = f"{size:,} bytes came instead of {remote.size_bytes:,}"
    elif remote.sha256 is not None and sha256 != remote.sha256:
        problem = f"its SHA-256 is {sha256}, the server announced {remote.sha256}"
    else:
        return
    partial.unlink()
    raise DataError(f"{url}: {problem}; what came was removed, run the same command again")


def _bar(name: str, remote: Remote, copied_bytes: int, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc=name, total=remote.size_bytes, initial=copied_bytes, unit="B", unit_scale=True, disable=not enabled)
