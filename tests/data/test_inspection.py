"""`data inspect` prints correct figures of a text or prepared data set."""

import itertools
import json
import statistics

import pytest
from corpora import ByteTokenizer, json_lines, texts

from peft_pretraining.__main__ import main
from peft_pretraining.data import DataError, TokenizerError
from peft_pretraining.data.inspection import inspect_dataset, shown
from peft_pretraining.data.lanes import LaneState, Order, lane_sequences
from peft_pretraining.data.prepare import prepare
from peft_pretraining.data.source import open_source


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    bad = b'broken\n{"text": 3}\n\n{"url": 1}\nbroken\n'
    (tmp_path / "text/a-train.jsonl").write_bytes(json_lines(texts(50)) + bad + json_lines(texts(50, 50)))
    (tmp_path / "text/a-validation.jsonl").write_bytes(json_lines(["\x1b[31mred\n\u202e", "x" * 1000]))
    return tmp_path / "text"


def test_figures_equal_those_computed_from_the_documents(folder):
    figures = inspect_dataset(str(folder), ByteTokenizer(), documents=None, max_length=40)["train"]
    lengths = [len(text) for text in texts(100)]
    assert (figures["documents"], figures["whole_split"], figures["files"]) == (100, True, 1)
    for unit in ("characters", "tokens"):  # a byte is a token
        assert figures[unit]["total"] == sum(lengths)
        assert figures[unit]["mean"] == pytest.approx(statistics.mean(lengths))
        assert figures[unit]["median"] == statistics.median(lengths)
        assert figures[unit]["max"] == max(lengths)
        assert figures[unit]["p95"] == sorted(lengths)[95]  # several documents have this length
    ended = [length + 1 for length in lengths]  # eos
    kept = [min(length, 40) for length in ended]
    assert figures["cut_documents_share"] == sum(length > 40 for length in ended) / 100
    assert figures["cut_tokens_share"] == pytest.approx(1 - sum(kept) / sum(ended))
    assert figures["padding_share"] == pytest.approx(1 - sum(kept) / 4000)
    assert figures["bad_records"] == {"malformed_json": 2, "missing_text": 1, "text_not_string": 1}
    assert "a-train.jsonl, line 51: malformed json" in figures["bad_examples"][0]


def test_prepared_data_has_the_figures_of_its_source(folder, tmp_path):
    prepare(str(folder), ByteTokenizer(), tmp_path / "tokens", progress=False)
    whole, tokens = (inspect_dataset(str(path), ByteTokenizer(), documents=None) for path in (folder, tmp_path / "tokens"))
    for split in ("train", "validation"):
        for name in (
            "documents",
            "characters",
            "tokens",
            "padding_share",
            "cut_tokens_share",
            "bad_records",
        ):
            assert tokens[split][name] == whole[split][name]
    assert inspect_dataset(str(tmp_path / "tokens"), None)["train"]["tokens"] == whole["train"]["tokens"]
    other = ByteTokenizer()
    other.fingerprint = "other"
    with pytest.raises(TokenizerError, match="was prepared with"):
        inspect_dataset(str(tmp_path / "tokens"), other)


@pytest.mark.parametrize("files", [1, 3, 8])
def test_the_shares_of_lanes_are_what_lanes_read_in_a_pass(tmp_path, files):
    """Documents and tokens, eos included; eight equal files are read whole, two by each lane."""
    (tmp_path / "text").mkdir()
    documents = [text.strip() if files < 8 else "x" * 50 for text in texts(96)]
    documents[5] = documents[5] if files == 8 else ""
    for file in range(files):
        lines = b"broken\n" * (files == 3) + json_lines(documents[file::files])
        (tmp_path / f"text/{file}.jsonl").write_bytes(lines)
    figures = inspect_dataset(str(tmp_path / "text"), ByteTokenizer(), documents=None, data_lanes=4)["train"]["lanes"]
    source, read = open_source(str(tmp_path / "text"), "train"), []
    for lane in range(4):
        sequences = lane_sequences(source, ByteTokenizer(), Order(4, 0, 9999, False), lane, LaneState())
        read.append([len(sequence.ids) for sequence in itertools.takewhile(lambda each: each.state.epoch == 0, sequences)])
    assert figures["documents"] == [len(lengths) for lengths in read]
    assert figures["tokens"] == [sum(lengths) for lengths in read]
    assert (figures["number"], figures["packed_order"]) == (4, "global")


