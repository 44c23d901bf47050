"""The order of training data: a fixed number of virtual readers ("lanes"), each a stream of sequences.

Global position p is the next sequence of lane p mod R. Ranks and workers only decide which process runs a lane, so the order
is the same for any number of them, and five integers per lane (`LaneState`) suffice to resume exactly. Two orders:

lanes: Lane q reads its share of the files in an order drawn from (seed, epoch, q), in windows of records whose order is drawn
from (seed, epoch, q, file, window), and cuts its documents into sequences with a carry of its own.

global (`GlobalOrder`): the sequence at position p is a function of (seed, p); each pass reads every document of the corpus once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from peft_pretraining.data.records import (
    BadRecord,
    Health,
    OnBadRecord,
    RawRecord,
    SkippedRecords,
    WindowReader,
    documents_in_split,
)
from peft_pretraining.data.source import DataOrder, Shard, Source
from peft_pretraining.data.tokenizer import Ids, Tokenizer, encode_documents

# Recorded in each checkpoint; any change that would give another order needs a new number, and the old order stays readable.
ORDER_VERSIONS: dict[DataOrder, int] = {"lanes": 1, "global": 2}
WINDOW_RECORDS = 512
_ENCODE_TOGETHER = 16
IGNORE_INDEX = -100

Position = TypeVar("Position")


class LaneState(NamedTuple):
    """The position from which a lane continues.

    unit: ordinal of its file (part) in this epoch's order. window_start: first record of the window, counted in the file.
    documents_done: records of the permuted window that are finished. tokens_done: ids of the next document (its eos included)
    that earlier sequences hold; always 0 in the padded layout.

    In the global order epoch is the pass in which the lane's next sequence begins, and unit the number of the lane's sequences
    before it.
    """

    epoch: int = 0
    unit: int = 0
    window_start: int = 0
    documents_done: int = 0
    tokens_done: int = 0


@dataclass(frozen=True)
class Order:
    """The settings on which the global order depends, besides the source and the tokenizer."""

    lanes: int
    seed: int
    max_length: int
    packing: bool
    on_bad_record: OnBadRecord = "skip"


class LaneSequence(NamedTuple):
    """A sequence of a lane. ids: (n,) int32, n <= max_length. state: position after it. skipped: records skipped before it.

    source: number of the data set in a mixture, of which position and skipped records are.
    """

    ids: np.ndarray
    state: LaneState
    skipped: SkippedRecords | None
    source: int = 0


class Unit(NamedTuple):
    """A file as a lane reads it: all of it, or the records whose number is `residue` modulo `parts`."""

    shard: int
    parts: int = 1
    residue: int = 0


def lane_units(shards: tuple[Shard, ...], lane: int, order: Order, epoch: int) -> list[Unit]:
    """The units that lane `lane` reads in an epoch, in order. Over all lanes, each record of each file exactly once.

    With at least as many files as lanes, about equally long, lanes take whole files (distributed anew in every epoch), and the
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
    return list(map(int, _permuted(count, seed, epoch, *key)))


def _permuted(count: int, seed: int, epoch: int, *key: object) -> np.ndarray:
    digest = hashlib.blake2b(repr((seed, epoch, *key)).encode(), digest_size=16).digest()
    draw = random.Random(int.from_bytes(digest, "big")).random
    # Uses random() only, whose sequence Python guarantees across versions; shuffle has no such guarantee.
    return np.argsort(np.fromiter((draw() for _ in range(count)), np.float64, count), kind="stable")


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
        yield LaneSequence(ids, state, reader.skipped.take() if reader.skipped.counts else None)


def lane_offsets(order: Order, names: Sequence[str], lane: int) -> list[float]:
    """Returns a lane's offsets for `mixture.mixed`, in tokens: for each source spread evenly over all lanes.

    names: of the sources, on which the draw depends.
    """
    places = [_permutation(order.lanes, order.seed, 0, "mixture", name)[lane] for name in names]
    return [(place + 0.5) / order.lanes * order.max_length for place in places]


