"""Micro-batches for training, resumable on any number of ranks and workers, and the fixed set for evaluation.

Shapes: B sequences of a micro-batch, T = max_length. Global position p of training belongs to lane p mod R and to rank
p mod N; see lanes.py for what a lane is, and for the two orders.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peft_pretraining.data import DataError, TokenizerError
from peft_pretraining.data.lanes import (
    ORDER_VERSIONS,
    Corpus,
    Document,
    GlobalOrder,
    LaneSequence,
    LaneState,
    Order,
    lane_sequences,
    lane_units,
    packed_sequences,
    pad_and_label,
    padded_sequences,
)
from peft_pretraining.data.records import (
    MAX_EXAMPLES,
    UNREADABLE_FILE,
    BadRecord,
    Health,
    OnBadRecord,
    SkippedRecords,
    check_source,
    document_in_split,
    read_records,
)
from peft_pretraining.data.source import DataOrder, Source
from peft_pretraining.data.tokenizer import Tokenizer, encode_documents
from peft_pretraining.data.workers import Workers

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A micro-batch. input_ids, labels: (B, T) int64; labels equal the ids, and are -100 where padded, as in transformers.

    num_tokens: ids that are not padding. num_targets: labels that are not ignored after the shift by one. num_bad_records: bad
    records skipped since the batch before.
    """

    input_ids: Tensor
    labels: Tensor
    num_tokens: int
    num_targets: int
    num_bad_records: int = 0


def _make_batch(
    sequences: list[np.ndarray], max_length: int, pad_id: int, pin_memory: bool = False, num_bad_records: int = 0
) -> Batch:
    input_ids, labels = map(torch.from_numpy, pad_and_label(sequences, max_length=max_length, pad_id=pad_id))
    if pin_memory:
        input_ids, labels = input_ids.pin_memory(), labels.pin_memory()
    num_tokens = sum(map(len, sequences))
    return Batch(input_ids, labels, num_tokens, num_tokens - len(sequences), num_bad_records)


def check_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    """Raises TokenizerError, naming both tokenizers, if prepared data was made with another tokenizer."""
    prepared = source.prepared
    if prepared is not None and prepared.fingerprint != tokenizer.fingerprint:
        raise TokenizerError(
            f"--tokenizer {tokenizer.name} (fingerprint {tokenizer.fingerprint}) is not the one that {source.dataset} was "
            f"prepared with: {prepared.name} (fingerprint {prepared.fingerprint}); leave --tokenizer out, or prepare "
            "the data anew"
        )


# --- Training ---


@dataclass(frozen=True)
class _RankLanes:
    """The lanes of one rank, each from its state on; `lanes` is in the order of their turns."""

    source: Source
    tokenizer: Tokenizer
    order: Order
    lanes: tuple[int, ...]
    states: tuple[LaneState, ...]

    def items(self, worker: int, workers: int) -> Iterator[list[LaneSequence]]:
        """Yields rounds: the next sequence of each of this worker's lanes."""
        lanes = [
            lane_sequences(self.source, self.tokenizer, self.order, lane, state)
            for lane, state in zip(self.lanes[worker::workers], self.states[worker::workers], strict=True)
        ]
        while True:
            yield [next(lane) for lane in lanes]


