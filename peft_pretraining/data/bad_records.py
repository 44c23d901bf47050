"""Raw records, and what happens to unusable records and files: they are skipped, counted and bounded, or end the run."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from peft_pretraining.data.errors import DataError
from peft_pretraining.data.source import Shard, Source

MAX_EXAMPLES = 3
OnBadRecord = Literal["skip", "fail"]

# A reader stops after this many bad records if they are more than this share of all: the data is probably of another kind.
_MIN_BAD, _MAX_BAD_SHARE = 100, 0.25
# A reader also stops after this many unreadable files (of few files: this share of all) if they are more than this share of those
# that it tried.
_MIN_UNREADABLE, _MAX_UNREADABLE_SHARE = 4, 0.25


class RawRecord(NamedTuple):
    """A record as it was read, before its text is looked at.

    number: of the record in its file, from 0. line: of its begin (row for parquet), from 1, for messages. content: bytes of a
    JSON line or a text block; the value of the text column for parquet; a TokenRecord of prepared data; a BadRecord if the record
    is too long or the rest of the file cannot be read.
    """

    number: int
    line: int
    content: Any


class BadRecord(NamedTuple):
    """A record that cannot be used.

    kind: malformed_json | missing_text | text_not_string | invalid_unicode | oversized | unreadable_rest (damaged
    compression) | unreadable_file (the disk or its permissions). detail: the reason, for messages.
    """

    kind: str
    detail: str

    def in_words(self) -> str:
        """Kind and detail, for messages."""
        return f"{self.kind.replace('_', ' ')}: {self.detail}"


def place_of(record: RawRecord, shard: Shard) -> str:
    """File and line of a record, for messages."""
    if shard.format == "tokens":
        return f"{shard.url}, record {record.line} of {shard.name}"
    return f"{shard.url}, line {record.line}"


@dataclass
class SkippedRecords:
    """Records that were skipped: counts by kind (bad ones, and "empty" documents), and messages about the first few bad ones."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, kind: str, example: str | None = None) -> None:
        self.counts[kind] += 1
        if example is not None and len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)

    def take(self) -> "SkippedRecords | None":
        """The records since the last call; None if there are none."""
        if not self.counts:
            return None
        taken = SkippedRecords(self.counts, self.examples)
        self.counts, self.examples = Counter(), []
        return taken


class Health:
    """Counts the bad records and unreadable files of one reader (a lane, an evaluation, a preparation), and stops at too many."""

    def __init__(self, source: Source, on_bad_record: OnBadRecord):
        self._source, self._on_bad_record = source, on_bad_record
        self.records = self.bad = 0
        self.first_bad = ""
        self.tried: set[int] = set()  # numbers of the files that were opened
        self.unreadable: set[int] = set()  # numbers of the files that could not be read

    def bad_record(self, bad: BadRecord, shard_index: int, record: RawRecord) -> str:
        """Count a bad record and return a message about it. Raises DataError if it ends the run."""
        place = f"{place_of(record, self._source.shards[shard_index])}: {bad.in_words()}"
        if self._on_bad_record == "fail":
            raise DataError(f"bad record in {place}; mend it, or pass over such records with --on_bad_record skip")
        self.bad += 1
        self.first_bad = self.first_bad or place
        if self.bad >= _MIN_BAD and self.bad > _MAX_BAD_SHARE * self.records:
            raise DataError(f"{self.bad} of {self.records} records are bad, the first one in {self.first_bad}")
        return place

    def file_unreadable(self, shard_index: int, why: str) -> None:
        """Count a file that cannot be read, or not to its end. Raises DataError if that ends the run."""
        place = f"{self._source.shards[shard_index].url} cannot be read: {why}"
        if self._on_bad_record == "fail":
            raise DataError(place)
        self.unreadable.add(shard_index)
        count, files = len(self.unreadable), len(self._source.shards)
        enough = count >= _MIN_UNREADABLE or count > _MAX_UNREADABLE_SHARE * files
        if enough and count > _MAX_UNREADABLE_SHARE * len(self.tried):
            raise DataError(f"{count} of {len(self.tried)} files tried cannot be read, the last one: {place}")

    def empty_lane(self, lane: int, num_lanes: int) -> DataError:
        """The error of a lane that read a whole epoch without a document."""
        bad = f" ({self.bad} bad records, the first one in {self.first_bad})" if self.bad else ""
        return DataError(
            f"dataset {self._source.dataset!r} is too small for --data_lanes {num_lanes}: lane {lane} got no "
            f"document in a whole epoch{bad}; lower --data_lanes"
        )