class _Lane:
    """Reads the documents of one lane, and notes the skipped records among them."""

    def __init__(self, source: Source, tokenizer: Tokenizer, order: Order, lane: int):
        self.source, self.tokenizer, self.order, self.lane = source, tokenizer, order, lane
        self.skipped = SkippedRecords()
        self._health = Health(source, order.on_bad_record)
        self._reader = WindowReader(source, self._health)
        self._documents_in_epoch = 0

    def documents(self, start: LaneState) -> Iterator[tuple[Document, LaneState, LaneState]]:
        """(document, state at it, state after it), epoch after epoch."""
        with contextlib.closing(self._reader):
            while True:
                self._documents_in_epoch = 0
                units = lane_units(self.source.shards, self.lane, self.order, start.epoch)
                at = start
                while at.unit < len(units):
                    yield from self._unit_documents(units[at.unit], at)
                    at = LaneState(at.epoch, at.unit + 1)
                # If all files of this epoch are unreadable, the next epoch deals others, and Health bounds the number of
                # unreadable files. Any other epoch without a document would be followed by endless others.
                unreadable = self._health.unreadable.issuperset(unit.shard for unit in units)
                if not self._documents_in_epoch and start == LaneState(start.epoch) and not unreadable:
                    raise self._health.empty_lane(self.lane, self.order.lanes)
                start = LaneState(start.epoch + 1)

    def _unit_documents(self, unit: Unit, at: LaneState) -> Iterator[tuple[Document, LaneState, LaneState]]:
        span = WINDOW_RECORDS * unit.parts
        while (window := self._reader.window(unit.shard, at.window_start, span, unit.parts, unit.residue)) is not None:
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
        """Each record with its ids, with a BadRecord, or with None if it belongs to the other split."""
        shard = self.source.shards[shard_index]
        enough = None if self.order.packing else self.order.max_length - 1
        for first in range(0, len(records), _ENCODE_TOGETHER):
            together = records[first : first + _ENCODE_TOGETHER]
            contents = documents_in_split(together, shard, self.source)
            documents = [content for content in contents if isinstance(content, str | np.ndarray)]
            encoded = encode_documents(self.tokenizer, documents, enough)
            for record, content in zip(together, contents, strict=True):
                self._health.records += 1
                yield record, next(encoded) if isinstance(content, str | np.ndarray) else content


# --- The global order ---


class Corpus(NamedTuple):
    """All documents of a source, tokenised. ids: of all documents end to end, eos after each. ends: (documents,) int64."""

    ids: np.ndarray
    ends: np.ndarray
    skipped: SkippedRecords


class _Pass(NamedTuple):
    """The documents of a pass in their order, and where each ends in the pass's stream of ids."""

    documents: np.ndarray
    ends: np.ndarray


