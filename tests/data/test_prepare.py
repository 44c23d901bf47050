"""Prepared data (token files made once from text) gives exactly the training sequences of the text itself.

Damaged, unfinished or unrelated folders are refused. An interrupted preparation resumes and writes the same bytes.
"""

import gzip
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from corpora import ByteTokenizer, json_lines, texts

from peft_pretraining.data import DataError, TokenizerError, lanes
from peft_pretraining.data import prepare as prepare_module
from peft_pretraining.data.lanes import LaneState, Order, lane_sequences
from peft_pretraining.data.loader import EvalSet, TrainLoader, merge_states
from peft_pretraining.data.prepare import prepare
from peft_pretraining.data.prepared import BAD_KINDS, TokenFile, read_manifest
from peft_pretraining.data.records import is_held_out
from peft_pretraining.data.source import default_lanes, open_source

ROOT = Path(__file__).resolve().parents[2]
BAD_LINES = [b"broken\n", b'{"text": null}\n', b'{"text": 3}\n', b'{"text": ""}\n', b'{"text": "\xff"}\n']


class NoEncoding(ByteTokenizer):
    """The tokenizer of the prepared data, which training must not call."""

    def encode_batch(self, texts):
        raise AssertionError("prepared data is not tokenised again")


class Interrupted(ByteTokenizer):
    """Raises KeyboardInterrupt after a number of batches."""

    def __init__(self, batches: int):
        self.batches = batches

    def encode_batch(self, texts):
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        return super().encode_batch(texts)


@pytest.fixture(autouse=True)
def small_windows_and_commits(monkeypatch):
    """Small windows and commits, so that a small corpus has many of them."""
    monkeypatch.setattr(lanes, "WINDOW_RECORDS", 4)
    monkeypatch.setattr(prepare_module, "_COMMIT_RECORDS", 7)
    monkeypatch.setattr(prepare_module, "_TOGETHER", 5)


def corpus(folder: Path, shards: int, validation: bool, count: int = 300) -> Path:
    """Writes a folder of JSON-lines files of unequal lengths with 20 bad lines, and one truncated gzip file."""
    folder.mkdir()
    lines = [json_lines([text]) for text in texts(count)]
    for number in range(20):
        lines.insert(11 * number, BAD_LINES[number % len(BAD_LINES)])
    kind = "train" if validation else "all"
    for shard in range(shards):
        (folder / f"c4-{kind}.{shard}.json").write_bytes(b"".join(lines[shard :: shards + shard % 2]))
    (folder / f"c4-{kind}.cut.json.gz").write_bytes(gzip.compress(json_lines(texts(30, start=1000)))[:-9])
    if validation:
        (folder / "c4-validation.json").write_bytes(json_lines(texts(40, start=2000)))
    return folder


def prepared(dataset: Path, out: Path, **options):
    """Prepares a data set with the byte tokenizer; returns the manifest."""
    return prepare(str(dataset), ByteTokenizer(), out, progress=False, **options)


def make_loaders(source, tokenizer, ranks, workers, packing, lanes=12, **options):
    """Returns a loader for each rank."""
    common = {"max_length": 40, "packing": packing, "lanes": lanes, "seed": 5, "world_size": ranks, "workers": workers}
    return [TrainLoader(source, tokenizer, rank=rank, **common, **options) for rank in range(ranks)]


def follow(chain, source, tokenizer, packing, **options):
    """Returns sequences and final state of a run resumed between stages, each of (ranks, workers, batches per rank)."""
    sequences, state = [], None
    for ranks, workers, batches in chain:
        loaders = make_loaders(source, tokenizer, ranks, workers, packing, **options)
        for each in loaders:
            if state is not None:
                each.load_state_dict(state)
        own = [[batch.labels.tolist() for batch in itertools.islice(each, batches)] for each in loaders]
        sequences += [row for together in zip(*own, strict=True) for batch in together for row in batch]
        state = json.loads(json.dumps(merge_states([each.state_dict() for each in loaders])))
        for each in loaders:
            each.close()
    return sequences, state


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("data_order", ["lanes", "global", None])
@pytest.mark.parametrize(("shards", "validation"), [(1, False), (3, True), (7, False)])
def test_sequences_and_states_equal_those_of_the_text_for_any_ranks_and_workers(
    tmp_path, inline_workers, packing, data_order, shards, validation
):
    """Over several epochs, with resumes in between; the states contain the counts of bad records."""
    folder = corpus(tmp_path / "text", shards, validation)
    prepared(folder, tmp_path / "tokens")
    chain = [(1, 0, 130), (2, 2, 61), (4, 1, 33), (3, 3, 52), (12, 1, 9), (1, 2, 77)]
    total = sum(ranks * batches for ranks, _, batches in chain)
    order = {"data_order": data_order}
    expected = follow([(1, 0, total)], open_source(str(folder), "train"), ByteTokenizer(), packing, **order)
    found = follow(chain, open_source(str(tmp_path / "tokens"), "train"), NoEncoding(), packing, **order)
    assert found == expected
    assert len(set(found[1]["bad_records"])) == 6 or packing
    assert min(numbers[0] for numbers in found[1]["lanes"].values()) >= 1


