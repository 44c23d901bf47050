"""The order of training data: a fixed number of virtual readers ("lanes"), each a pure stream of sequences.

Lane q reads its share of the files in an order drawn from (seed, epoch, q), in windows of records whose order is drawn
from (seed, epoch, q, file, window), and cuts its documents into sequences with a carry of its own. Global position p is
the next sequence of lane p mod R. Ranks and workers only decide which process runs a lane, so the order is the same for
any number of them, and five integers per lane (`LaneState`) are all that an exact restart needs.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from peft_pretraining.data.errors import DataError
from peft_pretraining.data.packing import Document, packed_sequences, padded_sequences
from peft_pretraining.data.records import (
    BadRecord,
    RawRecord,
    SkippedRecords,
    belongs_to_split,
    document_text,
    read_records,
)
from peft_pretraining.data.source import Shard, Source
from peft_pretraining.data.tokenizer import Tokenizer

ORDER_VERSION = 1  # raise it with any change that would give another order; a checkpoint of another order is refused
WINDOW_RECORDS = 512
_ENCODE_TOGETHER = 16
# A lane that has met this many bad records, and more than this share of all, stops the run: the data is not what it seems.
_MIN_BAD, _MAX_BAD_SHARE = 100, 0.25


class LaneState(NamedTuple):
    """Where a lane goes on. unit: ordinal of its file (part) in this epoch's order. window_start: first record of the
    window, counted in the file. documents_done: records of the permuted window that are finished. tokens_done: ids of the
    next document (its eos included) that earlier sequences hold; always 0 in the padded layout."""

    epoch: int = 0
    unit: int = 0
    window_start: int = 0
    documents_done: int = 0
    tokens_done: int = 0


@dataclass(frozen=True)
class Order:
    """What the global order depends on besides the source and the tokenizer."""

    lanes: int
    seed: int
    max_length: int
    packing: bool
    on_bad_record: Literal["skip", "fail"] = "skip"


class LaneSequence(NamedTuple):
    """ids: (n,) int32, n <= max_length. state: where the lane goes on after it. skipped: records passed over before it."""

    ids: np.ndarray
    state: LaneState
    skipped: SkippedRecords | None


class Unit(NamedTuple):
    """A file as a lane reads it: all of it, or the records whose number is `residue` modulo `parts`."""

    shard: int
    parts: int = 1
    residue: int = 0


def lane_units(shards: tuple[Shard, ...], lane: int, order: Order, epoch: int) -> list[Unit]:
    """What lane `lane` reads in an epoch, in order. Over all lanes, each record of each file exactly once.

    With at least as many files as lanes, about equally long, lanes take whole files (dealt anew in every epoch), and the
    remainder is split; otherwise every file is split by record number, so that lanes are equally long.
    """
    num_lanes = order.lanes
    dealt = _permutation(len(shards), order.seed, epoch, "files")
    whole = len(shards) // num_lanes * num_lanes if _about_equal(shards) else 0
    units = [Unit(index) for index in dealt[:whole][lane::num_lanes]]
    # Shifted by the file's number, so that many short files do not all give their first record to lane 0.
    units += [Unit(index, num_lanes, (lane - index) % num_lanes) for index in dealt[whole:]]
    return [units[i] for i in _permutation(len(units), order.seed, epoch, "units", lane)]


def _about_equal(shards: tuple[Shard, ...]) -> bool:
    sizes = [shard.size_bytes for shard in shards if shard.size_bytes is not None]
    return not sizes or max(sizes) <= 1.25 * min(sizes)


def _permutation(count: int, seed: int, epoch: int, *key: object) -> list[int]:
    digest = hashlib.blake2b(repr((seed, epoch, *key)).encode(), digest_size=16).digest()
    draw = random.Random(int.from_bytes(digest, "big")).random
    # Sorting by drawn keys rests on random() alone, whose sequence Python promises to keep; shuffle has no such promise.
    keys = [draw() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def lane_sequences(
    source: Source, tokenizer: Tokenizer, order: Order, lane: int, start: LaneState
) -> Iterator[LaneSequence]:
    """The endless stream of a lane's sequences from `start` on.

    Raises DataError: unreadable file, bad record under on_bad_record "fail", too many bad ones, or a whole epoch without
    a document.
    """
    reader = _Lane(source, tokenizer, order, lane)
    documents = reader.documents(start)
    if order.packing:
        sequences = packed_sequences(
            documents,
            eos_id=tokenizer.eos_id,
            max_length=order.max_length,
            inside=lambda position, used: position._replace(tokens_done=used),
        )
    else:
        sequences = padded_sequences(documents, eos_id=tokenizer.eos_id, max_length=order.max_length)
    for ids, state in sequences:
        yield LaneSequence(ids, state, reader.skipped.take())


class _Lane:
    """The documents of one lane, with what was passed over among them."""

    def __init__(self, source: Source, tokenizer: Tokenizer, order: Order, lane: int):
        self.source, self.tokenizer, self.order, self.lane = source, tokenizer, order, lane
        self.skipped = SkippedRecords()
        self._health = _Health(source, lane)
        self._cursor = _Cursor(source)
        self._documents_in_epoch = 0

    def documents(self, start: LaneState) -> Iterator[tuple[Document, LaneState, LaneState]]:
        """(document, state at it, state after it), epoch after epoch."""
        with contextlib.closing(self._cursor):
            while True:
                self._documents_in_epoch = 0
                units = lane_units(self.source.shards, self.lane, self.order, start.epoch)
                at = start
                while at.unit < len(units):
                    yield from self._unit_documents(units[at.unit], at)
                    at = LaneState(at.epoch, at.unit + 1)
                if not self._documents_in_epoch and start == LaneState(start.epoch):
                    raise self._health.empty_lane(self.order.lanes)  # waiting for a document would never end
                start = LaneState(start.epoch + 1)

    def _unit_documents(self, unit: Unit, at: LaneState) -> Iterator[tuple[Document, LaneState, LaneState]]:
        span = WINDOW_RECORDS * unit.parts
        while (window := self._cursor.window(unit, at.window_start, span)) is not None:
            key = (self.lane, unit.shard, at.window_start)
            places = _permutation(len(window), self.order.seed, at.epoch, "window", *key)
            next_window = LaneState(at.epoch, at.unit, at.window_start + span)
            for record, content in self._encoded([window[place] for place in places[at.documents_done :]], unit.shard):
                done = at.documents_done + 1
                after = at._replace(documents_done=done, tokens_done=0) if done < len(window) else next_window
                if isinstance(content, BadRecord):
                    example = self._health.bad_record(content, self.source.shards[unit.shard], record, self.order)
                    self.skipped.add(content.kind, example)
                elif content:
                    self._documents_in_epoch += 1
                    yield Document(content, at.tokens_done), at, after
                elif content is not None:
                    self.skipped.add("empty")
                at = after
            at = next_window

    def _encoded(
        self, records: list[RawRecord], shard_index: int
    ) -> Iterator[tuple[RawRecord, list[int] | BadRecord | None]]:
        """Each record with its ids, with what is wrong with it, or with None if it is not of this split."""
        shard = self.source.shards[shard_index]
        for first in range(0, len(records), _ENCODE_TOGETHER):
            together = records[first : first + _ENCODE_TOGETHER]
            contents = [document_text(record, shard, self.source.text_field) for record in together]
            texts = [text for text in contents if isinstance(text, str) and belongs_to_split(text, self.source)]
            encoded = iter(self.tokenizer.encode_batch(texts))
            for record, content in zip(together, contents, strict=True):
                self._health.records += 1
                if isinstance(content, BadRecord):
                    yield record, content
                else:
                    yield record, next(encoded) if belongs_to_split(content, self.source) else None


class _Health:
    """Notices a lane whose data cannot be right."""

    def __init__(self, source: Source, lane: int):
        self.source, self.lane = source, lane
        self.records = self.bad = 0
        self.first_bad = ""

    def bad_record(self, bad: BadRecord, shard: Shard, record: RawRecord, order: Order) -> str:
        """Count a bad record and say in words what it is. Raises DataError if it is one too many."""
        place = f"{shard.url}, line {record.line}: {bad.kind.replace('_', ' ')}: {bad.detail}"
        if order.on_bad_record == "fail":
            raise DataError(f"bad record in {place}")
        self.bad += 1
        self.first_bad = self.first_bad or place
        if self.bad >= _MIN_BAD and self.bad > _MAX_BAD_SHARE * self.records:
            raise DataError(f"{self.bad} of {self.records} records are bad, the first one in {self.first_bad}")
        return place

    def empty_lane(self, num_lanes: int) -> DataError:
        """The error for an epoch without a document."""
        bad = f" ({self.bad} bad records, the first one in {self.first_bad})" if self.bad else ""
        return DataError(
            f"dataset {self.source.dataset!r} is too small for --data_lanes {num_lanes}: lane {self.lane} got no "
            f"document in a whole epoch{bad}; lower --data_lanes"
        )


class _Cursor:
    """Reads windows of a file one after the other without opening it again for each."""

    def __init__(self, source: Source):
        self._source = source
        self._unit: Unit | None = None
        self._records: Iterator[RawRecord] = iter(())
        self._next_window = 0
        self._ahead: RawRecord | None = None

    def window(self, unit: Unit, start: int, span: int) -> list[RawRecord] | None:
        """The unit's records numbered start to start + span - 1 in their file (maybe none); None at the file's end."""
        if unit != self._unit or start != self._next_window:
            self.close()
            self._records = read_records(self._source.shards[unit.shard], self._source, start)
            self._unit = unit
            self._ahead = next(self._records, None)
        self._next_window = start + span
        if self._ahead is None:
            return None
        window = []
        record: RawRecord | None = self._ahead
        while record is not None and record.number < start + span:
            if record.number % unit.parts == unit.residue:
                window.append(record)
            record = next(self._records, None)
        self._ahead = record
        return window

    def close(self) -> None:
        """Close the file, if one is open."""
        close = getattr(self._records, "close", None)
        if close is not None:
            close()
        self._records, self._unit, self._ahead = iter(()), None, None
