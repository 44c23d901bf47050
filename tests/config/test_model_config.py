"""Model files: published and hub files are accepted; invalid ones are refused with file, key, value and allowed values."""

import json
from pathlib import Path

import pytest

from peft_pretraining.config.model_config import ModelConfigError, load_model_config

ROOT = Path(__file__).resolve().parents[2]
# Hidden size, MLP size, layers and heads of the published files.
SHAPES = {
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 6, 8),
    "40m": (416, 1024, 8, 8),
    "60m": (512, 1376, 8, 8),
    "71m": (512, 1368, 12, 8),
    "100m": (640, 1708, 12, 10),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 24, 16),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
GOOD = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "initializer_range": 0.02,
    "max_sequence_length": 128,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "vocab_size": 320,
}


def write(folder: Path, changes: dict[str, object], drop: tuple[str, ...] = ()) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps({k: v for k, v in (GOOD | changes).items() if k not in drop}))
    return path


@pytest.mark.parametrize("size", SHAPES)
def test_published_files_have_the_published_shapes(size: str) -> None:
    cfg = load_model_config(ROOT / "configs" / f"llama_{size}.json")
    shape = (cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers, cfg.num_attention_heads)
    assert shape == SHAPES[size]
    assert cfg.vocab_size == (32100 if size == "100m" else 32000)
    assert (cfg.hidden_act, cfg.rms_norm_eps, cfg.initializer_range) == ("silu", 1e-6, 0.02)
    assert not any([cfg.tie_word_embeddings, cfg.attention_bias, cfg.mlp_bias])
    assert cfg.name == f"llama_{size}"


def test_every_file_in_configs_loads() -> None:
    names = {p.stem for p in (ROOT / "configs").glob("*.json")}
    assert names >= {f"llama_{size}" for size in SHAPES} | {"llama_demo"}
    for name in names:
        load_model_config(ROOT / "configs" / f"{name}.json")


def test_published_keys_that_transformers_misreads_are_understood(tmp_path: Path) -> None:
    """max_sequence_length is the number of positions, and pad_token_id -1 means no token."""
    cfg = load_model_config(write(tmp_path, {}))
    assert cfg.max_position_embeddings == 128
    assert cfg.pad_token_id is None
    assert (cfg.bos_token_id, cfg.eos_token_id) == (0, 1)
    assert cfg.num_key_value_heads == 4
    both = load_model_config(write(tmp_path, {"max_position_embeddings": 64}))
    assert both.max_position_embeddings == 64