def test_sequences_equal_those_of_the_text_with_real_worker_processes(tmp_path):
    if sys.platform != "linux" or torch.multiprocessing.get_start_method() != "fork":
        pytest.skip("the small windows of this test reach workers by fork only")
    folder = corpus(tmp_path / "text", 3, False)
    prepared(folder, tmp_path / "tokens")
    expected = follow([(1, 0, 120)], open_source(str(folder), "train"), ByteTokenizer(), True)
    source = open_source(str(tmp_path / "tokens"), "train")
    assert follow([(2, 2, 30), (1, 1, 60)], source, NoEncoding(), True) == expected


def test_each_document_of_a_split_comes_once_per_epoch(tmp_path):
    """One document in 100 is held out by its hash, as in the text. One record in 10 is bad: numbered, but never returned."""
    documents = texts(900)
    lines = [json_lines([text]) for text in documents]
    for number in range(100):
        lines.insert(10 * number, BAD_LINES[number % len(BAD_LINES)])
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    prepared(tmp_path / "x.jsonl", tmp_path / "tokens")
    found = []
    for split in ("train", "validation"):
        source = open_source(str(tmp_path / "tokens"), split)
        found.append(first_epoch(lane_sequences(source, NoEncoding(), Order(1, 3, 999, False), 0, LaneState())))
    assert Counter(found[0] + found[1]) == Counter(documents)
    assert 0 < len(found[1]) < 30
    assert Counter(found[1]) == Counter(text for text in documents if is_held_out(text))


def first_epoch(sequences) -> list[str]:
    epoch = itertools.takewhile(lambda sequence: sequence.state.epoch == 0, sequences)
    return [ByteTokenizer().decode(sequence.ids) for sequence in epoch]


def test_the_evaluation_set_equals_that_of_the_text(tmp_path):
    for number, validation in enumerate((True, False)):
        folder = corpus(tmp_path / f"text{number}", 2, validation, count=1200)
        prepared(folder, tmp_path / f"tokens{number}")
        for packing in (True, False):
            options = {"max_length": 32, "packing": packing, "max_tokens": 700, "batch_size": 4}
            text = EvalSet(open_source(str(folder), "validation"), ByteTokenizer(), **options)
            tokens = EvalSet(open_source(str(tmp_path / f"tokens{number}"), "validation"), NoEncoding(), **options)
            assert [b.labels.tolist() for b in tokens] == [b.labels.tolist() for b in text]


def test_all_of_an_evaluation_data_set_without_validation_files_is_used(tmp_path):
    """--eval_dataset FOLDER: every document, as with a folder of text."""
    folder = corpus(tmp_path / "text", 1, False)
    prepared(folder, tmp_path / "tokens")
    options = {"max_length": 32, "packing": False, "max_tokens": None}
    sets = [
        EvalSet(open_source(str(path), "validation", hold_out=False), ByteTokenizer(), **options)
        for path in (folder, tmp_path / "tokens")
    ]
    assert sets[0].num_sequences == sets[1].num_sequences > 200


