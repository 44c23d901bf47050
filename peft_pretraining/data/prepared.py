"""Prepared data: its manifest (token files, what they were made from and with, checksums), and the token files themselves.

NAME.uint16 (or NAME.uint32, for vocabularies above 65,536) holds the ids of all documents end to end, without eos. NAME.index
holds 14 bytes for each record of the source, including bad records and both sides of the hold-out rule, so that record numbers,
and with them the order of the data, are those of the source. Any record is read directly.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from peft_pretraining.data import DataError

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "prepared.json"
# File of a preparation's Job; without a manifest beside it the preparation is unfinished.
JOB = "job.json"
TOKENIZER_FOLDER = "tokenizer"
FORMAT_VERSION = 1
INDEX_SUFFIX = ".index"
# end: ids up to and with this record. characters: of its text. kind: number in BAD_KINDS. held_out: by the hold-out rule.
INDEX = [("end", "<u8"), ("characters", "<u4"), ("kind", "u1"), ("held_out", "u1")]
# 0 is a document. Numbers are in files: new kinds go to the end.
BAD_KINDS = (
    "",
    "malformed_json",
    "missing_text",
    "text_not_string",
    "invalid_unicode",
    "oversized",
    "unreadable_rest",
    "unreadable_file",
)


@dataclass(frozen=True)
class Job:
    """Everything that determines the content of a prepared data set, byte for byte."""

    dataset: str
    text_field: str
    documents: int | None  # the first ones of each split; None for all
    tokenizer: str  # name, for messages
    tokenizer_fingerprint: str
    train_fingerprint: str  # of the source's files
    validation_fingerprint: str
    format: int = FORMAT_VERSION
    reading_rules: int = 1  # for files and splits; preparations of the first rules did not record them


@dataclass(frozen=True)
class FileSeal:
    """Size in bytes and blake2b checksum of a file."""

    name: str
    size_bytes: int
    checksum: str


@dataclass(frozen=True)
class PreparedShard:
    """One file of the source as tokens. name: of the source's file. split: "both" if the hold-out rule chooses the split.

    size_bytes: the source file's size, on which the order of the data depends (lanes.py), so that the order is the source's.
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
    """Whether a folder holds an unfinished preparation."""
    return not is_prepared(folder) and os.path.isfile(os.path.join(folder, JOB))


def read_manifest(folder: str | Path, check_sizes: bool = True) -> Manifest:
    """Reads the manifest of prepared data. Raises DataError: no manifest, another format, a file missing or of another size."""
    path = Path(folder) / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["job"]["format"] != FORMAT_VERSION:
            raise DataError(
                f"{folder} was prepared in format {document['job']['format']}, this version reads {FORMAT_VERSION}; "
                "prepare it again in another folder"
            )
        shards = tuple(shard_from(shard) for shard in document["shards"])
        manifest = Manifest(Job(**document["job"]), document["vocab_size"], shards)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); prepare the data again in another folder") from None
    if check_sizes:
        for seal in seals(manifest):
            _check_size(Path(folder), seal)
    return manifest


def shard_from(document: Mapping[str, Any]) -> PreparedShard:
    """A PreparedShard from its JSON form."""
    ids, index = (FileSeal(**document[name]) for name in ("ids", "index"))
    return PreparedShard(**{**document, "ids": ids, "index": index})


def manifest_document(manifest: Manifest) -> dict[str, Any]:
    """JSON-able content of prepared.json."""
    return asdict(manifest)


def seals(manifest: Manifest) -> list[FileSeal]:
    """The seals of all files that hold tokens."""
    return [seal for shard in manifest.shards for seal in (shard.ids, shard.index)]


def _check_size(folder: Path, seal: FileSeal) -> None:
    try:
        size = (folder / seal.name).stat().st_size
    except OSError as error:
        raise DataError(f"{folder / seal.name} cannot be read: {error.strerror}; prepare the data again") from error
    if size != seal.size_bytes:
        raise DataError(
            f"{folder / seal.name} has {size:,} bytes instead of {seal.size_bytes:,}: it was truncated or changed; copy or "
            "prepare the data again"
        )


def verify(folder: Path, seal: FileSeal) -> None:
    """Read a file and compare its checksum. Raises DataError naming it."""
    _check_size(folder, seal)
    if checksum_of(folder / seal.name) != seal.checksum:
        raise DataError(
            f"{folder / seal.name}: its checksum differs from {MANIFEST}: the content has changed; copy or prepare it again"
        )


def checksum_of(path: Path) -> str:
    """blake2b of a file's content. Raises DataError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, new_checksum).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def new_checksum() -> Any:
    """Returns a new hashlib object for checksums."""
    return hashlib.blake2b(digest_size=16)


# --- The tokens of one file, mapped into memory ---


class TokenRecord(NamedTuple):
    """A record of the source. ids: of its text, without eos. bad: what was wrong with it, "" for a document."""

    ids: np.ndarray
    characters: int
    bad: str
    held_out: bool


def ids_suffix(vocab_size: int) -> str:
    """Extension of the file of ids, which names their type."""
    return ".uint16" if vocab_size <= 2**16 else ".uint32"


class TokenFile:
    """A finished file of ids with its index; `path` is that of the ids. Raises DataError where it cannot be mapped."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._ids = _mapped(self.path, {".uint16": "<u2", ".uint32": "<u4"}[self.path.suffix])
        self._index = _mapped(self.path.with_suffix(INDEX_SUFFIX), INDEX)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> TokenRecord:
        """Record `number`. Raises DataError where the index is damaged."""
        end, characters, kind, held_out = self._index[number].item()
        begin = int(self._index["end"][number - 1]) if number else 0
        if not begin <= end <= len(self._ids) or kind >= len(BAD_KINDS):
            raise damaged(self.path.with_suffix(INDEX_SUFFIX), number)
        return TokenRecord(self._ids[begin:end], characters, BAD_KINDS[kind], bool(held_out))

    def select(self, numbers: Iterable[int]) -> list[TokenRecord]:
        """The records of these numbers."""
        return [self[number] for number in numbers]

    def records(self, start: int = 0) -> Iterator[TokenRecord]:
        """Records from `start` on."""
        return (self[number] for number in range(start, len(self)))


def damaged(path: Path | str, number: int) -> DataError:
    """Returns the error for tokens or an index that cannot have been written so."""
    return DataError(
        f"{path}, record {number + 1}: the file is damaged; `python -m peft_pretraining data inspect --verify` compares checksums"
    )


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    """The content of a file as an array, mapped into memory. Raises DataError."""
    # A dry run describes prepared data without loading numpy.
    import numpy as np

    try:
        # An empty file cannot be mapped.
        if path.stat().st_size == 0:
            return np.empty(0, dtype)
        # Slicing a plain array is faster than slicing a memmap.
        return np.asarray(np.memmap(path, dtype, mode="r"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be mapped into memory: {error}") from error
