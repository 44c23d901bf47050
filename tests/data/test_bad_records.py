"""Bad records and files during a run: good ones are used once, bad ones counted exactly and limited, without a traceback."""

import builtins
import errno
import gzip
import itertools
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from corpora import ByteTokenizer, json_lines, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_pretraining.data import DataError, lanes, records
from peft_pretraining.data.lanes import LaneState, Order, lane_sequences
from peft_pretraining.data.loader import EvalSet, TrainLoader
from peft_pretraining.data.records import check_source
from peft_pretraining.data.source import Source, open_source

BAD_LINES = {
    "malformed_json": b'{"text": "cut o',
    "missing_text": b'{"url": "x"}',
    "text_not_string": b'{"text": ["a"]}',
    "invalid_unicode": b'{"text": "\xff\xfe"}',
    "empty": b'{"text": ""}',
    "oversized": b'{"text": "' + b"long " * 1000 + b'"}',
}


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch):
    monkeypatch.setattr(lanes, "WINDOW_RECORDS", 5)
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 4000)


def source_of(folder: Path, content: dict[str, bytes]) -> Source:
    folder.mkdir(exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return open_source(str(folder), "train", hold_out=False)


def epoch(source: Source, num_lanes: int = 3, **options) -> tuple[Counter, Counter]:
    """Returns (documents, counts of skipped records) of all lanes' first epoch, one padded document per sequence.

    The counts include records before the first document of the second epoch.
    """
    documents: Counter = Counter()
    counts: Counter = Counter()
    for lane in range(num_lanes):
        for sequence in lane_sequences(source, ByteTokenizer(), Order(num_lanes, 3, 99, False, **options), lane, LaneState()):
            counts.update(sequence.skipped.counts if sequence.skipped else {})
            if sequence.state.epoch > 0:
                break
            documents[ByteTokenizer().decode(sequence.ids)] += 1
    return documents, counts


@pytest.mark.parametrize("kinds", [*([kind] for kind in BAD_LINES), list(BAD_LINES)], ids=lambda kinds: "+".join(kinds))
@pytest.mark.parametrize("compressed", [False, True])
def test_with_one_bad_record_in_ten_every_good_one_is_used_once(tmp_path, kinds, compressed):
    """After an epoch the counts are those of the file. Its last window has no bad record, since those are counted by the next."""
    good = texts(270)
    lines = [json_lines([text]) for text in good]
    for number in range(30):
        lines.insert(10 * number, BAD_LINES[kinds[number % len(kinds)]] + b"\n")
    content = b"".join(lines)
    name, data = ("x.json.gz", gzip.compress(content)) if compressed else ("x.jsonl", content)
    source = source_of(tmp_path, {name: data})
    loader = TrainLoader(source, ByteTokenizer(), max_length=99, packing=False, lanes=1, seed=3)
    batches = list(itertools.islice(loader, 270))
    assert Counter(ByteTokenizer().decode(batch.input_ids[0]) for batch in batches) == Counter(good)
    counts = Counter(loader.state_dict()["bad_records"])
    assert counts == Counter(kinds[number % len(kinds)] for number in range(30))
    assert sum(batch.num_bad_records for batch in batches) == counts.total() - counts["empty"] == loader.num_bad_records
    again = list(itertools.islice(loader, 270))  # the next epoch counts them again
    assert Counter(loader.state_dict()["bad_records"]) == counts + counts
    assert sum(batch.num_bad_records for batch in again) == counts.total() - counts["empty"]


@pytest.mark.parametrize("kind", [kind for kind in BAD_LINES if kind != "empty"])
def test_fail_names_file_and_line_in_training_and_evaluation(tmp_path, kind):
    source = source_of(tmp_path, {"x.jsonl": json_lines(texts(5)) + BAD_LINES[kind] + b"\n" + json_lines(texts(5, 5))})
    said = rf"bad record in .*x\.jsonl, line 6: {kind.replace('_', ' ')}: .*--on_bad_record skip"
    with pytest.raises(DataError, match=said):
        epoch(source, 1, on_bad_record="fail")
    with pytest.raises(DataError, match=said):
        list(EvalSet(source, ByteTokenizer(), max_length=9, packing=True, max_tokens=None, on_bad_record="fail"))


def test_damaged_compression_counts_as_one_bad_record(tmp_path):
    whole = gzip.compress(json_lines(texts(40)))
    source = source_of(
        tmp_path,
        {"a.json.gz": whole[:-10], "b.json.gz": b"garbage", "c.json.gz": gzip.compress(json_lines(texts(40, 40)))},
    )
    documents, counts = epoch(source)
    assert set(texts(40, 40)) <= set(documents)
    assert max(documents.values()) == 1
    # Two per epoch; lanes end their epoch within the first records of the next one.
    assert 1 <= counts["unreadable_rest"] <= 4
    with pytest.raises(DataError, match=r"[ab]\.json\.gz, line \d+: unreadable rest"):
        epoch(source, on_bad_record="fail")


def test_empty_files_among_others_are_ignored(tmp_path):
    source = source_of(tmp_path, {"a.jsonl": b"", "b.jsonl": json_lines(texts(40)), "c.json.gz": gzip.compress(b"")})
    documents, counts = epoch(source)
    assert documents == Counter(texts(40))
    assert not counts


# --- Files that cannot be read ---


def files(count: int) -> dict[str, bytes]:
    return {f"{i:02d}.jsonl": json_lines(texts(12, 12 * i)) for i in range(count)}


@pytest.mark.parametrize("num_lanes", [1, 3, 8])
def test_a_file_removed_during_the_run_is_skipped_and_counted(tmp_path, num_lanes):
    """With eight files of similar size and eight lanes, one lane has only the missing file and continues with the next epoch."""
    source = source_of(tmp_path, files(8))
    check_source(source)
    (tmp_path / "03.jsonl").unlink()
    documents, counts = epoch(source, num_lanes)
    expected = Counter(text for text in texts(96) if text not in texts(12, 36))
    if num_lanes < 8:
        assert documents == expected
    else:
        assert documents <= expected + expected
    assert counts["unreadable_file"] >= 1
    with pytest.raises(DataError, match=r"03\.jsonl cannot be read: No such file"):
        epoch(source, num_lanes, on_bad_record="fail")


def test_a_file_without_read_permission_is_skipped(tmp_path, monkeypatch):
    source = source_of(tmp_path, files(8))
    opened = builtins.open

    def refuse(file, *arguments, **options):
        if str(file).endswith("05.jsonl"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(file, *arguments, **options)

    # Not by the file's mode, which does not hold for root.
    monkeypatch.setattr(builtins, "open", refuse)
    documents, counts = epoch(source, 1)
    assert documents == Counter(text for text in texts(96) if text not in texts(12, 60))
    assert counts["unreadable_file"] >= 1


@pytest.mark.parametrize(("present", "num_lanes"), [(5, 1), (5, 3), (5, 8), (0, 1), (0, 3), (0, 8)])
def test_many_unreadable_files_end_the_run(tmp_path, present, num_lanes):
    """If a disk fails, every lane that tries enough files raises an error instead of searching without end."""
    source = source_of(tmp_path, files(8))
    check_source(source)
    for path in sorted(tmp_path.iterdir())[present:]:
        path.unlink()
    for lane in range(num_lanes):
        stream = lane_sequences(source, ByteTokenizer(), Order(num_lanes, 3, 99, False), lane, LaneState())
        with pytest.raises(DataError, match="files tried cannot be read"):
            list(itertools.islice(stream, 2000))


def test_a_source_without_readable_files_is_refused_at_the_start(tmp_path):
    source = source_of(tmp_path, files(2))
    (tmp_path / "00.jsonl").unlink()
    check_source(source)
    (tmp_path / "01.jsonl").unlink()
    with pytest.raises(DataError, match=r"no file with a document; .*00\.jsonl cannot be read: No such file"):
        check_source(source)


# --- Arbitrary contents ---

PIECES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([line for kind, line in BAD_LINES.items() if kind != "oversized"]),
    st.text(max_size=20).map(lambda text: json_lines([text]).strip()),
    st.sampled_from([b"\xef\xbb\xbf", b"\x00", b"\r", b"[" * 3000, b'{"text": NaN}', b'{"text": 1e999}', b"\x1f\x8b\x08", b"{}"]),
)


@given(lines=st.lists(PIECES, max_size=12), suffix=st.sampled_from(["jsonl", "txt", "json.gz", "jsonl.zst", "parquet"]))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_arbitrary_file_contents_are_used_counted_or_refused(tmp_path_factory, lines, suffix):
    folder = tmp_path_factory.mktemp("fuzz")
    content = b"\n".join(lines)
    if suffix == "json.gz" and len(lines) % 2:
        content = gzip.compress(content)
    (folder / f"x.{suffix}").write_bytes(content)
    (folder / f"y.{suffix}").write_bytes(content[: len(content) // 2])
    said = use(folder, 30 + len(lines) % 2)
    assert said is None or str(folder) in said  # an error names its file


def use(folder: Path, sequences: int) -> str | None:
    """Reads sequences from a folder; returns None, or the message of a DataError."""
    try:
        source = open_source(str(folder), "train", hold_out=False)
        check_source(source)
        stream = lane_sequences(source, ByteTokenizer(), Order(1, 3, 30, sequences % 2 == 0), 0, LaneState())
        assert all(1 < len(sequence.ids) <= 30 for sequence in itertools.islice(stream, sequences))
    except DataError as error:
        return str(error)
    return None


def test_good_documents_among_damaged_files_are_all_read(tmp_path):
    """With files of random bytes, truncated files and good ones, all good documents are read, for any seed."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    content = files(9)
    content |= {f"cut{i}.json.gz": gzip.compress(json_lines(texts(30, 5000)))[: draw.randint(1, 200)] for i in range(3)}
    content |= {f"noise{i}.json.gz": draw.randbytes(500) for i in range(3)}
    documents, counts = epoch(source_of(tmp_path, content), 4)
    assert set(texts(108)) <= set(documents)
    assert counts["unreadable_rest"] >= 3