def test_resuming_reads_no_record_before_the_position(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_COMMIT_RECORDS", 1000)
    (tmp_path / "x.jsonl").write_bytes(json_lines(texts(4000)))
    prepared(tmp_path / "x.jsonl", tmp_path / "tokens")
    source = open_source(str(tmp_path / "tokens"), "train")
    read = []
    whole = TokenFile.__getitem__
    monkeypatch.setattr(TokenFile, "__getitem__", lambda self, number: read.append(number) or whole(self, number))
    sequences = lane_sequences(source, NoEncoding(), Order(1, 3, 40, True), 0, LaneState(0, 0, 3600, 2, 1))
    next(sequences)
    assert read == list(range(3600, 3604))


def test_a_limit_on_documents_holds_for_training_and_leaves_validation_whole(tmp_path):
    folder = corpus(tmp_path / "text", 4, True)
    manifest = prepared(folder, tmp_path / "tokens", documents=100)
    assert (manifest.total("train"), manifest.total("validation")) == (100, 40)
    (loader,) = make_loaders(open_source(str(tmp_path / "tokens"), "train"), NoEncoding(), 1, 0, False, lanes=2)
    assert len(list(itertools.islice(loader, 150))) == 150  # over the end of the first epoch


def test_vocabularies_above_65536_ids_are_stored_in_32_bits_with_the_same_sequences(tmp_path):
    folder = corpus(tmp_path / "text", 4, True)
    wide = ByteTokenizer()
    wide.text_vocab_size = 100_000
    assert prepare(str(folder), wide, tmp_path / "wide", progress=False).shards[0].ids.name == "00000.uint32"
    text, tokens = (open_source(str(path), "train") for path in (folder, tmp_path / "wide"))
    assert follow([(1, 0, 99)], text, wide, True) == follow([(1, 0, 99)], tokens, wide, True)


def test_the_default_number_of_lanes_is_that_of_the_data_set_it_was_prepared_from(tmp_path):
    folder = corpus(tmp_path / "text", 1, True)
    prepared(folder, tmp_path / "tokens")
    assert default_lanes(str(tmp_path / "tokens")) == 24
    path = tmp_path / "tokens/prepared.json"
    document = json.loads(path.read_text())
    document["job"]["dataset"] = "c4"
    path.write_text(json.dumps(document))
    assert default_lanes(str(tmp_path / "tokens")) == 64


def test_the_name_c4_means_the_published_data_set_even_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    """--dataset ./c4 and ~/c4 mean the folder."""
    prepared(corpus(tmp_path / "text", 1, True), tmp_path / "c4")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("c4", "train").shards) == 1024
    assert default_lanes("c4") == 64
    assert open_source("./c4", "train").prepared is not None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("~/c4", "train").prepared is not None


def test_the_fingerprint_depends_on_the_content_and_the_split_but_not_on_the_folder(tmp_path):
    folder = corpus(tmp_path / "text", 2, True)
    prepared(folder, tmp_path / "tokens")
    shutil.copytree(tmp_path / "tokens", tmp_path / "copy")
    prepared(folder, tmp_path / "fewer", documents=50)

    def fingerprint(name: str, split: str = "train") -> str:
        return open_source(str(tmp_path / name), split).fingerprint

    assert fingerprint("copy") == fingerprint("tokens")
    assert fingerprint("tokens", "validation") != fingerprint("tokens")
    assert fingerprint("fewer") != fingerprint("tokens")


def test_another_tokenizer_is_refused_and_both_are_named(tmp_path):
    prepared(corpus(tmp_path / "text", 1, True), tmp_path / "tokens")
    other = ByteTokenizer()
    other.name, other.fingerprint = "mine", "another"
    said = r"--tokenizer mine \(fingerprint another\) .* prepared with: bytes \(fingerprint one id per byte\)"
    with pytest.raises(TokenizerError, match=said):
        make_loaders(open_source(str(tmp_path / "tokens"), "train"), other, 1, 0, True)
    with pytest.raises(TokenizerError, match=said):
        EvalSet(open_source(str(tmp_path / "tokens"), "validation"), other, max_length=9, packing=True, max_tokens=None)


# --- Damaged and unusable folders ---


