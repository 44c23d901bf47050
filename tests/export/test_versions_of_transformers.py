"""What a run, an export and a fine-tuned model hold is read alike by transformers 4 and 5."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import TINY_MODEL
from tiny_runs import train

from peft_pretraining.checkpoint.step_folder import resolve
from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.data.tokenizer import load_tokenizer, write_tokenizer
from peft_pretraining.export.load import load_model
from peft_pretraining.export.write import export
from peft_pretraining.model.llama import both_spellings, hf_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TEXT = "Fox 3 jumps over dog </s> 12"
# A folder with transformers 4, as `pip install --no-deps --target FOLDER` makes it from these.
FOLDER_VARIABLE = "TRANSFORMERS_4"
PACKAGES = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
text, ids, models, tokenizers = json.loads(sys.argv[1])
answer = {"version": transformers.__version__, "logits": {}, "ids": {}, "fed": {}}
for folder in models:
    with torch.inference_mode():
        answer["logits"][folder] = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits.tolist()
for folder in tokenizers:
    encoded = AutoTokenizer.from_pretrained(folder)(text)
    answer["ids"][folder], answer["fed"][folder] = encoded["input_ids"], sorted(encoded)
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def version_4(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with transformers 4; the test skips where none is named and none can be installed."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return folder
    folder = str(tmp_path_factory.mktemp("packages"))
    once = ["--quiet", "--no-deps", "--retries", "0", "--timeout", "5", "--target", folder]
    try:
        command = [sys.executable, "-m", "pip", "install", *once, *PACKAGES]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"transformers 4 cannot be installed here, and {FOLDER_VARIABLE} names no folder with it ({error})")
    return folder


@pytest.fixture(scope="module")
def scaled_run(tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model has another base of the rotary frequencies and scales them."""
    folder = tmp_path_factory.mktemp("scaled")
    model = {key: value for key, value in TINY_MODEL.items() if key != "max_sequence_length"}
    shape = {"max_position_embeddings": 64, "rope_theta": 5e5, "rope_scaling": LLAMA3, "num_key_value_heads": 2}
    (folder / "scaled.json").write_text(json.dumps(model | shape))
    flags = [str(folder / "scaled.json") if flag.endswith("tiny.json") else flag for flag in tiny_run]
    return train("sltrain", flags, folder / "run")


def tokenizers_of_other_models(folder: Path) -> list[str]:
    """Writes tokenizers of classes that begin texts with a token in one version, or have extra special tokens."""
    from transformers import LlamaTokenizer, T5Tokenizer

    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["\u2581", *"Foxjumpsvrdg312"]
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *byte_pieces, *letters, "Fo"])}
    write_tokenizer(LlamaTokenizer(vocab=vocabulary, merges=[("F", "o")]), folder / "llama")
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    write_tokenizer(T5Tokenizer(vocab=pieces + [(letter, -1.0) for letter in letters]), folder / "t5")
    return [str(folder / "llama"), str(folder / "t5")]


