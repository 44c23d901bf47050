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
from typing import NamedTuple

import numpy as np

from peft_pretraining.data.bad_records import Health, OnBadRecord
from peft_pretraining.data.encoding import Ids, encode_documents
from peft_pretraining.data.packing import Document, packed_sequences, padded_sequences
from peft_pretraining.data.records import (
    UNREADABLE_FILE,
    BadRecord,
    RawRecord,
    SkippedRecords,
    document_in_split,
    read_records,
)
from peft_pretraining.data.source import Shard, Source
from peft_pretraining.data.token_file import TokenFile
from peft_pretraining.data.tokenizer import Tokenizer

ORDER_VERSION = 1  # raise it with any change that would give another order; a checkpoint of another order is refused
WINDOW_RECORDS = 512
_ENCODE_TOGETHER = 16


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
    on_bad_record: OnBadRecord = "skip"


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


def lane_sequences(source: Source, tokenizer: Tokenizer, order: Order, lane: int, start: LaneState) -> Iterator[LaneSequence]:
    """The endless stream of a lane's sequences from `start` on.

    Raises DataError: bad record or unreadable file under on_bad_record "fail", too many of them, or a whole epoch without a
    document; NetworkGone.
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
        self._health = Health(source, order.on_bad_record)
        self._cursor = _Cursor(source, self._health)
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
                # Where all files of this epoch cannot be read, the next epoch deals others, and Health bounds their number;
                # otherwise waiting for a document would never end.
                unreadable = self._health.unreadable.issuperset(unit.shard for unit in units)
                if not self._documents_in_epoch and start == LaneState(start.epoch) and not unreadable:
                    raise self._health.empty_lane(self.lane, self.order.lanes)
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
                    example = self._health.bad_record(content, unit.shard, record)
                    self.skipped.add(content.kind, example)
                elif content is not None and len(content):
                    self._documents_in_epoch += 1
                    yield Document(content, at.tokens_done), at, after
                elif content is not None:
                    self.skipped.add("empty")
                at = after
            at = next_window

    def _encoded(self, records: list[RawRecord], shard_index: int) -> Iterator[tuple[RawRecord, Ids | BadRecord | None]]:
        """Each record with its ids, with what is wrong with it, or with None if it is not of this split."""
        shard = self.source.shards[shard_index]
        enough = None if self.order.packing else self.order.max_length - 1
        for first in range(0, len(records), _ENCODE_TOGETHER):
            together = records[first : first + _ENCODE_TOGETHER]
            contents = [document_in_split(record, shard, self.source) for record in together]
            documents = [content for content in contents if isinstance(content, str | np.ndarray)]
            encoded = encode_documents(self.tokenizer, documents, enough)
            for record, content in zip(together, contents, strict=True):
                self._health.records += 1
                yield record, next(encoded) if isinstance(content, str | np.ndarray) else content


class _Cursor:
    """Reads windows of a file one after the other without opening it again for each."""

    def __init__(self, source: Source, health: Health):
        self._source, self._health = source, health
        self._unit: Unit | None = None
        self._records: Iterator[RawRecord] = iter(())
        self._next_window = 0
        self._ahead: RawRecord | None = None
        self._tokens: TokenFile | None = None

    def window(self, unit: Unit, start: int, span: int) -> list[RawRecord] | None:
        """The unit's records numbered start to start + span - 1 in their file (maybe none); None at the file's end."""
        if self._source.prepared is not None:
            return self._token_window(unit, start, span)
        if unit != self._unit or start != self._next_window:
            self.close()
            self._records = read_records(self._source.shards[unit.shard], self._source, start)
            self._unit = unit
            self._health.file_tried(unit.shard)
            self._ahead = self._read()
        self._next_window = start + span
        if self._ahead is None:
            return None
        window = []
        record: RawRecord | None = self._ahead
        while record is not None and record.number < start + span:
            if record.number % unit.parts == unit.residue:
                window.append(record)
            record = self._read()
        self._ahead = record
        return window

    def _read(self) -> RawRecord | None:
        record = next(self._records, None)
        if record is not None and isinstance(record.content, BadRecord) and record.content.kind == UNREADABLE_FILE:
            assert self._unit is not None
            # Every lane that reads the file notices, though the record is counted in one of them.
            self._health.file_unreadable(self._unit.shard, record.content.detail)
        return record

    def _token_window(self, unit: Unit, start: int, span: int) -> list[RawRecord] | None:
        """`window` of prepared data, any of which is reached at once."""
        if self._tokens is None or unit != self._unit:
            self._tokens, self._unit = TokenFile(self._source.shards[unit.shard].url), unit
        tokens = self._tokens
        if start >= len(tokens):
            return None
        first = start + (unit.residue - start) % unit.parts
        numbers = range(first, min(start + span, len(tokens)), unit.parts)
        return [RawRecord(number, number + 1, tokens[number]) for number in numbers]

    def close(self) -> None:
        """Close the file, if one is open."""
        close = getattr(self._records, "close", None)
        if close is not None:
            close()
        self._records, self._unit, self._ahead, self._tokens = iter(()), None, None, None
