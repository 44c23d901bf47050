"""Long documents are encoded in parts, with the ids of the whole text and in bounded memory."""

import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from corpora import ByteTokenizer, json_lines, texts

from peft_pretraining.data import tokenizer as encoding
from peft_pretraining.data.lanes import LaneState, Order, lane_sequences
from peft_pretraining.data.source import open_source
from peft_pretraining.data.tokenizer import encode_documents, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    *("the", "fox's", "", "jumps,", "over\tdog\n", "month", "12,345", "naïve", "—", "你好", "\U0001f600", "e\u0301"),
    *("</s>", "don't", "`x_1`", "\n\n", "a\u00a0b"),
]


def random_text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def check_parts(tokenizer, monkeypatch, rounds: int) -> None:
    """Checks that random texts, encoded in parts of a few hundred characters, have the ids of the whole text."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(rounds):
        monkeypatch.setattr(encoding, "PART_CHARACTERS", draw.randint(300, 900))
        text = random_text(draw, draw.randint(1, 2000))
        (ids,) = encode_documents(tokenizer, [text])
        assert list(ids) == tokenizer.encode_batch([text])[0]


def test_parts_have_the_ids_of_the_whole_with_sentencepiece_bpe(tiny_run, monkeypatch):
    """A SentencePiece BPE model with byte fallback."""
    check_parts(load_tokenizer(tiny_run[tiny_run.index("--tokenizer") + 1]), monkeypatch, 30)


def test_parts_have_the_ids_of_the_whole_with_t5(t5_model, monkeypatch):
    """A unigram model that normalises blanks and Unicode."""
    check_parts(load_tokenizer(t5_model), monkeypatch, 30)


def test_parts_have_the_ids_of_the_whole_with_byte_level_bpe(monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from peft_pretraining.data.tokenizer import Tokenizer as OurTokenizer

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([random_text(random.Random(1), 3000)], trainer)
    check_parts(OurTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), "bpe"), monkeypatch, 30)


def test_a_text_without_blanks_is_divided_at_the_size_of_a_part(monkeypatch):
    monkeypatch.setattr(encoding, "PART_CHARACTERS", 100)
    (ids,) = encode_documents(ByteTokenizer(), ["x" * 1234])
    assert list(ids) == [ord("x") + 2] * 1234


def test_documents_of_any_lengths_keep_their_order(monkeypatch):
    monkeypatch.setattr(encoding, "PART_CHARACTERS", 50)
    monkeypatch.setattr(encoding, "_TOGETHER_CHARACTERS", 120)
    documents = ["a b", "c d " * 40, np.array([7, 8], np.uint16), "", "e", "f g " * 20, "h" * 49, "i" * 50, "j" * 51]
    expected = [each.tolist() if isinstance(each, np.ndarray) else ByteTokenizer().encode_batch([each])[0] for each in documents]
    assert [list(ids) for ids in encode_documents(ByteTokenizer(), documents)] == expected


def test_only_the_needed_part_of_a_long_document_is_encoded(monkeypatch):
    monkeypatch.setattr(encoding, "PART_CHARACTERS", 100)
    (ids,) = encode_documents(ByteTokenizer(), ["word " * 1000], enough=150)
    assert 150 <= len(ids) < 400


@pytest.mark.parametrize("packing", [True, False])
def test_a_long_document_gives_the_same_sequences_in_parts(tmp_path, monkeypatch, packing):
    documents = texts(12)
    documents.insert(5, "A long story. " * 400)
    (tmp_path / "x.jsonl").write_bytes(json_lines(documents))
    source = open_source(str(tmp_path), "train", hold_out=False)

    def sequences():
        stream = lane_sequences(source, ByteTokenizer(), Order(1, 3, 40, packing), 0, LaneState())
        return [next(stream).ids.tolist() for _ in range(300)]

    expected = sequences()
    monkeypatch.setattr(encoding, "PART_CHARACTERS", 128)
    assert sequences() == expected


def test_a_document_of_50_mb_takes_bounded_memory(tmp_path, tiny_run):
    """Encoded as a whole it would take 80 bytes per character (measured with T5), 4 GB. Padded, so that the test is quick."""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss has other units on other systems")
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "Fox jumps over dog in month. " * 1_800_000}) + "\n")
    assert path.stat().st_size > 50_000_000
    script = textwrap.dedent(f"""
        import resource, sys
        from peft_pretraining.data.loader import TrainLoader
        from peft_pretraining.data.source import open_source
        from peft_pretraining.data.tokenizer import encode_documents, load_tokenizer

        tokenizer = load_tokenizer({tiny_run[tiny_run.index("--tokenizer") + 1]!r})
        source = open_source({str(path)!r}, "train", hold_out=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loader = TrainLoader(source, tokenizer, max_length=64, packing=False, lanes=1, seed=1)
        batch = next(iter(loader))
        assert batch.num_tokens == 64
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """)
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 600_000  # kB