def read(arguments: list[Any], packages: str | None) -> dict[str, Any]:
    """What a process of its own reads; with `packages` it imports them first."""
    environment = os.environ | ({} if packages is None else {"PYTHONPATH": packages})
    command = [sys.executable, "-c", READ, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path("/"), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_version_4_computes_the_same_logits_and_ids(scaled_run: Path, version_4: str, tmp_path: Path) -> None:
    export(scaled_run, tmp_path / "dense")
    model, tokenizer, _ = load_model(scaled_run, torch.device("cpu"))
    ids = tokenizer.encode_batch([TEXT])[0]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits
    exported, checkpoint = str(tmp_path / "dense"), resolve(scaled_run)
    folders = [exported, str(checkpoint / "tokenizer"), str(scaled_run / "tokenizer"), *tokenizers_of_other_models(tmp_path)]
    arguments = [TEXT, ids, [exported], folders]
    now, then = read(arguments, None), read(arguments, version_4)
    assert then["version"].startswith("4.")
    assert then["ids"] == now["ids"]
    assert then["fed"] == now["fed"]
    torch.testing.assert_close(torch.tensor(then["logits"][exported]), logits, rtol=1e-5, atol=1e-5)


def assert_both_spellings(content: Mapping[str, Any], dtype: str) -> None:
    assert (content["rope_theta"], content["rope_parameters"]["rope_theta"]) == (5e5, 5e5)
    assert content["rope_scaling"] == LLAMA3
    assert content["rope_scaling"].items() <= content["rope_parameters"].items()
    assert content["torch_dtype"] == content["dtype"] == dtype


def test_exports_and_checkpoints_name_what_either_version_reads(scaled_run: Path, tmp_path: Path) -> None:
    export(scaled_run, tmp_path / "dense", dtype="bfloat16")
    export(scaled_run, tmp_path / "factored", keep_factors=True)
    checkpoint = resolve(scaled_run)
    for path, dtype in {
        tmp_path / "dense" / "config.json": "bfloat16",
        tmp_path / "factored" / "llama_config.json": "float32",
        checkpoint / "config.json": "float32",
    }.items():
        assert_both_spellings(json.loads(path.read_text()), dtype)
        cfg = load_model_config(path)
        assert (cfg.rope_theta, cfg.rope_scaling) == (5e5, LLAMA3)
    for folder in (tmp_path / "dense", tmp_path / "factored", checkpoint / "tokenizer", scaled_run / "tokenizer"):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not isinstance(settings.get("extra_special_tokens"), list)


def test_a_saved_tokenizer_keeps_its_fingerprint_and_its_extra_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    llama, t5 = tokenizers_of_other_models(tmp_path)
    settings = json.loads((Path(llama) / "tokenizer_config.json").read_text())
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (False, False)
    assert "<extra_id_0>" in json.loads((Path(t5) / "tokenizer_config.json").read_text())["additional_special_tokens"]
    first = load_tokenizer(t5)
    first.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == first.fingerprint
    assert "<extra_id_0>" in AutoTokenizer.from_pretrained(tmp_path / "again").all_special_tokens


def test_a_model_with_default_frequencies_has_no_scaling() -> None:
    content = both_spellings({"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    assert (content["rope_theta"], content["rope_scaling"]) == (1e4, None)
    assert both_spellings({"model_type": "bert", "dtype": "float32"})["torch_dtype"] == "float32"


@pytest.mark.parametrize("factor", [None, 3.0])
def test_longrope_needs_nothing_that_the_versions_derive_differently(tmp_path: Path, factor: float | None) -> None:
    """Version 4 takes the original length from outside the scaling, and derives attention's factor from it."""
    lists: dict[str, Any] = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    scaling = lists | {"rope_type": "longrope", "original_max_position_embeddings": 16} | ({"factor": factor} if factor else {})
    (tmp_path / "model.json").write_text(json.dumps(TINY_MODEL | {"rope_scaling": scaling}))
    content = both_spellings(hf_config(load_model_config(tmp_path / "model.json")).to_diff_dict())
    assert content["original_max_position_embeddings"] == 16
    # arXiv 2402.13753, as both versions have it; 64 positions.
    expected = math.sqrt(1 + math.log(factor or 64 / 16) / math.log(16))
    assert content["rope_scaling"]["attention_factor"] == content["rope_parameters"]["attention_factor"] == expected
    (tmp_path / "again.json").write_text(json.dumps(content))
    assert load_model_config(tmp_path / "again.json").rope_scaling == content["rope_scaling"]


def test_other_architectures_keep_their_old_names() -> None:
    """Those of fine-tuned models, from the configuration classes of transformers 4.57."""
    part = {"rope_theta": 2e4, "partial_rotary_factor": 0.5, "rope_type": "default"}
    neox = both_spellings({"model_type": "gpt_neox", "rope_parameters": part})
    assert (neox["rotary_emb_base"], neox["rotary_pct"], neox["partial_rotary_factor"]) == (2e4, 0.5, 0.5)
    kinds = {"full_attention": {"rope_theta": 1.6e5}, "sliding_attention": {"rope_theta": 1e4}}
    modernbert = both_spellings({"model_type": "modernbert", "rope_parameters": kinds})
    assert (modernbert["global_rope_theta"], modernbert["local_rope_theta"]) == (1.6e5, 1e4)
    assert "rope_scaling" not in modernbert