def _remove(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


@pytest.mark.parametrize("name", ["00000.uint16", "00001.index"])
@pytest.mark.parametrize(("damage", "said"), [(_remove, "cannot be read: No such file"), (_truncate, "was truncated")])
def test_missing_and_truncated_files_are_named_when_the_data_is_opened(tmp_path, name, damage, said):
    prepared(corpus(tmp_path / "text", 2, True), tmp_path / "tokens")
    damage(tmp_path / "tokens" / name)
    with pytest.raises(DataError, match=rf"{name} .*{said}"):
        open_source(str(tmp_path / "tokens"), "train")


def test_flipped_bits_are_found_by_checksums_and_impossible_values_while_reading(tmp_path):
    """--verify and a resumed preparation compare checksums. Training does not, but checks every id and record length."""
    from peft_pretraining.data.inspection import verify_prepared

    folder = corpus(tmp_path / "text", 2, True)
    prepared(folder, tmp_path / "tokens")
    assert verify_prepared(str(tmp_path / "tokens")) == 8
    # The high bytes of a token id and of the end of a record.
    for name, byte in (("00001.uint16", 41), ("00000.index", 35)):
        path = tmp_path / "tokens" / name
        content = bytearray(path.read_bytes())
        content[byte] ^= 0x80
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: its checksum"):
            verify_prepared(str(tmp_path / "tokens"))
        with pytest.raises(DataError, match=rf"{name}: its checksum"):
            prepared(folder, tmp_path / "tokens")
        (each,) = make_loaders(open_source(str(tmp_path / "tokens"), "train"), NoEncoding(), 1, 0, True, lanes=1)
        with pytest.raises(DataError, match=rf"{name}, record \d+: the file is damaged.*--verify"):
            list(itertools.islice(each, 700))
        content[byte] ^= 0x80
        path.write_bytes(content)
    assert verify_prepared(str(tmp_path / "tokens")) == 8


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"job": 3}', '{"job": {"format": 1}, "shards": [{}], "vocab_size": 1}'])
def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "prepared.json").write_text(content)
    with pytest.raises(DataError, match=r"prepared\.json is damaged"):
        open_source(str(tmp_path), "train")
    assert default_lanes(str(tmp_path)) == 24


def test_a_later_format_is_refused(tmp_path):
    prepared(corpus(tmp_path / "text", 1, True), tmp_path / "tokens")
    path = tmp_path / "tokens/prepared.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="in format 2, this version reads 1"):
        read_manifest(tmp_path / "tokens")


def test_a_request_that_contradicts_the_folders_is_refused_with_the_reason(tmp_path):
    folder = corpus(tmp_path / "text", 1, True)
    prepared(folder, tmp_path / "tokens")
    with pytest.raises(DataError, match="is prepared already"):
        prepared(tmp_path / "tokens", tmp_path / "again")
    with pytest.raises(DataError, match="holds other files"):
        prepared(folder, tmp_path)
    with pytest.raises(DataError, match=r"was begun with documents None \(now 5\)"):
        prepared(folder, tmp_path / "tokens", documents=5)
    with pytest.raises(DataError, match=r"--text_field body: .*prepared from the field 'text'"):
        open_source(str(tmp_path / "tokens"), "train", text_field="body")
    with pytest.raises(DataError, match=r"bad record in .*c4-train\.0\.json, line 1: malformed json"):
        prepared(folder, tmp_path / "strict", on_bad_record="fail")
    with pytest.raises(DataError, match="preparation has not finished"):
        open_source(str(tmp_path / "strict"), "train")


