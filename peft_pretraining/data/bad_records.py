"""What to do about records and files that are not what they should be: pass over, count and bound, or stop at the first."""

from typing import Literal

from peft_pretraining.data.errors import DataError
from peft_pretraining.data.records import BadRecord, RawRecord, place_of
from peft_pretraining.data.source import Source

OnBadRecord = Literal["skip", "fail"]

# A reader that has met this many bad records, and more than this share of all, stops: the data is not what it seems.
_MIN_BAD, _MAX_BAD_SHARE = 100, 0.25
# So does one that cannot read this many files and more than this share of those it tried (of a few files: of all).
_MIN_UNREADABLE, _MAX_UNREADABLE_SHARE = 4, 0.25


class Health:
    """Counts what one reader (a lane, an evaluation, a preparation) meets, and notices data that cannot be right."""

    def __init__(self, source: Source, on_bad_record: OnBadRecord):
        self._source, self._on_bad_record = source, on_bad_record
        self.records = self.bad = 0
        self.first_bad = ""
        self._tried: set[int] = set()
        self.unreadable: set[int] = set()  # numbers of files

    def bad_record(self, bad: BadRecord, shard_index: int, record: RawRecord) -> str:
        """Count a bad record and say in words what it is. Raises DataError where it ends the run."""
        place = f"{place_of(record, self._source.shards[shard_index])}: {bad.in_words()}"
        if self._on_bad_record == "fail":
            raise DataError(f"bad record in {place}; mend it, or pass over such records with --on_bad_record skip")
        self.bad += 1
        self.first_bad = self.first_bad or place
        if self.bad >= _MIN_BAD and self.bad > _MAX_BAD_SHARE * self.records:
            raise DataError(f"{self.bad} of {self.records} records are bad, the first one in {self.first_bad}")
        return place

    def file_tried(self, shard_index: int) -> None:
        """A file is about to be read."""
        self._tried.add(shard_index)

    def file_unreadable(self, shard_index: int, why: str) -> None:
        """A file cannot be opened or read on. Raises DataError where that ends the run."""
        place = f"{self._source.shards[shard_index].url} cannot be read: {why}"
        if self._on_bad_record == "fail":
            raise DataError(place)
        self.unreadable.add(shard_index)
        count, files = len(self.unreadable), len(self._source.shards)
        enough = count >= _MIN_UNREADABLE or count > _MAX_UNREADABLE_SHARE * files
        if enough and count > _MAX_UNREADABLE_SHARE * len(self._tried):
            raise DataError(f"{count} of {len(self._tried)} files tried cannot be read, the last one: {place}")

    def empty_lane(self, lane: int, num_lanes: int) -> DataError:
        """The error for a lane's epoch without a document."""
        bad = f" ({self.bad} bad records, the first one in {self.first_bad})" if self.bad else ""
        return DataError(
            f"dataset {self._source.dataset!r} is too small for --data_lanes {num_lanes}: lane {lane} got no "
            f"document in a whole epoch{bad}; lower --data_lanes"
        )