def test_tokens_per_lane_are_printed(tmp_path, capsys, tiny_run):
    """A book in one of 24 lanes; packed, all lanes read equally much. Of the first documents, the figures say so."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/train.jsonl").write_bytes(json_lines(["short"] * 59 + ["word " * 2000]))
    (tmp_path / "text/validation.jsonl").write_bytes(json_lines(["held out"]))
    tokenizer = tiny_run[tiny_run.index("--tokenizer") + 1]
    arguments = ["data", "inspect", "--dataset", str(tmp_path / "text")]
    assert main([*arguments, "--tokenizer", tokenizer, "--json"]) == 0
    lanes = json.loads(capsys.readouterr().out)["train"]["lanes"]
    assert main([*arguments, "--tokenizer", tokenizer]) == 0
    printed = capsys.readouterr().out
    # Record 59 of one file is lane 59 mod 24; 60 records are two for each lane and a third for the first twelve.
    assert lanes["tokens"].index(max(lanes["tokens"])) == 11
    assert "documents per lane and pass: 2 (lane 12) to 3 (lane 0)" in printed
    assert f"to {lanes['tokens'][11]:,} (lane 11)" in printed
    assert f"with --packing, tokens per lane and pass: {sum(lanes['tokens']) / 24:,.0f} in every lane" in printed
    assert main([*arguments, "--documents", "20", "--data_lanes", "6"]) == 0
    printed = capsys.readouterr().out
    assert "6 lanes, of the documents read" in printed
    assert "characters per lane and pass: 15 (lane 2) to 20 (lane 0)" in printed


def test_the_number_of_documents_to_read_can_be_limited(folder):
    figures = inspect_dataset(str(folder), None, documents=7)
    assert figures["train"]["documents"] == 7
    assert figures["train"]["whole_split"] is False
    assert figures["train"]["tokens"] is figures["train"]["padding_share"] is None


def test_examples_are_short_and_without_control_characters(folder):
    examples = inspect_dataset(str(folder), None)["validation"]["examples"]
    assert examples[0] == "\\x1b[31mred\\n\\u202e"
    assert examples[1] == "x" * 200 + "…"
    assert shown("a\x07b\u2028", 9) == "a\\x07b\\u2028"


def test_data_inspect_prints_figures_and_verifies_checksums(folder, tmp_path, capsys, tiny_run):
    tokenizer = tiny_run[tiny_run.index("--tokenizer") + 1]
    arguments = ["--dataset", str(folder), "--tokenizer", tokenizer]
    assert main(["data", "prepare", *arguments, "--out", str(tmp_path / "tokens"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["train"], made["validation"]) == (100, 2)
    assert made["bad_records"] == {"malformed_json": 2, "missing_text": 1, "text_not_string": 1}
    assert main(["data", "inspect", *arguments, "--documents", "all", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)
    assert main(["data", "inspect", "--dataset", str(tmp_path / "tokens"), "--verify", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)
    assert tokens["verified_files"] == 4
    assert tokens["train"]["tokens"] == text["train"]["tokens"]
    assert tokens["train"]["examples"]
    assert main(["data", "inspect", "--dataset", str(tmp_path / "tokens"), "--max_length", "16"]) == 0
    printed = capsys.readouterr().out
    assert "max_length 16: cuts " in printed
    assert "bad records: 2 malformed json, 1 missing text, 1 text not string" in printed
    index = tmp_path / "tokens/00001.index"
    index.write_bytes(index.read_bytes()[:-1] + b"\x01")
    assert main(["data", "inspect", "--dataset", str(tmp_path / "tokens"), "--verify"]) == 2
    assert "00001.index: its checksum differs from prepared.json" in capsys.readouterr().err
    assert main(["data", "inspect", *arguments, "--verify"]) == 2
    assert "is not prepared data" in capsys.readouterr().err


def test_a_missing_data_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        inspect_dataset(str(tmp_path / "nothing"), None)
