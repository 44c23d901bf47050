"""Text never encodes to a control symbol or to an id outside the vocabulary, and ids equal those of the libraries."""

import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_pretraining.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer, tokenizer_path

SENTENCES = [
    f"The {noun} of number {i} was not in the {place}, naïve as it is." for i, (noun, place) in enumerate(
        (n, p) for n in ("house", "network", "weight", "matrix", "support") for p in ("garden", "layer", "sea", "record")
    )
]  # fmt: skip
SPECIAL_TEXT = "a </s> b<pad>c <unk> <s> <extra_id_0> <extra_id_99> <0x0A> </s>"
KINDS = ["bpe", "unigram", "t5-like"]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Trains SentencePiece models: lossless BPE and Unigram with byte fallback, and one that normalises as T5's."""
    folder = tmp_path_factory.mktemp("models")
    lossless = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    options = {
        "bpe": {"model_type": "bpe", "vocab_size": 420, "user_defined_symbols": ["\n"], **lossless},
        "unigram": {"model_type": "unigram", "vocab_size": 400, "hard_vocab_limit": False, **lossless},
        "t5-like": {"model_type": "unigram", "vocab_size": 120, "hard_vocab_limit": False},
    }
    for kind, own in options.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 3),
            model_prefix=str(folder / kind),
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
            **own,
        )
    return {kind: folder / f"{kind}.model" for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_model_gives_sentencepieces_ids(models, kind):
    tokenizer, library = load_tokenizer(models[kind]), sentencepiece.SentencePieceProcessor(str(models[kind]))
    texts = [
        *SENTENCES,
        "  two  spaces ",
        "line\nbreak\n\n  indent",
        "你好 \U0001f600 tab\there",
        "",
        " ",
        "a </s> b <pad>",
    ]
    assert tokenizer.encode_batch(texts) == [library.encode(text) for text in texts]
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.text_vocab_size == tokenizer.vocab_size == library.get_piece_size()


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_special_tokens_in_a_document_are_ordinary_text(models, kind):
    """No text gives the ids of pad or eos, or ids beyond the text's vocabulary."""
    tokenizer = load_tokenizer(models[kind])
    (ids,) = tokenizer.encode_batch([SPECIAL_TEXT])
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)
    assert max(ids) < tokenizer.text_vocab_size
    if kind != "t5-like":  # its vocabulary lacks "<"
        assert 2 not in ids
        assert tokenizer.decode(ids) == SPECIAL_TEXT


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60))
def test_byte_fallback_is_lossless(models, kind, text):
    """decode(encode(text)) == text for any Unicode text, and bytes_per_id adds up to its length plus 1 for the first space."""
    tokenizer = load_tokenizer(models[kind])
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.bytes_per_id()[ids].sum()) == len(text.encode()) + bool(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_gives_the_same_ids(models, kind, tmp_path):
    """The folder gives the same ids and fingerprint, and transformers' AutoTokenizer loads it too."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(models[kind])
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode_batch([*SENTENCES, SPECIAL_TEXT]) == tokenizer.encode_batch([*SENTENCES, SPECIAL_TEXT])
    assert (loaded.eos_id, loaded.pad_id, loaded.text_vocab_size) == (1, 0, tokenizer.text_vocab_size)
    others = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert others(SENTENCES, add_special_tokens=False).input_ids == tokenizer.encode_batch(SENTENCES)


def test_a_pickled_tokenizer_gives_the_same_ids(models):
    tokenizer = load_tokenizer(models["bpe"])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode_batch([SPECIAL_TEXT]) == tokenizer.encode_batch([SPECIAL_TEXT])
    assert copy.fingerprint == tokenizer.fingerprint


def test_different_tokenizers_have_different_fingerprints(models):
    assert len({load_tokenizer(path).fingerprint for path in models.values()}) == len(KINDS)


def test_a_folder_with_one_model_file_is_a_tokenizer(models, tmp_path):
    (tmp_path / "demo.model").write_bytes(models["bpe"].read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(models["bpe"]).fingerprint


def test_control_ids_count_zero_bytes(models):
    lengths = load_tokenizer(models["bpe"]).bytes_per_id()
    assert lengths[:3].tolist() == [0, 0, 0]
    tokenizer = load_tokenizer(models["bpe"])
    (newline,) = tokenizer.encode_batch(["x\n"])[0][-1:]
    assert lengths[newline] == 1


def test_byte_level_pieces_count_one_byte_per_character():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(alphabet)} | {"th": 256, "<|end|>": 257}
    backend = Backend(models.BPE(vocab, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>"), "byte level")
    text = "the naïve path\n<|end|> 你好"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.bytes_per_id()[ids].sum()) == len(text.encode())
    assert (tokenizer.pad_id, tokenizer.text_vocab_size) == (257, 258)


# --- The published tokenizer ---


def t5(t5_model):
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(str(t5_model))


def c4_texts(c4_sample) -> list[str]:
    import gzip
    import json

    return [json.loads(line)["text"] for path in sorted(c4_sample.iterdir()) for line in gzip.open(path)]


def test_t5_ids_of_c4_equal_the_published_ones(t5_model, c4_sample):
    """Wrapped or read from its .model file, T5's tokenizer gives transformers' ids, truncated and ended as published."""
    from peft_pretraining.data.lanes import Document, padded_sequences

    theirs, texts = t5(t5_model), c4_texts(c4_sample)
    assert len(texts) == 300
    published = theirs(texts, truncation=True, max_length=256).input_ids
    for tokenizer in (Tokenizer(theirs, "t5"), load_tokenizer(t5_model)):
        documents = [(Document(ids), 0, 0) for ids in tokenizer.encode_batch(texts)]
        ours = [ids.tolist() for ids, _ in padded_sequences(documents, eos_id=1, max_length=256)]
        assert ours == published


def test_text_never_gives_t5s_extra_ids(t5_model):
    """T5 has 32,100 ids, but text gives none above 31,999, so a model with 32,000 rows suffices."""
    wrapped = Tokenizer(t5(t5_model), "t5")
    assert (wrapped.vocab_size, wrapped.text_vocab_size, wrapped.pad_id, wrapped.eos_id) == (32100, 32000, 0, 1)
    every_special = " ".join(t5(t5_model).get_added_vocab())
    (ids,) = wrapped.encode_batch([every_special])
    assert max(ids) < 32000
    assert not {0, 1} & set(ids)
    assert wrapped.bytes_per_id()[32000:].sum() == 0
    assert len(wrapped.decode([32099, 0, 1, 8774])) == len("Hello")


def test_a_saved_t5_tokenizer_keeps_its_fingerprint(t5_model, tmp_path):
    wrapped = Tokenizer(t5(t5_model), "t5")
    wrapped.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == wrapped.fingerprint


# --- Errors ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.model", "'missing.model' not found: no such file"),
        ("./folder/that/is/not", "not found: no such file or folder"),
        ("broken.model", "not a SentencePiece model"),
        ("empty.model", "not a SentencePiece model"),
        ("empty_folder", "neither tokenizer.json nor one SentencePiece .model file"),
        ("broken_folder", "cannot load a tokenizer from"),
        ("someone/not-downloaded", "'someone/not-downloaded' is not in the local cache and HF_HUB_OFFLINE is set"),
        ("a name with spaces!", "check the name"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_gives_one_line(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "broken.model").write_bytes(b"\x00garbage that is no model" * 9)
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "broken_folder").mkdir()
    (tmp_path / "broken_folder" / "tokenizer.json").write_text("{not json")
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_reported_soon(monkeypatch):
    """Without a check of its own the library retries for most of a minute and prints each attempt."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TokenizerError, match=r"cannot load tokenizer 'someone/not-downloaded' from the hub .*check the network"):
        load_tokenizer("someone/not-downloaded")


def test_a_tokenizer_without_eos_is_refused():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(TokenizerError, match="no eos token"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE())), "none")


