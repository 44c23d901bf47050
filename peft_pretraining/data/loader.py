"""Micro-batches for training, resumable on any number of ranks and workers, and the fixed set for evaluation.

Shapes: B sequences of a micro-batch, T = max_length. Global position p of training belongs to lane p mod R and to rank
p mod N; see lanes.py for what a lane is, and for the two orders.
"""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    lane_offsets,
    lane_sequences,
    lane_units,
    packed_sequences,
    pad_and_label,
    padded_sequences,
)
from peft_pretraining.data.mixture import Mixture, data_orders, mixed, same_source
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

# Of the schedule by which a lane turns to the sources of a mixture; each source has an order of ORDER_VERSIONS.
MIXTURE_VERSION = 3


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


def check_tokenizer(data: Source | Mixture, tokenizer: Tokenizer) -> None:
    """Raises TokenizerError, naming both tokenizers, if prepared data was made with another tokenizer."""
    for source in data.sources:
        prepared = source.prepared
        if prepared is not None and prepared.fingerprint != tokenizer.fingerprint:
            way_out = "leave --tokenizer out, or prepare" if len(data.sources) == 1 else "prepare"
            raise TokenizerError(
                f"--tokenizer {tokenizer.name} (fingerprint {tokenizer.fingerprint}) is not the one that {source.dataset} was "
                f"prepared with: {prepared.name} (fingerprint {prepared.fingerprint}); {way_out} the data anew"
            )


# --- Training ---


class _LaneStart(NamedTuple):
    """Where a lane continues. states: in each source. drawn: tokens taken from each source under the present weights."""

    states: tuple[LaneState, ...]
    drawn: tuple[int, ...]


@dataclass(frozen=True)
class _RankLanes:
    """The lanes of one rank, each from its start on; `lanes` is in the order of their turns.

    corpora: of each source that is read in the global order, None for the others.
    """

    data: Source | Mixture
    tokenizer: Tokenizer
    order: Order
    lanes: tuple[int, ...]
    starts: tuple[_LaneStart, ...]
    corpora: tuple[Corpus | None, ...]

    def items(self, worker: int, workers: int) -> Iterator[list[LaneSequence]]:
        """Yields rounds: the next sequence of each of this worker's lanes."""
        global_orders = [None if corpus is None else GlobalOrder(corpus, self.order) for corpus in self.corpora]
        fingerprints = self.data.fingerprints() if isinstance(self.data, Mixture) else []
        lanes = [
            self._sequences(lane, start, global_orders, fingerprints)
            for lane, start in zip(self.lanes[worker::workers], self.starts[worker::workers], strict=True)
        ]
        while True:
            yield [next(lane) for lane in lanes]

    def _sequences(
        self, lane: int, start: _LaneStart, global_orders: Sequence[GlobalOrder | None], fingerprints: Sequence[str]
    ) -> Iterator[LaneSequence]:
        streams = [
            lane_sequences(source, self.tokenizer, self.order, lane, state)
            if global_order is None
            else global_order.lane_sequences(lane, state)
            for source, global_order, state in zip(self.data.sources, global_orders, start.states, strict=True)
        ]
        if isinstance(self.data, Source):
            return streams[0]
        offsets = lane_offsets(self.order, fingerprints, lane)
        turns = mixed(streams, self.data.weights or (), offsets, start.drawn)
        return (LaneSequence(ids, state, skipped, number) for number, (ids, state, skipped, _) in turns)


