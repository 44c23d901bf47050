"""`data tokenizer` trains the same bytes from the same data, never on held-out text, and names what cannot work."""

import json

import pytest
import sentencepiece

from peft_pretraining.__main__ import main as command
from peft_pretraining.data import DataError
from peft_pretraining.data.records import is_held_out
from peft_pretraining.data.sentencepiece_training import _short_parts
from peft_pretraining.data.source import open_source
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.data.train_tokenizer import _sample, train_tokenizer

WORDS = ["river", "stone", "cloud", "engine", "garden", "window", "paper", "bridge", "silver", "orange"]


def corpus(folder, files=3, documents=60, words=WORDS):
    folder.mkdir(parents=True)
    for number in range(files):
        texts = [
            " ".join(words[(k + j * (number + 1)) % len(words)] for j in range(12)) + f" {number}.{k}" for k in range(documents)
        ]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def trained(dataset, out, *flags):
    return command(["data", "tokenizer", "--dataset", str(dataset), "--vocab_size", "290", "--out", str(out), *flags])


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_the_command_trains_the_same_bytes_twice_and_any_text_comes_back(tmp_path, model, capsys):
    folder = corpus(tmp_path / "text")
    for name in ("one", "two"):
        assert trained(folder, tmp_path / name, "--model", model) == 0
    assert "290 pieces" in capsys.readouterr().out
    content = (tmp_path / "one" / "tokenizer.model").read_bytes()
    assert content == (tmp_path / "two" / "tokenizer.model").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert (processor.vocab_size(), processor.pad_id(), processor.eos_id(), processor.unk_id()) == (290, 0, 1, 2)
    for text in ("river stone", "two\nlines  and spaces ", "日本語 🙂 Ünïcode"):
        assert processor.decode(processor.encode(text)) == text
    assert load_tokenizer(str(tmp_path / "one")).text_vocab_size <= 290


def test_the_sample_has_no_held_out_text_keeps_its_bounds_and_takes_from_every_file(tmp_path):
    source = open_source(str(corpus(tmp_path / "text", documents=200)), "train")
    everything = _sample(source, None, 10**9, seed=0)
    assert len(everything) < 600
    assert not any(is_held_out(text) for text in everything)
    by_documents = _sample(source, 30, 10**9, seed=0)
    assert [sum(text.split()[-1].startswith(f"{number}.") for text in by_documents) for number in range(3)] == [10, 10, 10]
    by_bytes = _sample(source, None, 3000, seed=0)
    assert 2900 < sum(len(text.encode()) for text in by_bytes) <= 3000
    assert _sample(source, 30, 10**9, seed=0) == by_documents


def test_a_list_is_sampled_by_its_weights(tmp_path):
    one, two = corpus(tmp_path / "one"), corpus(tmp_path / "two", words=[word.upper() for word in WORDS])
    figures = train_tokenizer(f"{one}:3, {two}:1", tmp_path / "out", vocab_size=330, max_documents=80)
    assert figures["documents"] == 80
    alone = train_tokenizer(str(one), tmp_path / "alone", vocab_size=310, max_documents=60)
    other = train_tokenizer(str(two), tmp_path / "other", vocab_size=310, max_documents=20)
    assert figures["bytes"] == alone["bytes"] + other["bytes"]


def test_long_lines_are_cut_before_spaces_and_lose_nothing():
    line = "wörter " * 3000 + "x" * 9000
    parts = list(_short_parts(line))
    assert "".join(parts) == line
    assert max(len(part.encode()) for part in parts) <= 4192
    assert all(part.startswith(" ") for part in parts[1:4])


@pytest.mark.parametrize(
    ("size", "problem"), [(20, r"--vocab_size 20: .* raise it to that"), (90000, r"--vocab_size 90000: .* lower it to that")]
)
def test_a_vocabulary_that_does_not_fit_is_named_with_the_way_out_and_leaves_nothing(tmp_path, size, problem):
    with pytest.raises(DataError, match=problem):
        train_tokenizer(str(corpus(tmp_path / "text")), tmp_path / "out", vocab_size=size)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_vocabulary_that_is_no_number_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(["data", "tokenizer", "--dataset", "demo", "--out", str(tmp_path / "out"), "--vocab_size", "many"])
    assert "--vocab_size: many is not a whole number" in capsys.readouterr().err


def test_an_existing_folder_and_prepared_data_are_refused(tmp_path, capsys):
    folder = corpus(tmp_path / "text")
    assert trained(folder, folder) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert trained(folder, tmp_path / "tok") == 0
    argv = ["--dataset", str(folder), "--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "tokens")]
    assert command(["data", "prepare", *argv, "--processes", "2"]) == 0
    assert trained(tmp_path / "tokens", tmp_path / "other") == 2
    assert "is prepared: it holds tokens and no text" in capsys.readouterr().err
    assert command(["data", "prepare", *argv[:-1], str(tmp_path / "bad"), "--dataset", f"{folder},{tmp_path}"]) == 2
    assert "takes one data set; call it once for each" in capsys.readouterr().err