def test_a_tokenizer_that_cannot_spell_its_own_symbols_is_refused():
    """With a whole-word vocabulary, "[END]" in a document would become the control symbol."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel({"[END]": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(TokenizerError, match=r"the text '\[END\]' of a document into a control symbol"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]", unk_token="[UNK]"), "words")


def byte_level(*special: str):
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as BackendTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = BackendTokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    return backend


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"])
def test_a_tokenizer_json_alone_is_a_tokenizer_and_so_is_its_path(tmp_path, end):
    backend = byte_level("<|start|>", end, "<|user|>")
    backend.save(str(tmp_path / "tokenizer.json"))
    folder, file = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")
    assert folder.fingerprint == file.fingerprint
    assert folder.eos_id == file.eos_id == backend.token_to_id(end)
    (tmp_path / "own.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path / "own.json").fingerprint == file.fingerprint
    file.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == file.fingerprint
    assert load_tokenizer(tmp_path / "saved" / "tokenizer.json").fingerprint == file.fingerprint


def test_a_tokenizer_json_that_does_not_tell_its_end_token_is_refused_with_the_way_out(tmp_path):
    for special, said in (((), "has no eos token"), (("</s>", "<|endoftext|>"), "any of <|endoftext|>, </s> may end a document")):
        byte_level(*special).save(str(tmp_path / "tokenizer.json"))
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            with pytest.raises(TokenizerError) as caught:
                load_tokenizer(path)
            assert said in str(caught.value)
            assert "tokenizer_config.json" in str(caught.value)


@pytest.mark.parametrize("name", ["./t.model", "t.json", "/no/such/folder", "a/b/c", "~/no_such_tokenizer"])
def test_a_path_without_a_file_is_told_from_a_name_on_the_hub(name):
    with pytest.raises(TokenizerError, match="not found: no such file or folder"):
        tokenizer_path(name)
    assert not tokenizer_path("some-owner/t5-like").exists()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 499723\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.model", POINTER, "is a git-lfs pointer, not the file of 499,723 bytes"),
        ("tokenizer.json", POINTER, "is a git-lfs pointer"),
        ("tokenizer_config.json", POINTER, "is a git-lfs pointer"),
        ("tokenizer.model", "IQ== 0\nIg== 1\nIw== 2\n", "is a tiktoken vocabulary"),
        ("tekken.json", '{"config": {}, "vocab": []}', "tekken.json"),
        ("tokenizer.json", "\ufeff{}", "begins with a byte order mark"),
    ],
)
def test_a_tokenizer_file_of_another_kind_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    assert said in str(caught.value)
    if name.endswith(".model") or name == "tekken.json":
        with pytest.raises(TokenizerError):
            load_tokenizer(tmp_path / name)