class GlobalOrder:
    """The sequences of a corpus by their position.

    A pass is the stream of all documents in an order drawn from (seed, pass). Packed, the passes follow each other without a gap
    and are cut every max_length ids; the sequences that begin in a pass are permuted. Padded, each document of a pass is a
    sequence. So after n corpora's worth of tokens each token was read n times, or n + 1 times at the cut between two passes.
    """

    def __init__(self, corpus: Corpus, order: Order):
        self._corpus, self._order = corpus, order
        self._begins = np.concatenate([[0], corpus.ends[:-1]])
        # Cached, because the sequences of a pass come one after the other; two passes, because a sequence may span them.
        self._pass = functools.lru_cache(maxsize=2)(self._drawn_pass)
        self._sequences = functools.lru_cache(maxsize=1)(self._drawn_sequences)

    def lane_sequences(self, lane: int, start: LaneState) -> Iterator[LaneSequence]:
        """The endless stream of a lane's sequences from `start` on; the first position brings the corpus's skipped records."""
        for turn in itertools.count(start.unit):
            position = lane + turn * self._order.lanes
            state = LaneState(self._pass_of(position + self._order.lanes), turn + 1)
            skipped = self._corpus.skipped if position == 0 and self._corpus.skipped.counts else None
            yield LaneSequence(self.sequence(position), state, skipped)

    def sequence(self, position: int) -> np.ndarray:
        """The ids of the sequence at a position, (n,) int32."""
        number = self._pass_of(position)
        if not self._order.packing:
            document = self._pass(number).documents[position % len(self._begins)]
            return self._corpus.ids[self._begins[document] : self._corpus.ends[document]].astype(np.int32)
        total, length = len(self._corpus.ids), self._order.max_length
        first, order = self._sequences(number)
        start = int(first + order[position - first]) * length - number * total
        parts: list[np.ndarray] = []
        missing = length
        while missing:
            parts += self._stream(number, start, min(total, start + missing))
            missing -= min(total, start + missing) - start
            number, start = number + 1, 0
        return np.concatenate(parts).astype(np.int32)

    def _pass_of(self, position: int) -> int:
        """The pass in which the sequence at a position begins."""
        if not self._order.packing:
            return position // len(self._begins)
        return position * self._order.max_length // len(self._corpus.ids)

    def _stream(self, number: int, start: int, end: int) -> Iterator[np.ndarray]:
        """The ids start to end - 1 of a pass's stream, in pieces."""
        documents, ends = self._pass(number)
        place = int(np.searchsorted(ends, start, side="right"))
        while start < end:
            stop = min(end, int(ends[place]))
            shift = int(self._corpus.ends[documents[place]]) - int(ends[place])
            yield self._corpus.ids[start + shift : stop + shift]
            start, place = stop, place + 1

    def _drawn_pass(self, number: int) -> _Pass:
        documents = _permuted(len(self._begins), self._order.seed, number, "documents")
        return _Pass(documents, np.cumsum((self._corpus.ends - self._begins)[documents]))

    def _drawn_sequences(self, number: int) -> tuple[int, np.ndarray]:
        """The first position of a pass, and for each of its positions the number of its sequence, counted from there."""
        total, length = len(self._corpus.ids), self._order.max_length
        first, end = (-(-edge * total // length) for edge in (number, number + 1))
        return first, _permuted(end - first, self._order.seed, number, "sequences")


# --- From documents to sequences: pure functions ---
#
# Padded (the published protocol): one document per sequence, cut to max_length, its last id eos. Packed: documents with eos after
# each, one after the other, cut every max_length ids; no id is dropped.


class Document(NamedTuple):
    """ids: without eos, at least one. start_token: ids (eos counts as the last) that earlier sequences already hold."""

    ids: Sequence[int] | np.ndarray
    start_token: int = 0


def padded_sequences(
    documents: Iterable[tuple[Document, Position, Position]], *, eos_id: int, max_length: int
) -> Iterator[tuple[np.ndarray, Position]]:
    """One sequence per document: its first max_length - 1 ids and eos, as transformers' truncation gives it.

    documents: (document, position at it, position after it). Yields (int32 ids, 2 to max_length of them; position after).
    """
    for document, _, after in documents:
        yield _with_eos(document.ids[: max_length - 1], eos_id), after


def packed_sequences(
    documents: Iterable[tuple[Document, Position, Position]],
    *,
    eos_id: int,
    max_length: int,
    inside: Callable[[Position, int], Position],
) -> Iterator[tuple[np.ndarray, Position]]:
    """Sequences of exactly max_length ids; the rest of a finite stream (less than max_length ids) comes last.

    inside(position of a document, ids used): the position from which a restarted stream continues inside a document. Yields
    (int32 ids, position after them).
    """
    sequence = np.empty(max_length, dtype=np.int32)
    filled = 0
    # Assigned before the first id is added, so before it is read.
    last_position: Position
    for document, here, after in documents:
        ids = _with_eos(document.ids, eos_id)
        used = document.start_token
        while used < len(ids):
            count = min(max_length - filled, len(ids) - used)
            sequence[filled : filled + count] = ids[used : used + count]
            filled, used = filled + count, used + count
            last_position = inside(here, used) if used < len(ids) else after
            if filled == max_length:
                yield sequence.copy(), last_position
                filled = 0
    if filled:
        yield sequence[:filled].copy(), last_position


def _with_eos(ids: Sequence[int] | np.ndarray, eos_id: int) -> np.ndarray:
    ended = np.empty(len(ids) + 1, dtype=np.int32)
    ended[:-1], ended[-1] = ids, eos_id
    return ended


def pad_and_label(sequences: list[np.ndarray], *, max_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences -> (input_ids, labels), both (B, max_length) int64; labels equal the ids, -100 where padded.

    Padding goes by length, never by value: pad_id may be an id of text.
    """
    input_ids = np.full((len(sequences), max_length), pad_id, dtype=np.int64)
    labels = np.full((len(sequences), max_length), IGNORE_INDEX, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        labels[row, : len(sequence)] = sequence
    return input_ids, labels