class TrainLoader:
    """Endless micro-batches of one rank, in the order that (seed, lanes) give for any number of ranks and workers.

    Iterating continues from the state, which covers the returned batches, not the prefetched ones. Use one iterator at a
    time.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        packing: bool,
        lanes: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        batch_size: int = 1,
        pin_memory: bool = False,
        on_bad_record: OnBadRecord = "skip",
        data_order: DataOrder | None = None,
    ):
        """Checks the arguments and reads a first document.

        Args:
            max_length: ids per sequence, T. batch_size: sequences per micro-batch, B.
            packing: fill sequences with documents end to end; otherwise one document each, cut and padded.
            lanes: virtual readers, R; a multiple of world_size.
            workers: processes that read and tokenise for this rank; 0 does it in this process.
            pin_memory: batches in page-locked memory, for a GPU.
            on_bad_record: skip and count records that are not documents and files that cannot be read, or raise
                DataError at the first.
            data_order: lanes | global (lanes.py); None leaves it to the source. A state brings its own.

        Raises:
            ValueError: the numbers of lanes, processes, sequences or workers are out of range or do not divide.
            DataError: the source cannot be read or holds nothing, or its size is unknown, which the global order needs.
            TokenizerError: the source is prepared with another tokenizer.
        """
        _check_sizes(max_length=max_length, lanes=lanes, world_size=world_size, batch_size=batch_size, workers=workers)
        self._source, self._tokenizer = source, tokenizer
        self._order = Order(lanes, seed, max_length, packing, on_bad_record)
        self._wanted_order = data_order
        self.data_order = source.data_order(packing, data_order)
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._lanes = tuple(range(rank, lanes, world_size))
        self._num_workers = min(workers, len(self._lanes))
        if rank == 0:
            self._warn(workers)
        self._pin_memory = pin_memory
        self._taken = 0  # sequences that this rank has returned since the run began
        self._states = dict.fromkeys(self._lanes, LaneState())
        self._skipped: Counter[str] = Counter()
        self._examples_shown = 0
        self._running: Workers[list[LaneSequence]] | None = None
        self._global_order: GlobalOrder | None = None
        self._corpus_size: dict[str, int] | None = None
        self._told_of_uneven_passes = False
        check_tokenizer(source, tokenizer)
        check_source(source)

    def _warn(self, workers: int) -> None:
        """Warn about settings that work differently than intended: fewer processes, or more network traffic."""
        source, lanes = self._source, self._order.lanes
        if self._num_workers < workers:
            _log.warning(
                "--workers %d: only %d start, a process has no more of the %d data lanes",
                *(workers, self._num_workers, lanes),
            )
        by_lanes = self.data_order == "lanes"
        if by_lanes and source.is_remote and any(unit.parts > 1 for unit in lane_units(source.shards, 0, self._order, 0)):
            _log.warning(
                "each of the %d data lanes reads all of %s over the network, since these files cannot be distributed evenly; "
                "a local copy, or fewer --data_lanes, saves traffic",
                *(lanes, source.location),
            )

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        turn = self._taken % len(self._lanes)
        lanes = self._lanes[turn:] + self._lanes[:turn]
        states = tuple(self._states[lane] for lane in lanes)
        if self.data_order == "global":
            return self._batches(_in_turn(self._global_rounds(lanes, states), lanes, 1))
        work = _RankLanes(self._source, self._tokenizer, self._order, lanes, states)
        self._running = Workers(work, self._num_workers)
        return self._batches(_in_turn(iter(self._running), lanes, max(1, self._num_workers)))

    def _global_rounds(self, lanes: Sequence[int], states: Sequence[LaneState]) -> Iterator[list[LaneSequence]]:
        """Yields the next sequence of each lane; tokenises the corpus at the first use."""
        if self._global_order is None:
            corpus = read_corpus(self._source, self._tokenizer, self._order, self._num_workers)
            size = {"documents": len(corpus.ends), "tokens": len(corpus.ids)}
            if self._corpus_size not in (None, size) and self._rank == 0:
                _log.warning(
                    "the training data holds %s now and held %s when the checkpoint was made; its order from here on is another",
                    *(_in_words(size), _in_words(self._corpus_size)),
                )
            self._corpus_size, self._global_order = size, GlobalOrder(corpus, self._order)
        streams = [self._global_order.lane_sequences(*each) for each in zip(lanes, states, strict=True)]
        while True:
            yield [next(stream) for stream in streams]

    def _batches(self, sequences: Iterator[tuple[int, LaneSequence]]) -> Iterator[Batch]:
        while True:
            taken = [next(sequences) for _ in range(self._batch_size)]
            bad_before = self.num_bad_records
            for lane, sequence in taken:
                self._states[lane] = sequence.state
                self._note(sequence.skipped)
            self._taken += len(taken)
            if self._rank == 0:
                self.warn_of_uneven_passes(self._states)
            ids = [sequence.ids for _, sequence in taken]
            num_bad = self.num_bad_records - bad_before
            yield _make_batch(ids, self._order.max_length, self._tokenizer.pad_id, self._pin_memory, num_bad)

    @property
    def num_bad_records(self) -> int:
        """Bad records skipped so far; after a resume, rank 0's count includes those of all ranks before it."""
        return self._skipped.total() - self._skipped["empty"]

    def warn_of_uneven_passes(self, states: Mapping[Any, Sequence[int]]) -> None:
        """Warns once if lanes have finished numbers of passes that differ by more than one. states: by lane."""
        if self.data_order == "global" or self._told_of_uneven_passes:
            return
        passes = {int(lane): state[0] for lane, state in states.items()}
        most, least = max(passes, key=passes.__getitem__), min(passes, key=passes.__getitem__)
        if passes[most] - passes[least] <= 1:
            return
        self._told_of_uneven_passes = True
        _log.warning(
            "the data lanes hold unequal shares of the text: lane %d has read its documents %d times, lane %d %d times; for a "
            "new run, %sfewer --data_lanes are more equal",
            *(most, passes[most], least, passes[least]),
            "--data_order global reads every document equally often, and " if self._source.has_sizes else "",
        )

    def _note(self, skipped: SkippedRecords | None) -> None:
        if skipped is None:
            return
        self._skipped.update(skipped.counts)
        for example in skipped.examples[: max(0, MAX_EXAMPLES - self._examples_shown)]:
            self._examples_shown += 1
            last = "; further ones are only counted" if self._examples_shown == MAX_EXAMPLES else ""
            _log.warning("bad record passed over: %s%s", example, last)

    def state_dict(self) -> dict[str, Any]:
        """Returns the JSON-able state after the last returned batch; `load_state_dict` takes all ranks' states, merged.

        position: sequences returned by all ranks since the run began. lanes: this rank's lanes, five integers each.
        bad_records: skipped records, by kind. order: the settings of the order that the positions refer to. corpus: documents
        and tokens, in the global order.
        """
        return {
            "position": self._taken * self._world_size,
            "lanes": {str(lane): list(state) for lane, state in self._states.items()},
            "bad_records": dict(sorted(self._skipped.items())),
            "order": self._order_document(),
            **({"corpus": self._corpus_size} if self._corpus_size else {}),
        }

    def _order_document(self) -> dict[str, Any]:
        order = self._order
        return {
            "version": ORDER_VERSIONS[self.data_order],
            "lanes": order.lanes,
            "seed": order.seed,
            "max_length": order.max_length,
            "packing": order.packing,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state merged over all ranks, for any number of ranks and workers; call before iterating.

        The state's order is kept, unless other files took the place of its corpus and cannot be held in memory.

        Raises ValueError: the state belongs to another order, lacks lanes, or cannot be divided among the ranks.
        """
        recorded: DataOrder = "global" if state["order"]["version"] == ORDER_VERSIONS["global"] else "lanes"
        if self._wanted_order not in (None, recorded):
            raise ValueError(
                f"--data_order {self._wanted_order}: the run began with the order {recorded}; leave --data_order out"
            )
        self.data_order = recorded if self._source.has_sizes else "lanes"
        if self.data_order != recorded:
            order = {**state["order"], "version": ORDER_VERSIONS["lanes"]}
            state = {**state, "order": order, "lanes": dict.fromkeys(state["lanes"], LaneState()), "corpus": None}
        if state["order"] != self._order_document():
            raise ValueError(f"the data state is of another order: saved {state['order']}, now {self._order_document()}")
        missing = [lane for lane in self._lanes if str(lane) not in state["lanes"]]
        if missing:
            raise ValueError(f"the data state lacks lanes {missing[:5]}: merge the states of all ranks first")
        if state["position"] % self._world_size:
            raise ValueError(
                f"the data position {state['position']} is no multiple of the {self._world_size} processes; "
                "resume on a number of processes that divides the total batch"
            )
        self.take_back(state)
        if self._rank:
            # The counts are those of all ranks together; only rank 0 keeps them, so that the next merge counts them once.
            self._skipped.clear()

    def take_back(self, state: Mapping[str, Any]) -> None:
        """Return to an earlier `state_dict` of this rank; batches returned since then are returned again. Ends iterating."""
        self.close()
        self._taken = state["position"] // self._world_size
        self._states = {lane: LaneState(*state["lanes"][str(lane)]) for lane in self._lanes}
        self._skipped = Counter(state["bad_records"])
        self._corpus_size = state.get("corpus")

    def close(self) -> None:
        """Stop the workers. The state stays, and iterating again continues from it."""
        if self._running is not None:
            self._running.close()
            self._running = None


def _in_turn(rounds: Iterator[list[LaneSequence]], lanes: Sequence[int], workers: int) -> Iterator[tuple[int, LaneSequence]]:
    """Yields (lane, its next sequence), lane after lane: one item of each worker is a round over all lanes."""
    while True:
        items = [next(rounds) for _ in range(workers)]
        for turn, lane in enumerate(lanes):
            yield lane, items[turn % workers][turn // workers]


def _in_words(size: Mapping[str, int] | None) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in (size or {}).items())


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all ranks, taken after the same number of batches. Raises ValueError if they disagree."""
    positions = {state["position"] for state in states}
    if len(positions) != 1:
        raise ValueError(f"ranks have read to different positions: {sorted(positions)}")
    if any(state["order"] != states[0]["order"] for state in states):
        raise ValueError("ranks read in different orders")
    lanes = {lane: numbers for state in states for lane, numbers in state["lanes"].items()}
    bad_records: Counter[str] = Counter()
    for state in states:
        bad_records.update(state["bad_records"])
    return {
        "position": states[0]["position"],
        "lanes": {lane: list(lanes[lane]) for lane in sorted(lanes, key=int)},
        "bad_records": dict(sorted(bad_records.items())),
        "order": dict(states[0]["order"]),
        **({"corpus": dict(states[0]["corpus"])} if "corpus" in states[0] else {}),
    }


def _check_sizes(*, max_length: int, lanes: int, world_size: int, batch_size: int, workers: int) -> None:
    if max_length < 2:
        raise ValueError(f"--max_length {max_length}: must be at least 2, a token and the one it predicts")
    if lanes < 1 or lanes % world_size:
        fitting = ", ".join(str(world_size * k) for k in range(max(1, lanes // world_size), lanes // world_size + 3))
        raise ValueError(f"--data_lanes {lanes}: must be a multiple of the {world_size} processes, such as {fitting}")
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size}: must be at least 1")
    if workers < 0:
        raise ValueError(f"--workers {workers}: must be at least 0")


# --- Whole splits ---


class _EncodedTexts(NamedTuple):
    """The documents of a chunk: their ids end to end, int32, and the number of ids of each."""

    ids: np.ndarray
    lengths: list[int]
    skipped: SkippedRecords | None


@dataclass(frozen=True)
class _SplitDocuments:
    """All documents of a source in their order, tokenised in chunks that workers take in turn."""

    source: Source
    tokenizer: Tokenizer
    on_bad_record: OnBadRecord
    enough: int | None  # number of ids needed of a document, None for all
    chunk: int = 64

    def items(self, worker: int, workers: int) -> Iterator[_EncodedTexts]:
        skipped = SkippedRecords()
        for number, documents in enumerate(self._chunks(skipped)):
            if number % workers == worker:
                ids = [np.asarray(each, dtype=np.int32) for each in encode_documents(self.tokenizer, documents, self.enough)]
                flat = np.concatenate([np.empty(0, np.int32), *ids])
                # Every worker reads every record; the first worker reports the bad ones.
                yield _EncodedTexts(flat, [len(document) for document in ids], skipped.take() if not worker else None)
        if not worker:
            yield _EncodedTexts(np.empty(0, np.int32), [], skipped.take())

    def _chunks(self, skipped: SkippedRecords) -> Iterator[list[str | np.ndarray]]:
        documents: list[str | np.ndarray] = []
        health = Health(self.source, self.on_bad_record)
        for index, shard in enumerate(self.source.shards):
            health.tried.add(index)
            for record in read_records(shard, self.source):
                health.records += 1
                content = document_in_split(record, shard, self.source)
                if isinstance(content, BadRecord):
                    if content.kind == UNREADABLE_FILE:
                        health.file_unreadable(index, content.detail)
                    skipped.add(content.kind, health.bad_record(content, index, record))
                elif content is not None:
                    documents.append(content)
                if len(documents) == self.chunk:
                    yield documents
                    documents = []
        yield documents


def _encoded_texts(
    source: Source, tokenizer: Tokenizer, on_bad_record: OnBadRecord, enough: int | None, workers: int
) -> Generator[_EncodedTexts]:
    """All documents of a source in their order, tokenised by worker processes; prepared data needs none."""
    work = _SplitDocuments(source, tokenizer, on_bad_record, enough)
    chunks: Workers[_EncodedTexts] = Workers(work, 0 if source.prepared is not None else workers)
    try:
        yield from chunks
    finally:
        chunks.close()


def read_corpus(source: Source, tokenizer: Tokenizer, order: Order, workers: int = 0) -> Corpus:
    """Reads and tokenises all of a source; padded, each document is cut to a sequence. Raises DataError."""
    dtype = np.uint16 if tokenizer.text_vocab_size <= 2**16 else np.int32
    most = None if order.packing else order.max_length - 1
    parts: list[np.ndarray] = []
    skipped = SkippedRecords()
    with contextlib.closing(_encoded_texts(source, tokenizer, order.on_bad_record, most, workers)) as chunks:
        for chunk in chunks:
            for document in np.split(chunk.ids, np.cumsum(chunk.lengths)[:-1]) if chunk.lengths else []:
                if len(document):
                    parts.append(np.append(document[:most], tokenizer.eos_id).astype(dtype))
                else:
                    skipped.add("empty")
            if chunk.skipped is not None:
                skipped.counts.update(chunk.skipped.counts)
                skipped.examples += chunk.skipped.examples
    if not parts:
        bad = f" (bad records: {skipped.examples[0]})" if skipped.examples else ""
        raise DataError(f"dataset {source.dataset!r}: no document of the {source.split} split holds a token{bad}; give more data")
    return Corpus(np.concatenate(parts), np.cumsum([len(part) for part in parts], dtype=np.int64), skipped)


# --- Evaluation ---


class EvalSet:
    """The held-out sequences, the same for any batch size and number of ranks; can be iterated repeatedly.

    Sequences stand in the order of the files, in the layout of training; sequence i belongs to rank i mod N. It ends
    with the sequence at which the number of targets reaches max_tokens. Tokenised at the first use and kept (2 bytes
    per token for vocabularies up to 65,536).
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        packing: bool,
        max_tokens: int | None,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        on_bad_record: OnBadRecord = "skip",
    ):
        """max_tokens: targets to stop at, None for the whole split. Otherwise as TrainLoader, errors included."""
        _check_sizes(max_length=max_length, lanes=world_size, world_size=world_size, batch_size=batch_size, workers=workers)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"--eval_tokens {max_tokens}: must be at least 1")
        self._source, self._tokenizer = source, tokenizer
        self._max_length, self._packing, self._max_tokens = max_length, packing, max_tokens
        self._rank, self._world_size, self._batch_size, self._workers = rank, world_size, batch_size, workers
        self._pin_memory, self._on_bad_record = pin_memory, on_bad_record
        self._kept: tuple[np.ndarray, np.ndarray] | None = None
        check_tokenizer(source, tokenizer)
        check_source(source)

    def prepare(self) -> None:
        """Reads and tokenises the evaluation data, unless done before; iterating does so too. Raises DataError."""
        self._tokenised()

    @property
    def num_sequences(self) -> int:
        """Sequences of all ranks."""
        return len(self._tokenised()[1]) - 1

    @property
    def num_targets(self) -> int:
        """Predicted tokens of all ranks."""
        ids, offsets = self._tokenised()
        return len(ids) - (len(offsets) - 1)

    def __iter__(self) -> Iterator[Batch]:
        ids, offsets = self._tokenised()
        indices = range(self._rank, len(offsets) - 1, self._world_size)
        # The same number of batches on every rank, perhaps with an empty last one: a sharded model's forward pass is collective.
        for first in range(0, -(-(len(offsets) - 1) // self._world_size), self._batch_size):
            sequences = [ids[offsets[i] : offsets[i + 1]] for i in indices[first : first + self._batch_size]]
            yield _make_batch(sequences or [ids[:1]], self._max_length, self._tokenizer.pad_id, self._pin_memory)

    def _tokenised(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of all sequences end to end, and the offsets of their starts and of the last end."""
        if self._kept is None:
            dtype = np.uint16 if self._tokenizer.text_vocab_size <= 2**16 else np.int32
            sequences, num_targets = [], 0
            enough = None if self._packing else self._max_length - 1
            texts = _encoded_texts(self._source, self._tokenizer, self._on_bad_record, enough, self._workers)
            with contextlib.closing(texts):
                for sequence in self._sequences(texts):
                    sequences.append(sequence.astype(dtype))
                    num_targets += len(sequence) - 1
                    if self._max_tokens is not None and num_targets >= self._max_tokens:
                        break
            if not sequences:
                raise DataError(
                    f"dataset {self._source.dataset!r} has no document to evaluate on; give --eval_dataset, or more data"
                )
            offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
            self._kept = np.concatenate(sequences), offsets
        return self._kept

    def _sequences(self, chunks: Iterator[_EncodedTexts]) -> Iterator[np.ndarray]:
        documents = ((Document(ids), None, None) for ids in self._documents(chunks))
        eos_id, max_length = self._tokenizer.eos_id, self._max_length
        if self._packing:
            sequences = packed_sequences(documents, eos_id=eos_id, max_length=max_length, inside=lambda here, used: here)
        else:
            sequences = padded_sequences(documents, eos_id=eos_id, max_length=max_length)
        return (ids for ids, _ in sequences)

    def _documents(self, chunks: Iterator[_EncodedTexts]) -> Iterator[list[int]]:
        shown = 0
        for chunk in chunks:
            for example in chunk.skipped.examples if chunk.skipped and shown < MAX_EXAMPLES else []:
                shown += 1
                _log.warning("bad record passed over in evaluation: %s", example)
            end = 0
            for length in chunk.lengths:
                end += length
                if length:
                    yield chunk.ids[end - length : end].tolist()
