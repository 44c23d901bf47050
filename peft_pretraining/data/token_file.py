"""Tokens of one file of a prepared data set, mapped into memory: any record is reached at once.

NAME.uint16 (or NAME.uint32, for vocabularies above 65,536) holds the ids of all documents end to end, without eos. NAME.index
holds 14 bytes for each record of the source, bad ones and both sides of the hold-out rule included, so that record numbers,
and with them the order of the data, are those of the source.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_pretraining.data.errors import DataError

INDEX_SUFFIX = ".index"
# end: ids up to and with this record. characters: of its text. kind: number in BAD_KINDS. held_out: by the hold-out rule.
INDEX = np.dtype([("end", "<u8"), ("characters", "<u4"), ("kind", "u1"), ("held_out", "u1")])
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
        dtype = np.dtype({".uint16": "<u2", ".uint32": "<u4"}[self.path.suffix])
        self._ids = _mapped(self.path, dtype)
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
    """The error for tokens that cannot be what was written."""
    return DataError(
        f"{path}, record {number + 1}: not what was prepared, the file is damaged; "
        "`python -m peft_pretraining data inspect --verify` compares checksums"
    )


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        if path.stat().st_size == 0:  # nothing cannot be mapped
            return np.empty(0, dtype)
        return np.asarray(np.memmap(path, dtype, mode="r"))  # slices of plain arrays are made faster
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be mapped into memory: {error}") from error