def test_hub_files_are_accepted(tmp_path: Path) -> None:
    """The keys of Llama 3's config.json, and those that transformers 5 writes."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    hub = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": [2, 3],
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "mlp_bias": False,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rope_scaling": {"rope_type": "llama3", **scaling},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
    }
    cfg = load_model_config(write(tmp_path, hub, drop=("max_sequence_length",)))
    assert (cfg.rope_theta, cfg.num_key_value_heads, cfg.tie_word_embeddings) == (500000.0, 2, True)
    assert (cfg.eos_token_id, cfg.max_position_embeddings) == (2, 1024)
    assert cfg.rope_scaling == {"rope_type": "llama3", **scaling}
    five = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "dtype": "float32", "head_dim": None}
    cfg = load_model_config(write(tmp_path, five))
    assert (cfg.rope_theta, cfg.rope_scaling) == (10000.0, None)


def test_a_config_that_transformers_saved_is_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from peft_pretraining.model.llama import hf_config

    first = load_model_config(write(tmp_path, {"num_key_value_heads": 2, "rope_theta": 5e5}))
    hf_config(first).save_pretrained(tmp_path / "saved")
    again = load_model_config(tmp_path / "saved" / "config.json")
    for key in ("vocab_size", "hidden_size", "num_key_value_heads", "rope_theta", "pad_token_id", "eos_token_id"):
        assert getattr(again, key) == getattr(first, key)
    LlamaConfig().save_pretrained(tmp_path / "default")
    assert load_model_config(tmp_path / "default" / "config.json").hidden_size == 4096


# change -> words that the message must contain besides the file's name
BAD = {
    "misspelt key": ({"hiden_size": 64}, ["hiden_size", "hidden_size", "64"]),
    "key of another architecture": ({"num_experts": 8}, ["num_experts", "8", "vocab_size"]),
    "heads do not divide": ({"num_attention_heads": 5}, ["hidden_size = 64", "num_attention_heads = 5", "multiple"]),
    "odd head width": ({"hidden_size": 60, "num_attention_heads": 4}, ["15", "even"]),
    "kv heads do not divide": ({"num_key_value_heads": 3}, ["num_key_value_heads = 3", "4"]),
    "head_dim does not fit": ({"head_dim": 32}, ["head_dim = 32", "64/4"]),
    "string for a number": ({"hidden_size": "64"}, ["hidden_size", '"64"', "whole number"]),
    "float for a whole number": ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5", "whole number"]),
    "true for a number": ({"num_hidden_layers": True}, ["num_hidden_layers", "true", "whole number"]),
    "null for a number": ({"intermediate_size": None}, ["intermediate_size", "null", "whole number"]),
    "negative": ({"hidden_size": -64}, ["hidden_size", "-64", "above 0"]),
    "zero": ({"num_hidden_layers": 0}, ["num_hidden_layers", "0", "above 0"]),
    "not finite": ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "NaN", "above 0"]),
    "number for a flag": ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "1", "true or false"]),
    "unknown activation": ({"hidden_act": "swiglu"}, ["hidden_act", "swiglu", "silu"]),
    "list for an activation": ({"hidden_act": ["silu"]}, ["hidden_act", "silu"]),
    "wrong model_type": ({"model_type": "gpt2"}, ["model_type", "gpt2", "llama"]),
    "eos beyond the vocabulary": ({"eos_token_id": 320}, ["eos_token_id = 320", "vocab_size = 320"]),
    "pad below -1": ({"pad_token_id": -2}, ["pad_token_id", "-2", "-1 or null"]),
    "dropout": ({"attention_dropout": 0.1}, ["attention_dropout", "0.1"]),
    "tensor-parallel pretraining": ({"pretraining_tp": 2}, ["pretraining_tp", "2", "1"]),
    "unknown rope": ({"rope_scaling": {"rope_type": "cubic"}}, ["rope_scaling", "cubic", "linear"]),
    "rope not an object": ({"rope_parameters": "default"}, ["rope_parameters", "default", "object"]),
    "two rope bases": ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, ["rope_theta", "500000", "10000"]),
    "bad rope base": ({"rope_theta": "1e4"}, ["rope_theta", "1e4", "above 0"]),
    "bad positions": ({"max_sequence_length": "1024"}, ["max_sequence_length", "1024", "whole number"]),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_value_is_refused_with_the_allowed_ones(tmp_path: Path, case: str) -> None:
    changes, words = BAD[case]
    path = write(tmp_path, changes)
    with pytest.raises(ModelConfigError) as raised:
        load_model_config(path)
    for word in [str(path), *words]:
        assert word in str(raised.value), (word, str(raised.value))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ModelConfigError, match=f"{key}: missing"):
        load_model_config(write(tmp_path, {}, drop=(key,)))


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, {"hidden_size": "64", "num_hidden_layers": -1, "layers": 3, "model_type": "opt"})
    with pytest.raises(ModelConfigError) as raised:
        load_model_config(path)
    assert "4 problem(s)" in str(raised.value)
    assert isinstance(raised.value, ValueError)


def test_a_file_that_is_not_a_json_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    for text, words in {
        '{"hidden_size": 64,}': ["not JSON", "line 1"],
        "[1, 2]": ["one JSON object"],
        "": ["not JSON"],
        '{"vocab_size": 320, "vocab_size": 640}': ["vocab_size", "more than once"],
    }.items():
        path.write_text(text)
        with pytest.raises(ModelConfigError) as raised:
            load_model_config(path)
        assert all(word in str(raised.value) for word in [str(path), *words])
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ModelConfigError, match="UTF-8"):
        load_model_config(path)


def test_the_error_for_a_missing_file_names_those_in_its_folder(tmp_path: Path) -> None:
    write(tmp_path, {})
    with pytest.raises(ModelConfigError, match=r"llama_61m\.json: no such file.*model\.json"):
        load_model_config(tmp_path / "llama_61m.json")
    with pytest.raises(ModelConfigError, match="folder"):
        load_model_config(tmp_path)
