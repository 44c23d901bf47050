"""The global order: every token of a small corpus is read about equally often, however unequal its documents are."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import ByteTokenizer, json_lines, texts
from hypothesis import given
from hypothesis import strategies as st

from peft_pretraining.data import DataError
from peft_pretraining.data.lanes import Corpus, GlobalOrder, LaneState, Order
from peft_pretraining.data.loader import TrainLoader, merge_states
from peft_pretraining.data.records import SkippedRecords
from peft_pretraining.data.source import GLOBAL_ORDER_BYTES, RetryPolicy, Shard, Source, open_source


class NumberTokenizer(ByteTokenizer):
    """Gives all words of document "i i i ..." the id i + 2, so that an id tells its document."""

    text_vocab_size = vocab_size = 60_000

    def encode_batch(self, texts):
        return [[int(text.split()[0]) + 2] * len(text.split()) for text in texts]


def numbered(folder: Path, lengths: list[int], files: int = 1) -> Source:
    """A corpus whose document i has lengths[i] words, for a NumberTokenizer."""
    folder.mkdir(exist_ok=True)
    documents = [" ".join([str(number)] * length) for number, length in enumerate(lengths)]
    for file in range(files):
        (folder / f"{file}.jsonl").write_bytes(json_lines(documents[file::files]))
    return open_source(str(folder), "train", hold_out=False)


def loaders(source, tokenizer, ranks=1, workers=0, **options):
    defaults = {"max_length": 64, "packing": True, "lanes": 24, "seed": 1}
    return [
        TrainLoader(source, tokenizer, rank=rank, world_size=ranks, workers=workers, **{**defaults, **options})
        for rank in range(ranks)
    ]


def reads(source: Source, lengths: list[int], corpora: int, **options) -> np.ndarray:
    """How often each document was read after that many corpora's worth of tokens: its ids that came, by its length."""
    (loader,) = loaders(source, NumberTokenizer(), **options)
    tokens, counts, seen = sum(lengths) + len(lengths), np.zeros(len(lengths)), 0
    for batch in loader:
        ids = batch.input_ids.numpy().ravel()
        counts += np.bincount(ids[ids > 1] - 2, minlength=len(lengths))
        seen += batch.num_tokens
        if seen >= corpora * tokens:
            return counts / lengths
    raise AssertionError("a loader is endless")


BOOK = [40 + number % 30 for number in range(59)] + [100_000]
SKEWED = [int(20 * 1.03**number) for number in range(200)]