class TrainLoader:
    """Endless micro-batches of one rank, in the order that (seed, lanes) give for any number of ranks and workers.

    Iterating continues from the state, which covers the returned batches, not the prefetched ones. Use one iterator at a
    time.
    """

    def __init__(
        self,
        source: Source | Mixture,
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
        self._data, self._sources, self._tokenizer = source, source.sources, tokenizer
        self._order = Order(lanes, seed, max_length, packing, on_bad_record)
        self._wanted_order = data_order
        self.data_orders = data_orders(source, packing, data_order)  # of each source
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._lanes = tuple(range(rank, lanes, world_size))
        self._num_workers = min(workers, len(self._lanes))
        if rank == 0:
            self._warn(workers)
        self._pin_memory = pin_memory
        self._taken = 0  # sequences that this rank has returned since the run began
        self._begin()
        # Hashing the names of many files takes milliseconds, and the state is taken before every update.
        self._fingerprints = source.fingerprints() if isinstance(source, Mixture) else []
        self._examples_shown = 0
        self._running: Workers[list[LaneSequence]] | None = None
        self._told_of_uneven_passes = False
        check_tokenizer(source, tokenizer)
        for each in self._sources:
            check_source(each)

    def _begin(self) -> None:
        """Sets the state of each source at the beginning of a run: by lane and source, or for the whole rank by source."""
        count = len(self._sources)
        self._states = {lane: [LaneState()] * count for lane in self._lanes}
        self._drawn = {lane: [0] * count for lane in self._lanes}
        self._tokens = [0] * count
        self._skipped: list[Counter[str]] = [Counter() for _ in range(count)]
        self._corpora: list[Corpus | None] = [None] * count
        self._corpus_sizes: list[dict[str, int] | None] = [None] * count

    @property
    def data_order(self) -> str:
        """The order of the training data: lanes, global, or "mixed" where the sources of a mixture have different ones."""
        return self.data_orders[0] if len(set(self.data_orders)) == 1 else "mixed"

    def _warn(self, workers: int) -> None:
        """Warn about settings that work differently than intended: fewer processes, or more network traffic."""
        lanes = self._order.lanes
        if self._num_workers < workers:
            _log.warning(
                "--workers %d: only %d start, a process has no more of the %d data lanes",
                *(workers, self._num_workers, lanes),
            )
        for source, data_order in zip(self._sources, self.data_orders, strict=True):
            if (
                data_order == "lanes"
                and source.is_remote
                and any(u.parts > 1 for u in lane_units(source.shards, 0, self._order, 0))
            ):
                _log.warning(
                    "each of the %d data lanes reads all of %s over the network, since these files cannot be distributed evenly; "
                    "a local copy, or fewer --data_lanes, saves traffic",
                    *(lanes, source.location),
                )

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        turn = self._taken % len(self._lanes)
        lanes = self._lanes[turn:] + self._lanes[:turn]
        starts = tuple(_LaneStart(tuple(self._states[lane]), tuple(self._drawn[lane])) for lane in lanes)
        work = _RankLanes(self._data, self._tokenizer, self._order, lanes, starts, tuple(self._corpora))
        # The global order works from tokens in memory, which needs no worker.
        workers = self._num_workers if "lanes" in self.data_orders else 0
        rounds = self._rounds(work, workers) if "global" in self.data_orders else self._started(work, workers)
        return self._batches(_in_turn(rounds, lanes, max(1, workers)))

    def _started(self, work: _RankLanes, workers: int) -> Iterator[list[LaneSequence]]:
        self._running = Workers(work, workers)
        return iter(self._running)

    def _rounds(self, work: _RankLanes, workers: int) -> Iterator[list[LaneSequence]]:
        """Yields the next sequence of each lane; tokenises the sources in the global order at the first use."""
        for number, data_order in enumerate(self.data_orders):
            if data_order == "global" and self._corpora[number] is None:
                self._corpora[number] = self._read(number)
        corpora = tuple(c if order == "global" else None for c, order in zip(self._corpora, self.data_orders, strict=True))
        yield from self._started(replace(work, corpora=corpora), workers)

    def _read(self, number: int) -> Corpus:
        corpus = read_corpus(self._sources[number], self._tokenizer, self._order, self._num_workers)
        size, before = {"documents": len(corpus.ends), "tokens": len(corpus.ids)}, self._corpus_sizes[number]
        if before not in (None, size) and self._rank == 0:
            _log.warning(
                "the training data holds %s now and held %s when the checkpoint was made; its order from here on is another",
                *(_in_words(size), _in_words(before)),
            )
        self._corpus_sizes[number] = size
        return corpus

    def _batches(self, sequences: Iterator[tuple[int, LaneSequence]]) -> Iterator[Batch]:
        while True:
            taken = [next(sequences) for _ in range(self._batch_size)]
            bad_before = self.num_bad_records
            for lane, sequence in taken:
                source, length = sequence.source, len(sequence.ids)
                self._states[lane][source] = sequence.state
                self._drawn[lane][source] += length
                self._tokens[source] += length
                self._note(sequence.skipped, source)
            self._taken += len(taken)
            if self._rank == 0:
                self.warn_of_uneven_passes(self._states)
            ids = [sequence.ids for _, sequence in taken]
            num_bad = self.num_bad_records - bad_before
            yield _make_batch(ids, self._order.max_length, self._tokenizer.pad_id, self._pin_memory, num_bad)

    @property
    def num_bad_records(self) -> int:
        """Bad records skipped so far; after a resume, rank 0's count includes those of all ranks before it."""
        return sum(skipped.total() - skipped["empty"] for skipped in self._skipped)

    def row(self) -> dict[str, float]:
        """For a row of the record: each source's share of this process's tokens, and its lanes' mean number of finished passes.

        Empty for a single data set.
        """
        if isinstance(self._data, Source):
            return {}
        total = max(1, sum(self._tokens))
        row: dict[str, float] = {}
        for number, source in enumerate(self._sources):
            passes = sum(states[number].epoch for states in self._states.values())
            row[f"data_share/{source.dataset}"] = self._tokens[number] / total
            row[f"data_passes/{source.dataset}"] = passes / len(self._lanes)
            if bad := self._skipped[number].total() - self._skipped[number]["empty"]:
                row[f"data_bad_records/{source.dataset}"] = bad
        return row

    def warn_of_uneven_passes(self, states: Mapping[Any, Sequence[Any]]) -> None:
        """Warns once if lanes have finished numbers of passes of a source that differ by more than one. states: by lane."""
        for number, source in enumerate(self._sources):
            if self.data_orders[number] == "lanes" and not self._told_of_uneven_passes:
                passes = {int(lane): _by_source(state)[number][0] for lane, state in states.items()}
                self._warn_if_uneven(source, passes)

    def _warn_if_uneven(self, source: Source, passes: Mapping[int, int]) -> None:
        most, least = max(passes, key=passes.__getitem__), min(passes, key=passes.__getitem__)
        if passes[most] - passes[least] <= 1:
            return
        self._told_of_uneven_passes = True
        _log.warning(
            "the data lanes hold unequal shares of the text%s: lane %d has read its documents %d times, lane %d %d times; for a "
            "new run, %sfewer --data_lanes are more equal",
            "" if isinstance(self._data, Source) else f" of {source.dataset}",
            *(most, passes[most], least, passes[least]),
            "--data_order global reads every document equally often, and " if source.has_sizes else "",
        )

    def _note(self, skipped: SkippedRecords | None, source: int) -> None:
        if skipped is None:
            return
        self._skipped[source].update(skipped.counts)
        for example in skipped.examples[: max(0, MAX_EXAMPLES - self._examples_shown)]:
            self._examples_shown += 1
            last = "; further ones are only counted" if self._examples_shown == MAX_EXAMPLES else ""
            _log.warning("bad record passed over: %s%s", example, last)

    def state_dict(self) -> dict[str, Any]:
        """Returns the JSON-able state after the last returned batch; `load_state_dict` takes all ranks' states, merged.

        position: sequences returned by all ranks since the run began. lanes: this rank's lanes, five integers each.
        bad_records: skipped records, by kind. order: the settings of the order that the positions refer to. corpus: documents
        and tokens, in the global order.

        Of a mixture, each lane has six integers per source (the sixth: tokens drawn under the present weights), and `sources`
        holds what belongs to each source.
        """
        state: dict[str, Any] = {
            "position": self._taken * self._world_size,
            "lanes": {str(lane): list(states[0]) for lane, states in self._states.items()},
            "bad_records": dict(sorted(sum(self._skipped, Counter()).items())),
            "order": self._order_document(),
        }
        if isinstance(self._data, Mixture):
            state["lanes"] = {
                str(lane): [[*position, drawn] for position, drawn in zip(states, self._drawn[lane], strict=True)]
                for lane, states in self._states.items()
            }
            state["sources"] = [self._source_state(number) for number in range(len(self._sources))]
        elif self._corpus_sizes[0]:
            state["corpus"] = self._corpus_sizes[0]
        return state

    def _source_state(self, number: int) -> dict[str, Any]:
        """The state of a mixture's source over all lanes; tokens: that this rank has returned."""
        source, weights = self._sources[number], self._data.weights if isinstance(self._data, Mixture) else None
        return {
            "dataset": source.dataset,
            "fingerprint": self._fingerprints[number],
            "weight": weights[number] if weights else 1.0,
            "order_version": ORDER_VERSIONS[self.data_orders[number]],
            "corpus": self._corpus_sizes[number],
            "tokens": self._tokens[number],
            "bad_records": dict(sorted(self._skipped[number].items())),
        }

    def _order_document(self) -> dict[str, Any]:
        order = self._order
        single = isinstance(self._data, Source)
        return {
            "version": ORDER_VERSIONS[self.data_orders[0]] if single else MIXTURE_VERSION,
            "lanes": order.lanes,
            "seed": order.seed,
            "max_length": order.max_length,
            "packing": order.packing,
        }

    def load_state_dict(self, state: Mapping[str, Any], began_with: tuple[str, str] = ("", "")) -> None:
        """Continue from a state merged over all ranks, for any number of ranks and workers; call before iterating.

        The state's order is kept, unless other files took the place of its corpus and cannot be held in memory. A source that a
        mixture did not have before begins at its start, and changed weights begin their schedule anew.

        began_with: name and fingerprint of the run's data set when the state was saved. A state of a single data set does not
            name it; with these it is found among the data sets of a mixture.

        Raises ValueError: the state belongs to another order, lacks lanes, or cannot be divided among the ranks.
        """
        kept = _kept_sources(state, began_with)
        single = isinstance(self._data, Source) and "sources" not in state
        states = kept if single else [same_source(source, kept) for source in self._sources]
        orders = zip(self._sources, states, self.data_orders, strict=True)
        self.data_orders = tuple(self._order_of(*each) for each in orders)
        order = {**state["order"], "version": self._order_document()["version"]}
        if order != self._order_document() or any(each["order_version"] not in ORDER_VERSIONS.values() for each in kept):
            raise ValueError(f"the data state is of another order: saved {state['order']}, now {self._order_document()}")
        missing = [lane for lane in self._lanes if str(lane) not in state["lanes"]]
        if missing:
            raise ValueError(f"the data state lacks lanes {missing[:5]}: merge the states of all ranks first")
        if state["position"] % self._world_size:
            raise ValueError(
                f"the data position {state['position']} is no multiple of the {self._world_size} processes; "
                "resume on a number of processes that divides the total batch"
            )
        self._take(state["position"], states, same_weights=_weights(kept) == _weights(self.state_dict().get("sources", ())))
        if self._rank:
            # The counts are those of all ranks together; only rank 0 keeps them, so that the next merge counts them once.
            self._skipped, self._tokens = [Counter() for _ in self._sources], [0] * len(self._sources)

    def _order_of(self, source: Source, kept: Mapping[str, Any] | None, order: DataOrder) -> DataOrder:
        """Returns the order in which a source continues: its state's. Raises ValueError if --data_order asks for another."""
        if kept is None:
            return order
        recorded: DataOrder = "global" if kept["order_version"] == ORDER_VERSIONS["global"] else "lanes"
        if self._wanted_order not in (None, recorded):
            raise ValueError(
                f"--data_order {self._wanted_order}: the run began with the order {recorded}; leave --data_order out"
            )
        return recorded if source.has_sizes else "lanes"

    def take_back(self, state: Mapping[str, Any]) -> None:
        """Return to an earlier `state_dict` of this rank; batches returned since then are returned again. Ends iterating."""
        self._take(state["position"], _kept_sources(state, ("", "")), same_weights=True)

    def _take(self, position: int, states: Sequence[Mapping[str, Any] | None], same_weights: bool) -> None:
        """Sets the state; states: the state of each source, None for one that begins."""
        self.close()
        self._taken = position // self._world_size
        for number, kept in enumerate(states):
            # Positions of another order say nothing.
            known = kept is not None and kept["order_version"] == ORDER_VERSIONS[self.data_orders[number]]
            for lane in self._lanes:
                numbers: Sequence[int] = kept["lanes"][str(lane)] if kept is not None and known else ()
                self._states[lane][number] = LaneState(*numbers[:5])
                self._drawn[lane][number] = numbers[5] if same_weights and len(numbers) > 5 else 0
            self._tokens[number] = kept["tokens"] if kept is not None else 0
            self._skipped[number] = Counter(kept["bad_records"] if kept is not None else {})
            self._corpus_sizes[number] = kept["corpus"] if kept is not None and known else None

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


def _by_source(numbers: Sequence[Any]) -> Sequence[Sequence[int]]:
    """The numbers of a lane by source; a single data set's lanes have one list of numbers."""
    return [numbers] if isinstance(numbers[0], int) else numbers


def _kept_sources(state: Mapping[str, Any], began_with: tuple[str, str]) -> list[dict[str, Any]]:
    """The state of each source with its lanes; that of a single data set, named by `began_with`, has the same keys."""
    single = {
        "dataset": began_with[0],
        "fingerprint": began_with[1],
        "weight": 1.0,
        "order_version": state["order"]["version"],
        "corpus": state.get("corpus"),
        "tokens": 0,  # not counted
        "bad_records": state["bad_records"],
    }
    return [
        {**source, "lanes": {lane: _by_source(numbers)[number] for lane, numbers in state["lanes"].items()}}
        for number, source in enumerate(state.get("sources", [single]))
    ]


def _weights(sources: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    return sorted((source["fingerprint"], source["weight"]) for source in sources)


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all ranks, taken after the same number of batches. Raises ValueError if they disagree."""
    positions = {state["position"] for state in states}
    if len(positions) != 1:
        raise ValueError(f"ranks have read to different positions: {sorted(positions)}")
    if any(state["order"] != states[0]["order"] for state in states):
        raise ValueError("ranks read in different orders")
    lanes = {lane: numbers for state in states for lane, numbers in state["lanes"].items()}
    sources = [_merged_source(each) for each in zip(*(state.get("sources", ()) for state in states), strict=True)]
    return {
        "position": states[0]["position"],
        "lanes": {lane: list(lanes[lane]) for lane in sorted(lanes, key=int)},
        "bad_records": _summed([state["bad_records"] for state in states]),
        "order": dict(states[0]["order"]),
        **({"corpus": dict(states[0]["corpus"])} if "corpus" in states[0] else {}),
        **({"sources": sources} if sources else {}),
    }


def _merged_source(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    bad_records, tokens = _summed([state["bad_records"] for state in states]), sum(state["tokens"] for state in states)
    return {**states[0], "bad_records": bad_records, "tokens": tokens}


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum(map(Counter, counts), Counter()).items()))


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
        source: Source | Mixture,
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
        self._data, self._tokenizer = source, tokenizer
        self._max_length, self._packing, self._max_tokens = max_length, packing, max_tokens
        self._rank, self._world_size, self._batch_size, self._workers = rank, world_size, batch_size, workers
        self._pin_memory, self._on_bad_record = pin_memory, on_bad_record
        self._kept: tuple[np.ndarray, np.ndarray] | None = None
        check_tokenizer(source, tokenizer)
        for each in source.sources:
            check_source(each)

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
            sequences = self._of_mixture() if isinstance(self._data, Mixture) else self._of_source(self._data, self._max_tokens)
            offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
            self._kept = np.concatenate(sequences), offsets
        return self._kept

    def _of_mixture(self) -> list[np.ndarray]:
        """The sequences of the sources, with targets in the shares of their weights, as many as the shortest source allows."""
        assert isinstance(self._data, Mixture)
        assert self._data.weights is not None
        weights, most = self._data.weights, self._max_tokens
        wanted = [None if most is None else math.ceil(weight * most) for weight in weights]
        by_source = [self._of_source(*each) for each in zip(self._data.sources, wanted, strict=True)]
        targets = [np.cumsum([len(ids) - 1 for ids in sequences]) for sequences in by_source]
        reached = [int(ends[-1]) / weight for ends, weight in zip(targets, weights, strict=True)]
        total = min(most or math.inf, *reached)
        shortest = reached.index(min(reached))
        if total != most and self._rank == 0:
            _log.warning(
                "evaluation on about %s targets, so that data sets have their shares: the held-out part of %s has no more than "
                "%s; more of it, or --eval_dataset, allows more",
                *(f"{total:,.0f}", self._data.sources[shortest].dataset, f"{targets[shortest][-1]:,}"),
            )
        counts = [1 + int(np.searchsorted(ends, weight * total)) for ends, weight in zip(targets, weights, strict=True)]
        return [ids for sequences, count in zip(by_source, counts, strict=True) for ids in sequences[:count]]

    def _of_source(self, source: Source, most: int | None) -> list[np.ndarray]:
        """The first sequences of a source, until they have `most` targets. Raises DataError: there are none."""
        dtype = np.uint16 if self._tokenizer.text_vocab_size <= 2**16 else np.int32
        sequences, num_targets = [], 0
        enough = None if self._packing else self._max_length - 1
        texts = _encoded_texts(source, self._tokenizer, self._on_bad_record, enough, self._workers)
        with contextlib.closing(texts):
            for sequence in self._sequences(texts):
                sequences.append(sequence.astype(dtype))
                num_targets += len(sequence) - 1
                if most is not None and num_targets >= most:
                    break
        if not sequences:
            raise DataError(f"dataset {source.dataset!r} has no document to evaluate on; give --eval_dataset, or more data")
        return sequences

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