def test_a_preparation_stopped_by_an_unreadable_file_resumes_when_the_file_is_back(tmp_path):
    folder = corpus(tmp_path / "text", 3, True)
    prepared(folder, tmp_path / "whole")
    hidden = folder / "c4-train.1.json"
    content = hidden.read_bytes()

    class Vanishing(ByteTokenizer):
        def encode_batch(self, texts):
            hidden.unlink(missing_ok=True)
            return super().encode_batch(texts)

    with pytest.raises(DataError, match=r"c4-train\.1\.json cannot be read: No such file.* which resumes here"):
        prepare(str(folder), Vanishing(), tmp_path / "tokens", progress=False)
    hidden.write_bytes(content)
    prepared(folder, tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_every_kind_of_bad_record_has_a_number_in_the_index():
    """Existing files hold these numbers: kinds may only be appended. Every kind that records.py makes is among them."""
    from peft_pretraining.data import records

    source = Path(records.__file__).read_text()
    assert BAD_KINDS[:3] == ("", "malformed_json", "missing_text")
    assert all(f'"{kind}"' in source for kind in BAD_KINDS[1:])
    assert set(re.findall(r'BadRecord\("(\w+)"', source)) <= set(BAD_KINDS)


# --- Interrupted preparations ---


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files by their path, without the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_preparation_interrupted_every_two_batches_writes_the_same_bytes(tmp_path):
    """Two batches of 5 records hold at least one commit of 7 records, so that each start gets further."""
    folder = corpus(tmp_path / "text", 2, False, count=60)
    prepared(folder, tmp_path / "whole")
    interrupts = 0
    for _ in range(1000):
        try:
            prepare(str(folder), Interrupted(batches=2), tmp_path / "tokens", progress=False)
        except KeyboardInterrupt:
            interrupts += 1
        else:
            break
    assert interrupts > 5
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("shards", "validation"), [(1, False), (3, True)])
@pytest.mark.parametrize("documents", [None, 37])
def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path, shards, validation, documents):
    folder = corpus(tmp_path / "text", shards, validation)
    one = prepared(folder, tmp_path / "one", documents=documents)
    many = prepared(folder, tmp_path / "many", documents=documents, processes=3)
    assert many == one
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_an_interrupted_preparation_goes_on_with_another_number_of_processes(tmp_path):
    """A finished file is kept: the second start tokenises none of its text again."""
    folder = corpus(tmp_path / "text", 2, False)
    prepared(folder, tmp_path / "whole")
    first = len((folder / "c4-all.0.json").read_text(errors="replace").splitlines())
    with pytest.raises(KeyboardInterrupt):
        prepare(str(folder), Interrupted(batches=first // 5 + 10), tmp_path / "tokens", progress=False)
    assert (tmp_path / "tokens/00000.uint16").is_file()
    inode = (tmp_path / "tokens/00000.uint16").stat().st_ino
    prepared(folder, tmp_path / "tokens", processes=2)
    assert (tmp_path / "tokens/00000.uint16").stat().st_ino == inode
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_a_tokenising_process_that_dies_is_an_error_and_the_same_call_goes_on(tmp_path):
    class Dying(ByteTokenizer):
        def encode_batch(self, texts):
            if any("document 200 " in text for text in texts):
                os._exit(1)
            return super().encode_batch(texts)

    folder = corpus(tmp_path / "text", 1, True)
    with pytest.raises(DataError, match="died; if memory ran out, lower --processes; the same command resumes"):
        prepare(str(folder), Dying(), tmp_path / "tokens", progress=False, processes=2)
    prepared(folder, tmp_path / "tokens", processes=2)
    prepared(folder, tmp_path / "whole")
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_errors_of_the_data_are_the_same_with_processes(tmp_path):
    folder = corpus(tmp_path / "text", 3, True)
    for processes in (1, 2):
        with pytest.raises(DataError, match=r"bad record in .*c4-train\.0\.json, line 1: malformed json"):
            prepared(folder, tmp_path / f"strict{processes}", on_bad_record="fail", processes=processes)


def test_the_bar_shows_tokens_per_second(tmp_path, capsys):
    prepare(str(corpus(tmp_path / "text", 1, True)), ByteTokenizer(), tmp_path / "tokens", processes=2)
    shown = capsys.readouterr().err
    assert re.search(r"[\d,]+ tokens/s", shown)
    assert "file 1 of 3, train c4-train.0.json: " in shown
    assert ": : " not in shown


def test_a_preparation_killed_at_random_times_writes_the_same_bytes(tmp_path):
    """Each start has its own number of processes. Processes that a killed start leaves behind do not hinder the next one."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    folder = corpus(tmp_path / "text", 3, True, count=900)
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from corpora import ByteTokenizer
        from peft_pretraining.data import prepare

        class Slow(ByteTokenizer):
            def encode_batch(self, texts):
                time.sleep(0.002)
                return super().encode_batch(texts)

        prepare._COMMIT_RECORDS, prepare._TOGETHER = 7, 5
        print("ready", flush=True)
        prepare.prepare({str(folder)!r}, Slow(), Path(sys.argv[1]), progress=False, processes=int(sys.argv[2]))
        """)
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    kills = 0
    for _ in range(60):
        process = subprocess.Popen(
            [sys.executable, script, tmp_path / "tokens", str(draw.choice([1, 2, 3]))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"ready\n", process.stderr.read()
        if kills < 5:
            time.sleep(draw.uniform(0.0, 0.25))
            process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -9, errors
        kills += 1
    prepared(folder, tmp_path / "whole")
    assert kills
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_a_file_damaged_after_an_interruption_is_written_again(tmp_path):
    folder = corpus(tmp_path / "text", 2, True)
    prepared(folder, tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):
        prepare(str(folder), Interrupted(batches=60), tmp_path / "tokens", progress=False)
    first = tmp_path / "tokens/00000.uint16"
    first.write_bytes(first.read_bytes()[::-1])
    prepared(folder, tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_a_second_preparation_of_the_same_folder_at_the_same_time_is_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    folder = corpus(tmp_path / "text", 1, True)
    (tmp_path / "tokens").mkdir()
    with (tmp_path / "tokens/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing"):
            prepared(folder, tmp_path / "tokens")
    prepared(folder, tmp_path / "tokens")
