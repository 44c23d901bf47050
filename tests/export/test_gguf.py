"""What llama.cpp's converter reads of an export is there and right, as far as its own package, `gguf`, can tell.

With $LLAMA_CPP, a checkout of llama.cpp, its converter itself is run.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import train

from peft_pretraining.data.sentencepiece_training import train_sentencepiece
from peft_pretraining.data.tokenizer import load_tokenizer, write_tokenizer
from peft_pretraining.export.sentencepiece_file import BPE_FILE, UNIGRAM_FILE, write_sentencepiece
from peft_pretraining.export.write import export

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

ROOT = Path(__file__).resolve().parents[2]
Trained = Callable[[str], Path]
TEXT = " Fox 12 jumps  over </s> dog\n\tin <unk> month \u4f60 <0x41>"
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
# What the converter takes from config.json for a LLaMA.
READ = {
    "architectures", "num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_theta", "vocab_size", "head_dim", "eos_token_id",
    "pad_token_id",
}  # fmt: skip


def words() -> list[str]:
    """The letters of README.md: text that a vocabulary of 320 pieces suffices for, bytes included."""
    return [re.sub("[^a-z]+", " ", (ROOT / "README.md").read_text(encoding="utf-8").lower())]


@pytest.fixture(scope="module")
def dense(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(trained("sltrain"), tmp_path_factory.mktemp("gguf") / "my-model").folder


@pytest.fixture(scope="module")
def unigram(tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run with a unigram tokenizer, the kind of T5's."""
    folder = tmp_path_factory.mktemp("unigram")
    (folder / "unigram.model").write_bytes(train_sentencepiece(words(), "unigram", 320))
    run = train("full", [str(folder / "unigram.model") if flag.endswith(".model") else flag for flag in tiny_run], folder / "run")
    return export(run, folder / "my-model").folder


def test_every_tensor_has_a_name_in_ggufs_llama_and_none_is_missing(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    assert config.keys() >= READ
    assert config["architectures"] == ["LlamaForCausalLM"]  # by this name the converter chooses LLaMA
    llama = gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(llama, config["num_hidden_layers"])
    found = {names.get_name(name, try_suffixes=(".weight",)) for name in load_file(dense / "model.safetensors")}
    parts = ["ATTN_NORM", "ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_OUT", "FFN_NORM", "FFN_GATE", "FFN_DOWN", "FFN_UP"]
    templates = [gguf.TENSOR_NAMES[getattr(gguf.MODEL_TENSOR, part)] for part in parts]
    layers = {f"{each.format(bid=number)}.weight" for number in range(config["num_hidden_layers"]) for each in templates}
    assert found == layers | {"token_embd.weight", "output_norm.weight", "output.weight"}


def test_special_tokens_are_the_trainings_and_none_is_added(dense: Path) -> None:
    special = gguf.SpecialVocab(dense, n_vocab=320)
    assert special.special_token_ids == {"eos": 1, "unk": 2, "pad": 0}
    assert special.add_special_token == {"bos": False, "eos": False}


def test_gguf_reads_the_pieces_of_the_sentencepiece_file(dense: Path) -> None:
    tokens = list(gguf.SentencePieceVocab(dense).all_tokens())
    vocabulary = json.loads((dense / "tokenizer.json").read_text())["model"]["vocab"]
    assert {text.decode(): index for index, (text, _, _) in enumerate(tokens)} == vocabulary
    kinds = [int(kind) for _, _, kind in tokens]
    assert kinds[:3] == [CONTROL, CONTROL, UNKNOWN]
    assert all((kind == BYTE) == bool(re.fullmatch(rb"<0x..>", text)) for text, _, kind in tokens)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_file_has_the_ids_of_training(tmp_path: Path, kind: Literal["bpe", "unigram"]) -> None:
    from sentencepiece import SentencePieceProcessor

    (tmp_path / "first.model").write_bytes(train_sentencepiece(words(), kind, 320))
    tokenizer = load_tokenizer(tmp_path / "first.model")
    tokenizer.save_for_inference(tmp_path / "export", 64)
    assert write_sentencepiece(tokenizer, tmp_path / "export")
    (file,) = (tmp_path / "export").glob("*.model")
    assert file.name == {"bpe": BPE_FILE, "unigram": UNIGRAM_FILE}[kind]
    assert SentencePieceProcessor(model_file=str(file)).encode([TEXT]) == tokenizer.encode_batch([TEXT])
    assert load_tokenizer(tmp_path / "export").fingerprint == tokenizer.fingerprint


def test_t5s_sentencepiece_file_has_the_ids_of_training(t5_model: Path, c4_sample: Path, tmp_path: Path) -> None:
    import gzip

    from sentencepiece import SentencePieceProcessor

    tokenizer = load_tokenizer(t5_model)
    tokenizer.save_for_inference(tmp_path, 64)
    assert write_sentencepiece(tokenizer, tmp_path)
    with gzip.open(next(c4_sample.glob("*validation*")), "rt", encoding="utf-8") as lines:
        texts = [TEXT, *(json.loads(next(lines))["text"] for _ in range(10))]
    ours = SentencePieceProcessor(model_file=str(tmp_path / UNIGRAM_FILE))
    assert ours.encode(texts) == tokenizer.encode_batch(texts)


def test_a_tokenizer_of_bytes_gets_no_sentencepiece_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(["</s>", *letters, "Fo"])}, [("F", "o")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    write_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), tmp_path)
    assert not write_sentencepiece(load_tokenizer(tmp_path), tmp_path)
    assert not list(tmp_path.glob("*.model"))


def blocks() -> list[str]:
    """The blocks of docs/after_training.md about GGUF that convert: the usual one, and the one for unigram tokenizers."""
    page = (ROOT / "docs" / "after_training.md").read_text(encoding="utf-8")
    found = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return [block for block in found if "convert_hf_to_gguf" in block and "git clone" not in block]


@pytest.mark.parametrize(("number", "kind"), [(0, "llama"), (1, "t5")])
def test_llama_cpps_converter_keeps_weights_and_pieces(
    dense: Path, unigram: Path, tmp_path: Path, number: int, kind: str
) -> None:
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp, whose converter is in no package")
    folder = [dense, unigram][number]
    (tmp_path / "work").mkdir()
    (tmp_path / "llama.cpp").symlink_to(os.environ["LLAMA_CPP"])
    (tmp_path / "work" / "my-model").symlink_to(folder)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    path = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", blocks()[number]], cwd=tmp_path / "work", env=path, check=True)
    reader = gguf.GGUFReader(tmp_path / "work" / "my-model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["tokenizer.ggml.model"]) == ("llama", kind)
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.eos_token_id"]) == (False, 1)
    weights = load_file(folder / "model.safetensors")
    for tensor in reader.tensors:
        if tensor.name in ("token_embd.weight", "blk.1.ffn_down.weight", "output_norm.weight"):
            name = {"t": "model.embed_tokens", "b": "model.layers.1.mlp.down_proj", "o": "model.norm"}[tensor.name[0]] + ".weight"
            torch.testing.assert_close(
                torch.from_numpy(np.array(tensor.data)).float(), weights[name].float(), rtol=2**-10, atol=2**-24
            )