@pytest.mark.parametrize("corpora", [1, 3, 10])
@pytest.mark.parametrize(("lengths", "files"), [(BOOK, 1), (BOOK, 5), (SKEWED, 3), ([100] * 30, 1), ([7] * 5, 1)])
def test_after_n_corpora_of_tokens_each_document_was_read_n_times(tmp_path, lengths, files, corpora):
    """Within one; the few tokens of a corpus smaller than a sequence come once more for each pass that a sequence spans."""
    found = reads(numbered(tmp_path / "text", lengths, files), lengths, corpora)
    spanned = 64 // (sum(lengths) + len(lengths))
    assert corpora <= found.min() <= found.max() <= corpora + 1 + spanned


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    max_length=st.integers(2, 50),
    lanes=st.integers(1, 7),
    passes=st.integers(1, 5),
)
def test_the_sequences_of_n_passes_are_the_streams_of_n_passes(lengths, max_length, lanes, passes):
    """Cut in one stream: all ids of pass 0, of pass 1, ..., each a permutation of whole documents with eos after each."""
    documents = [[number + 2] * length + [1] for number, length in enumerate(lengths)]
    ids = np.array([i for document in documents for i in document], dtype=np.uint16)
    corpus = Corpus(ids, np.cumsum([len(document) for document in documents]), SkippedRecords())
    order = GlobalOrder(corpus, Order(lanes, 3, max_length, True))
    count = -(-passes * len(ids) // max_length)  # sequences that begin in these passes
    streams = [order.lane_sequences(lane, LaneState()) for lane in range(lanes)]
    read = Counter(tuple(next(streams[position % lanes]).ids.tolist()) for position in range(count))
    stream = [i for number in range(count * max_length // len(ids) + 1) for i in _pass_ids(order, number, documents)]
    assert read == Counter(tuple(stream[k * max_length : (k + 1) * max_length]) for k in range(count))


def _pass_ids(order, number, documents):
    drawn = order._drawn_pass(number).documents.tolist()
    assert sorted(drawn) == list(range(len(documents)))
    return [i for document in drawn for i in documents[document]]


def test_padded_every_document_comes_once_per_pass(tmp_path):
    lengths = [5 + number for number in range(30)]
    source = numbered(tmp_path / "text", lengths)
    (loader,) = loaders(source, NumberTokenizer(), packing=False, max_length=16, data_order="global")
    rows = [batch.input_ids[0].tolist() for batch in itertools.islice(loader, 90)]
    passes = [[row[0] - 2 for row in rows[first : first + 30]] for first in (0, 30, 60)]
    assert [sorted(documents) for documents in passes] == [list(range(30))] * 3
    assert passes[0] != passes[1] != passes[2]
    # A document's first 15 ids, eos and padding, as in the order by lanes.
    assert all(row == ([row[0]] * min(15, lengths[row[0] - 2]) + [1] + [0] * 16)[:16] for row in rows)


def test_the_sequences_of_a_book_are_spread_over_the_pass(tmp_path):
    """Else every batch would hold one book for as long as it lasts: two thirds of each tenth of the pass are book."""
    lengths = [100] * 100 + [20_000]
    (loader,) = loaders(numbered(tmp_path / "text", lengths), NumberTokenizer())
    rows = [batch.input_ids[0] for batch in itertools.islice(loader, 470)]
    for first in range(0, 470, 47):
        share = np.mean([(row == 102).float().mean().item() for row in rows[first : first + 47]])
        assert 0.35 < share < 0.95


def test_the_order_is_the_same_for_any_number_of_lanes_and_moves_with_the_seed(tmp_path):
    source = numbered(tmp_path / "text", SKEWED)
    options = [{"lanes": 1}, {"lanes": 6}, {"lanes": 24, "ranks": 3}, {"seed": 2}]
    taken = []
    for each in options:
        own = [itertools.islice(loader, 60 // each.get("ranks", 1)) for loader in loaders(source, NumberTokenizer(), **each)]
        taken.append([batch.input_ids.tolist() for together in zip(*own, strict=True) for batch in together])
    assert taken[0] == taken[1] == taken[2]
    assert taken[0] != taken[3]


# --- Which order a run has ---


def sized(*sizes: int | None) -> Source:
    shards = tuple(Shard(f"{i}.txt", f"{i}.txt", "text", None, size) for i, size in enumerate(sizes))
    return Source("mine", "train", shards, "all", "text", "t5-base", "here", RetryPolicy())


def test_small_packed_data_of_known_size_has_the_global_order():
    limit = GLOBAL_ORDER_BYTES
    assert sized(limit - 10, 10).data_order(packing=True) == "global"
    assert sized(limit, 1).data_order(packing=True) == "lanes"
    assert sized(5, None).data_order(packing=True) == "lanes"
    assert sized(5).data_order(packing=False) == "lanes"
    assert sized(limit, 1).data_order(packing=False, wanted="global") == "global"
    assert sized(5).data_order(packing=True, wanted="lanes") == "lanes"
    with pytest.raises(DataError, match=r"--data_order global: the sizes of the files of mine are unknown.*--data_order lanes"):
        sized(5, None).data_order(packing=True, wanted="global")


def merged_state(own) -> dict:
    return json.loads(json.dumps(merge_states([each.state_dict() for each in own])))


def test_a_state_of_an_earlier_version_goes_on_in_its_order(tmp_path):
    """Its order has version 1, and no size of a corpus is recorded; the order is that by lanes."""
    source = numbered(tmp_path / "text", SKEWED)
    (run,) = loaders(source, NumberTokenizer(), data_order="lanes")
    rows = [batch.input_ids.tolist() for batch in itertools.islice(run, 100)]
    (half,) = loaders(source, NumberTokenizer(), data_order="lanes")
    list(itertools.islice(half, 40))
    state = merged_state([half])
    assert state["order"] == {"version": 1, "lanes": 24, "seed": 1, "max_length": 64, "packing": True}
    assert "corpus" not in state
    resumed = loaders(source, NumberTokenizer(), ranks=2)
    assert resumed[0].data_order == "global"
    for each in resumed:
        each.load_state_dict(state)
    own = [itertools.islice(each, 30) for each in resumed]
    assert [batch.input_ids.tolist() for together in zip(*own, strict=True) for batch in together] == rows[40:]


@pytest.mark.parametrize(("began", "wanted"), [("lanes", "global"), ("global", "lanes")])
def test_a_run_keeps_the_order_it_began_with(tmp_path, began, wanted):
    source = numbered(tmp_path / "text", SKEWED)
    (run,) = loaders(source, NumberTokenizer(), data_order=began)
    next(iter(run))
    (other,) = loaders(source, NumberTokenizer(), data_order=wanted)
    with pytest.raises(ValueError, match=f"--data_order {wanted}: the run began with the order {began}; leave --data_order out"):
        other.load_state_dict(run.state_dict())


def test_other_files_than_the_checkpoints_are_named_and_go_on_from_the_same_position(tmp_path, caplog):
    """--allow_changes dataset."""
    (run,) = loaders(numbered(tmp_path / "text", SKEWED), NumberTokenizer())
    list(itertools.islice(run, 10))
    state = merged_state([run])
    other = numbered(tmp_path / "other", SKEWED[:-1])
    (resumed,) = loaders(other, NumberTokenizer())
    resumed.load_state_dict(state)
    rows = [batch.input_ids.tolist() for batch in itertools.islice(resumed, 5)]
    (whole,) = loaders(other, NumberTokenizer())
    assert rows == [batch.input_ids.tolist() for batch in itertools.islice(whole, 15)][10:]
    tokens = [sum(lengths) + len(lengths) for lengths in (SKEWED[:-1], SKEWED)]
    said = "the training data holds 199 documents, {:,} tokens now and held 200 documents, {:,} tokens"
    assert said.format(*tokens) in caplog.text


def test_a_corpus_that_can_no_longer_be_held_goes_on_by_lanes(tmp_path):
    from dataclasses import replace

    source = numbered(tmp_path / "text", SKEWED)
    (run,) = loaders(source, NumberTokenizer())
    list(itertools.islice(run, 10))
    unknown = replace(source, shards=tuple(replace(shard, size_bytes=None) for shard in source.shards))
    (resumed,) = loaders(unknown, NumberTokenizer())
    resumed.load_state_dict(merged_state([run]))
    next(iter(resumed))
    state = resumed.state_dict()
    assert (state["position"], state["order"]["version"], "corpus" in state) == (11, 1, False)


# --- Bad records, and warnings ---


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_bad_and_empty_records_are_counted_once(tmp_path, inline_workers, workers):
    """Wherever they lie among the workers' chunks of 64 documents; the first three are shown, on rank 0 only."""
    lines = [json_lines([text]) for text in texts(200)]
    lines[::20] = [b"broken\n"] * 10
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines) + json_lines(["", ""]) + b"broken\n")
    source = open_source(str(tmp_path), "train", hold_out=False)
    two = loaders(source, ByteTokenizer(), ranks=2, workers=workers)
    batches = [next(iter(each)) for each in two]
    assert [batch.num_bad_records for batch in batches] == [11, 0]
    state = merged_state(two)
    assert state["bad_records"] == {"empty": 2, "malformed_json": 11}
    (resumed,) = loaders(source, ByteTokenizer(), workers=workers)
    resumed.load_state_dict(state)
    list(itertools.islice(resumed, 2000))
    assert resumed.state_dict()["bad_records"] == state["bad_records"]


def test_fail_names_the_first_bad_record_before_the_first_batch(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(json_lines(texts(300)) + b"broken\n")
    source = open_source(str(tmp_path), "train", hold_out=False)
    (loader,) = loaders(source, ByteTokenizer(), on_bad_record="fail")
    with pytest.raises(DataError, match=r"bad record in .*x\.jsonl, line 301: malformed json"):
        next(iter(loader))


def test_documents_without_a_token_are_no_corpus(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(json_lines(["", ""]))
    (loader,) = loaders(open_source(str(tmp_path), "train", hold_out=False), ByteTokenizer())
    with pytest.raises(DataError, match="no document of the train split holds a token"):
        next(iter(loader))


@pytest.mark.parametrize("packing", [True, False])
def test_lanes_whose_finished_passes_differ_by_more_than_one_are_named_once(tmp_path, caplog, packing):
    """Thirty equal documents: with 24 lanes, six lanes have two, and the others finish two passes to each of theirs."""
    source = numbered(tmp_path / "text", [63] * 30)
    (loader,) = loaders(source, NumberTokenizer(), packing=packing, data_order="lanes")
    iterator = iter(loader)
    list(itertools.islice(iterator, 4 * 24))  # four passes of one document are about to end, or two passes of two documents
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "unequal shares" in said[0]
    assert "has read its documents 3 times" in said[0]
    assert "--data_order global" in said[0]
    list(itertools.islice(iterator, 100))
    assert len(caplog.records) == 1


def test_lanes_of_other_ranks_are_compared_when_their_states_meet(tmp_path, caplog):
    """A rank with a single lane sees no difference; a checkpoint has the states of all."""
    source = numbered(tmp_path / "text", [63] * 30)
    own = loaders(source, NumberTokenizer(), ranks=24, data_order="lanes")
    for each in own:
        list(itertools.islice(each, 4))
    assert not caplog.records
    own[0].warn_of_uneven_passes(merged_state(own)["lanes"])
    assert "unequal shares" in caplog.text


def test_equal_lanes_and_the_global_order_are_not_warned_of(tmp_path, caplog):
    for lengths, options in (([63] * 48, {"data_order": "lanes"}), (BOOK, {}), ([7] * 5, {})):
        (loader,) = loaders(numbered(tmp_path / "text", lengths), NumberTokenizer(), **options)
        list(itertools.islice(loader, 24 * 8))
    assert not caplog.records
