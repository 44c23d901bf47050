"""The manifest of a prepared data set: which token files there are, what they were made from and with, and their checksums.

Only JSON and file sizes are read here, so that a dry run can describe prepared data at once; token_file.py has the tokens.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from peft_pretraining.data.errors import DataError

MANIFEST = "prepared.json"
JOB = "job.json"  # what a preparation is about; alone, without a manifest, it tells one that has not finished
TOKENIZER_FOLDER = "tokenizer"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Job:
    """What decides the content of a prepared data set, byte for byte."""

    dataset: str
    text_field: str
    documents: int | None  # at most so many of each split; None for all
    tokenizer: str  # name, for messages
    tokenizer_fingerprint: str
    train_fingerprint: str  # of the source's files
    validation_fingerprint: str
    format: int = FORMAT_VERSION


@dataclass(frozen=True)
class FileSeal:
    """Size in bytes and blake2b checksum of a file."""

    name: str
    size_bytes: int
    checksum: str


@dataclass(frozen=True)
class PreparedShard:
    """One file of the source as tokens. name: of the source's file. split: "both" where the hold-out rule tells them apart.

    size_bytes: what the order of the data goes by (lanes.py): the source's size, so that the order is that of the source.
    """

    name: str
    split: Literal["train", "validation", "both"]
    size_bytes: int | None
    counts: dict[str, int]  # records; train and validation: documents, _tokens and _characters of each
    bad_records: dict[str, int]
    ids: FileSeal
    index: FileSeal


@dataclass(frozen=True)
class Manifest:
    """A finished preparation."""

    job: Job
    vocab_size: int  # ids of text lie below
    shards: tuple[PreparedShard, ...]

    def total(self, count: str) -> int:
        """Sum of a count over all files."""
        return sum(shard.counts[count] for shard in self.shards)


def is_prepared(folder: str | Path) -> bool:
    """Whether a folder holds a finished preparation."""
    return os.path.isfile(os.path.join(folder, MANIFEST))


def is_unfinished(folder: str | Path) -> bool:
    """Whether a folder holds a preparation that was stopped before its end."""
    return not is_prepared(folder) and os.path.isfile(os.path.join(folder, JOB))


def read_manifest(folder: str | Path, check_sizes: bool = True) -> Manifest:
    """The manifest of a prepared data set. Raises DataError: not one, of another format, a file missing or of another size."""
    path = Path(folder) / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["job"]["format"] != FORMAT_VERSION:
            raise DataError(
                f"{folder} was prepared in format {document['job']['format']}, this version reads {FORMAT_VERSION}; "
                "prepare it anew in another folder"
            )
        shards = tuple(shard_from(shard) for shard in document["shards"])
        manifest = Manifest(Job(**document["job"]), document["vocab_size"], shards)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); prepare the data anew in another folder") from None
    if check_sizes:
        for seal in seals(manifest):
            _check_size(Path(folder), seal)
    return manifest


def shard_from(document: Mapping[str, Any]) -> PreparedShard:
    """From its JSON form."""
    ids, index = (FileSeal(**document[name]) for name in ("ids", "index"))
    return PreparedShard(**{**document, "ids": ids, "index": index})


def manifest_document(manifest: Manifest) -> dict[str, Any]:
    """JSON-able content of prepared.json."""
    return asdict(manifest)


def seals(manifest: Manifest) -> list[FileSeal]:
    """Of all files that hold tokens."""
    return [seal for shard in manifest.shards for seal in (shard.ids, shard.index)]


def _check_size(folder: Path, seal: FileSeal) -> None:
    try:
        size = (folder / seal.name).stat().st_size
    except OSError as error:
        raise DataError(f"{folder / seal.name} cannot be read: {error.strerror}; prepare the data anew") from error
    if size != seal.size_bytes:
        raise DataError(
            f"{folder / seal.name} has {size:,} bytes instead of {seal.size_bytes:,}: it was truncated or changed; copy or "
            "prepare the data anew"
        )


def verify(folder: Path, seal: FileSeal) -> None:
    """Read a file and compare its checksum. Raises DataError naming it."""
    _check_size(folder, seal)
    if checksum_of(folder / seal.name) != seal.checksum:
        raise DataError(
            f"{folder / seal.name}: its checksum is not that of {MANIFEST}: bits have changed; copy or prepare it anew"
        )


def checksum_of(path: Path) -> str:
    """blake2b of a file's content. Raises DataError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, new_checksum).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def new_checksum() -> Any:
    """The hash that checksums are made with, with the methods of those of hashlib."""
    return hashlib.blake2b(digest_size=16)
