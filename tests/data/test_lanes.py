"""The order of training data: each record once per epoch, the same on every machine, and resumable at every sequence."""

import itertools
from collections import Counter

import pytest
from corpora import json_lines, texts
from hypothesis import given
from hypothesis import strategies as st

from peft_pretraining.data import DataError, lanes
from peft_pretraining.data.lanes import LaneState, Order, lane_sequences, lane_units
from peft_pretraining.data.source import Shard, open_source


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(lanes, "WINDOW_RECORDS", 5)


def order(num_lanes=4, seed=3, max_length=24, packing=True, **options):
    return Order(num_lanes, seed, max_length, packing, **options)


def first_epoch(source, tokenizer, order, lane):
    """Returns the sequences of a lane's first epoch, with the states after them."""
    sequences = lane_sequences(source, tokenizer, order, lane, LaneState())
    return list(itertools.takewhile(lambda sequence: sequence.state.epoch == 0, sequences))


@given(
    sizes=st.lists(st.sampled_from([None, 100, 110, 400]), min_size=1, max_size=20),
    num_lanes=st.integers(1, 9),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_lanes_divide_all_records_without_overlap(sizes, num_lanes, epoch, seed):
    """For any number of files of any sizes, each record belongs to one lane."""
    shards = tuple(Shard(f"{i}", f"{i}", "json", None, size) for i, size in enumerate(sizes))
    readers: Counter = Counter()
    for lane in range(num_lanes):
        for unit in lane_units(shards, lane, order(num_lanes, seed), epoch):
            readers.update((unit.shard, record) for record in range(30) if record % unit.parts == unit.residue)
    assert readers == Counter({(shard, record): 1 for shard in range(len(sizes)) for record in range(30)})


def test_lanes_read_whole_files_if_enough_have_similar_sizes():
    """C4's 1,024 files over 64 lanes: each lane reads 16 whole files, so each file is decompressed once per epoch."""
    shards = open_source("c4", "train").shards
    units = [lane_units(shards, lane, order(64), epoch=1) for lane in range(64)]
    assert {len(lane) for lane in units} == {16}
    assert {unit.parts for lane in units for unit in lane} == {1}
    next_epoch = lane_units(shards, 0, order(64), epoch=2)
    assert {unit.shard for unit in units[0]} != {unit.shard for unit in next_epoch}  # distributed differently in each epoch


def test_first_records_of_files_are_distributed_over_lanes():
    shards = tuple(Shard(f"{i}", f"{i}", "json", None, 100 * (1 + i)) for i in range(8))
    first_records = Counter(lane for lane in range(4) for unit in lane_units(shards, lane, order(4), 0) if unit.residue == 0)
    assert set(first_records.values()) == {2}


def test_the_permutation_is_a_fixed_function_of_its_key():
    """The order must not depend on library versions; Python guarantees the values of random.random()."""
    import hashlib
    import random

    digest = hashlib.blake2b(repr((7, 2, "window", 5)).encode(), digest_size=16).digest()
    generator = random.Random(int.from_bytes(digest, "big"))
    keys = [generator.random() for _ in range(40)]
    assert lanes._permutation(40, 7, 2, "window", 5) == sorted(range(40), key=lambda i: keys[i])


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_each_epoch_has_every_document_once_in_another_order(write_shards, byte_tokenizer, shards):
    documents = texts(90)
    source = open_source(str(write_shards(documents, shards)), "train", hold_out=False)
    epochs: list[list[str]] = [[], [], []]
    for lane in range(4):
        for sequence in lane_sequences(source, byte_tokenizer, order(max_length=999, packing=False), lane, LaneState()):
            if sequence.state.epoch > 2:
                break
            epochs[sequence.state.epoch].append(byte_tokenizer.decode(sequence.ids))
    assert [sorted(epoch) for epoch in epochs] == [sorted(documents)] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != documents


def test_another_seed_gives_another_order(write_shards, byte_tokenizer):
    source = open_source(str(write_shards(texts(90))), "train", hold_out=False)
    first, again, other = (
        [s.ids.tolist() for s in first_epoch(source, byte_tokenizer, order(seed=seed, packing=False), 0)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shards", [1, 6])
def test_a_lane_resumes_from_any_of_its_states(write_shards, byte_tokenizer, packing, shards):
    """Started from the state after sequence k, a lane gives sequences k + 1, k + 2, ... and their states, over three epochs."""
    source = open_source(str(write_shards(texts(37), shards)), "train", hold_out=False)
    options = order(num_lanes=3, packing=packing)
    whole = list(itertools.islice(lane_sequences(source, byte_tokenizer, options, 1, LaneState()), 100))
    assert whole[-1].state.epoch >= 2
    for k in range(0, 90, 3):
        rest = itertools.islice(lane_sequences(source, byte_tokenizer, options, 1, whole[k].state), 10)
        assert [(s.ids.tolist(), s.state) for s in rest] == [(s.ids.tolist(), s.state) for s in whole[k + 1 : k + 11]]


def test_packed_sequences_continue_over_the_end_of_files_and_epochs(write_shards, byte_tokenizer):
    """All sequences are full, and joined they are the lane's whole documents, each followed by eos."""
    source = open_source(str(write_shards(texts(20), 2)), "train", hold_out=False)
    packed = list(itertools.islice(lane_sequences(source, byte_tokenizer, order(max_length=16), 2, LaneState()), 50))
    assert {len(sequence.ids) for sequence in packed} == {16}
    whole = lane_sequences(source, byte_tokenizer, order(max_length=9999, packing=False), 2, LaneState())
    ids = list(itertools.islice(itertools.chain.from_iterable(s.ids.tolist() for s in whole), 50 * 16))
    assert [i for sequence in packed for i in sequence.ids.tolist()] == ids


def test_every_record_is_returned_or_counted(tmp_path, byte_tokenizer):
    """After every sequence, documents returned + bad records counted = records that the lane's state has passed.

    The test resumes after every sequence, which must count nothing twice.
    """
    bad = [b"broken\n", b'{"text": 1}\n', b'{"url": "x"}\n', b'{"text": ""}\n']
    lines = [json_lines([text]) for text in texts(42)]
    for number, line in enumerate(bad * 2):
        lines.insert(5 * number, line)
    assert len(lines) == 50  # ten complete windows, so that a state determines the number of records before it
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    source = open_source(str(tmp_path), "train", hold_out=False)
    counts: Counter = Counter()
    state = LaneState()
    for returned in range(1, 150):
        sequence = next(lane_sequences(source, byte_tokenizer, order(1, packing=False), 0, state))
        state = sequence.state
        counts.update(sequence.skipped.counts if sequence.skipped else {})
        assert returned + counts.total() == 50 * state.epoch + state.window_start + state.documents_done
    assert state.epoch == 3
    assert set(counts) == {"malformed_json", "text_not_string", "missing_text", "empty"}
    assert all(6 <= count <= 8 for count in counts.values())  # two of each kind in an epoch, in the fourth epoch


def test_fail_names_file_and_line_of_the_first_bad_record(tmp_path, byte_tokenizer):
    (tmp_path / "x.jsonl").write_bytes(json_lines(texts(2)) + b"broken\n" + json_lines(texts(2, start=2)))
    source = open_source(str(tmp_path), "train", hold_out=False)
    with pytest.raises(DataError, match=r"bad record in .*x\.jsonl, line 3: malformed json"):
        list(itertools.islice(lane_sequences(source, byte_tokenizer, order(1, on_bad_record="fail"), 0, LaneState()), 99))


def test_mostly_bad_records_stop_the_run(tmp_path, byte_tokenizer):
    """One bad record in ten is skipped without end; if half of all records are bad, the data is probably wrong."""
    lines = [json_lines([text]) for text in texts(2000)]
    tenth, half = list(lines), list(lines)
    tenth[::10] = [b"broken\n"] * 200
    half[::2] = [b"broken\n"] * 1000
    for name, content in (("tenth", tenth), ("half", half)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_bytes(b"".join(content))
    fine = open_source(str(tmp_path / "tenth"), "train", hold_out=False)
    assert len(list(itertools.islice(lane_sequences(fine, byte_tokenizer, order(1), 0, LaneState()), 5000))) == 5000
    source = open_source(str(tmp_path / "half"), "train", hold_out=False)
    with pytest.raises(DataError, match=r"\d+ of \d+ records are bad, the first one in .*x\.jsonl, line \d+: malformed"):
        list(itertools.islice(lane_sequences(source, byte_tokenizer, order(1), 0, LaneState()), 5000))


def test_a_lane_without_documents_is_an_error_not_an_endless_loop(write_shards, byte_tokenizer):
    source = open_source(str(write_shards(texts(3))), "train", hold_out=False)
    with pytest.raises(DataError, match=r"too small for --data_lanes 8: lane 5 .*lower --data_lanes"):
        next(lane_sequences(source, byte_tokenizer, order(8), 5, LaneState()))


def test_resuming_at_the_end_of_an_epoch_is_not_an_empty_lane(write_shards, byte_tokenizer):
    """The rest of the epoch may contain no document, but the next epoch does."""
    source = open_source(str(write_shards(texts(3))), "train", hold_out=False)
    end = first_epoch(source, byte_tokenizer, order(1, packing=False), 0)[-1].state
    assert next(lane_sequences(source, byte_tokenizer, order(1, packing=False), 0, end)).state.epoch == 1
