"""Model files: published and hub files are accepted; invalid ones are refused with file, key, value and allowed values."""

import json
from pathlib import Path

import pytest

from peft_pretraining.config.model_config import ModelConfigError, load_model_config, rope_warnings

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
    "rope base beyond a float": ({"rope_theta": 10**400}, ["rope_theta", "above 0"]),
    "initial values too wide": ({"initializer_range": 2.0}, ["initializer_range", "2.0", "at most 1"]),
    "another family": ({"model_type": "mistral"}, ["model_type", "mistral", "llama", "exactly the layers"]),
    "window": ({"sliding_window": 4096}, ["sliding_window", "4096", "null", "take the key out"]),
    "window in use": ({"use_sliding_window": True}, ["use_sliding_window", "false"]),
    "windows by layer": ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "full_attention"]),
    "quantised": ({"quantization_config": {"bits": 4}}, ["quantization_config", "null", "take the key out"]),
    "interleaved rope": ({"rope_interleaved": True}, ["rope_interleaved", "true", "false"]),
    "partial rope": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "1"]),
    "no rope": ({"use_rope": False}, ["use_rope", "false", "unknown key"]),
    "norms of queries": ({"qk_norm": True}, ["qk_norm", "true", "unknown key"]),
    "misspelt optional key": ({"num_key_value_head": 2}, ["num_key_value_head", "num_key_value_heads?"]),
    "bad positions": ({"max_sequence_length": "1024"}, ["max_sequence_length", "1024", "whole number"]),
}


# One good scaling of each kind; heads of GOOD are 16 wide.
KINDS = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
REQUIRED = [(kind, key) for kind, values in KINDS.items() for key in values if key != "original_max_position_embeddings"]


def with_scaling(folder: Path, scaling: object, **changes: object) -> Path:
    return write(folder, {"rope_scaling": scaling, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_every_kind_of_scaling_is_accepted_and_transformers_can_use_it(tmp_path: Path, kind: str, spelling: str) -> None:
    cfg = load_model_config(with_scaling(tmp_path, {spelling: kind, **KINDS[kind]}))
    assert cfg.rope_scaling == {"rope_type": kind, **KINDS[kind]}
    for line in rope_warnings(cfg):
        assert "Please set the `factor` field" in line  # the advice for longrope without a factor


def test_the_kinds_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # "proportional" is for models whose layers differ.
    assert {*KINDS} == ROPE_INIT_FUNCTIONS.keys() - {"proportional"}


@pytest.mark.parametrize(("kind", "key"), REQUIRED)
def test_a_scaling_without_a_required_key_is_refused(tmp_path: Path, kind: str, key: str) -> None:
    scaling = {"rope_type": kind, **{name: value for name, value in KINDS[kind].items() if name != key}}
    with pytest.raises(ModelConfigError, match=rf"rope_scaling\.{key}: missing; rope_type {kind} needs"):
        load_model_config(with_scaling(tmp_path, scaling))


@pytest.mark.parametrize("bad", ["2", None, True, 0, -1.0, float("nan"), float("inf"), [1.0], {}], ids=str)
@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, values in KINDS.items() for key in values])
def test_a_value_of_the_wrong_type_or_range_is_refused(tmp_path: Path, kind: str, key: str, bad: object) -> None:
    with pytest.raises(ModelConfigError, match=rf"rope_scaling\.{key} = .*; allowed: "):
        load_model_config(with_scaling(tmp_path, {"rope_type": kind, **KINDS[kind], key: bad}))


BAD_SCALINGS = {
    "no kind": ({"factor": 2.0}, ["rope_type: missing", "linear"]),
    "no kind but null": ({"rope_type": None, "factor": 2.0}, ["rope_type = null", "linear"]),
    "two kinds": ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, ["yarn", "contradicts", "linear"]),
    "old name of longrope": ({"type": "su", **KINDS["longrope"]}, ["su", "longrope"]),
    "default with a factor": ({"rope_type": "default", "factor": 2.0}, ["factor", "2.0", "leave it out"]),
    "mistyped key": ({"rope_type": "linear", "factr": 2.0}, ["factr", "did you mean factor?", "factor: missing"]),
    "mistyped optional key": ({"rope_type": "yarn", "beta_fst": 1, **KINDS["yarn"]}, ["beta_fst", "did you mean beta_fast?"]),
    "key of another kind": ({"rope_type": "linear", "mscale": 1.0, "factor": 2.0}, ["mscale", "leave it out"]),
    "equal frequencies": ({"rope_type": "llama3", **KINDS["llama3"], "high_freq_factor": 1.0}, ["high_freq_factor", "above"]),
    "crossed betas": ({"rope_type": "yarn", **KINDS["yarn"], "beta_slow": 64}, ["beta_fast = 32", "beta_slow = 64"]),
    "short list": ({"rope_type": "longrope", **KINDS["longrope"], "short_factor": [1.0] * 4}, ["short_factor", "8 numbers"]),
    "string in a list": ({"rope_type": "longrope", **KINDS["longrope"], "long_factor": [1.0] * 7 + ["2"]}, ["long_factor", "8"]),
    "number for a flag": ({"rope_type": "yarn", **KINDS["yarn"], "truncate": 1}, ["truncate = 1", "true or false"]),
    "part of a head": ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
    "one for each layer": ({"full_attention": {"rope_type": "default"}}, ["rope_type: missing"]),
    "a list": ([], ["allowed: null or an object"]),
}


@pytest.mark.parametrize("case", BAD_SCALINGS)
def test_a_wrong_scaling_is_refused_by_key_and_value(tmp_path: Path, case: str) -> None:
    scaling, words = BAD_SCALINGS[case]
    with pytest.raises(ModelConfigError) as raised:
        load_model_config(with_scaling(tmp_path, scaling))
    for word in ["rope_scaling", *words]:
        assert word in str(raised.value)


def test_two_spellings_must_agree(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    both = {"rope_scaling": linear, "rope_parameters": {**linear, "rope_theta": 2e4}, "rope_theta": 2e4}
    assert load_model_config(write(tmp_path, both)).rope_scaling == linear
    with pytest.raises(ModelConfigError, match="rope_scaling contradicts rope_parameters"):
        load_model_config(write(tmp_path, both | {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}))
    outside = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16}
    assert load_model_config(write(tmp_path, outside)).rope_scaling == {
        **outside["rope_scaling"],  # type: ignore[dict-item]
        "original_max_position_embeddings": 16,
    }
    with pytest.raises(ModelConfigError, match="contradicts original_max_position_embeddings = 16"):
        load_model_config(write(tmp_path, outside | {"rope_scaling": {"rope_type": "yarn", **KINDS["yarn"]}}))


def test_what_only_transformers_can_tell_is_told_too(tmp_path: Path) -> None:
    """Values that are right one by one: a division by zero inside, and a length that its validation warns of."""
    zero = {"rope_type": "longrope", **KINDS["longrope"], "original_max_position_embeddings": 1}
    with pytest.raises(ModelConfigError, match=r"transformers cannot use rope_scaling = .*ZeroDivisionError"):
        rope_warnings(load_model_config(with_scaling(tmp_path, zero)))
    long = {"rope_type": "llama3", **KINDS["llama3"], "original_max_position_embeddings": 4096}
    (line,) = rope_warnings(load_model_config(with_scaling(tmp_path, long)))
    assert "original_max_position_embeddings field must be less than max_position_embeddings" in line
    assert rope_warnings(load_model_config(write(tmp_path, {}))) == []


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_value_is_refused_with_the_allowed_ones(tmp_path: Path, case: str) -> None:
    changes, words = BAD[case]
    path = write(tmp_path, changes)
    with pytest.raises(ModelConfigError) as raised:
        load_model_config(path)
    for word in [str(path), *words]:
        assert word in str(raised.value), (word, str(raised.value))


# Keys of files on the hub (SmolLM, models saved by unsloth, by transformers 4.20 in full, Qwen without its window).
HARMLESS = {
    "is_llama_config": True,
    "rope_interleaved": False,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "_attn_implementation_autoset": True,
    "unsloth_version": "2024.9",
    "auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"},
    "id2label": {"0": "LABEL_0"},
    "return_dict": True,
    "temperature": 1.0,
    "torchscript": False,
    "qk_norm": False,
    "logits_soft_cap": None,
    "pruned_heads": {},
    "embd_pdrop": 0.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 21,
    "layer_types": ["full_attention", "full_attention"],
    "attention_bias": None,
    "quantization_config": None,
}


def test_harmless_keys_of_the_hub_are_passed_over_with_a_notice(tmp_path: Path) -> None:
    notices: list[str] = []
    cfg = load_model_config(write(tmp_path, HARMLESS), notices)
    plain = load_model_config(write(tmp_path, {}))
    assert cfg == plain
    checked = {"rope_interleaved", "use_sliding_window", "sliding_window", "layer_types", "attention_bias", "quantization_config"}
    assert len(notices) == 1
    for key in HARMLESS.keys() - checked:
        assert f"{key} = " in notices[0]
    nothing: list[str] = []
    load_model_config(write(tmp_path, {"torch_dtype": "bfloat16", "transformers_version": "4.40.0"}), nothing)
    assert nothing == []


def test_architectures_count_where_no_model_type_is_given(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"architectures = .*Qwen2ForCausalLM.*LlamaForCausalLM"):
        load_model_config(write(tmp_path, {"architectures": ["Qwen2ForCausalLM"]}, drop=("model_type",)))
    for value in (True, 3, [1]):
        with pytest.raises(ModelConfigError, match=r"architectures = .*; allowed: a list of names"):
            load_model_config(write(tmp_path, {"architectures": value}, drop=("model_type",)))
    assert load_model_config(write(tmp_path, {}, drop=("model_type",))).hidden_size == 64


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
    path.write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(ModelConfigError, match="is not UTF-8 text"):
        load_model_config(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_another_encoding_is_named_as_such(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(GOOD), encoding=encoding)
    with pytest.raises(ModelConfigError, match=r"model\.json: is UTF-(16|32) text, not UTF-8; convert it"):
        load_model_config(path)


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 657\n")
    with pytest.raises(ModelConfigError, match=r"model\.json: is a git-lfs pointer, not the file of 657 bytes .*git lfs pull"):
        load_model_config(path)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert load_model_config(path) == load_model_config(write(tmp_path, {}))


def test_the_error_for_a_missing_file_names_those_in_its_folder(tmp_path: Path) -> None:
    write(tmp_path, {})
    with pytest.raises(ModelConfigError, match=r"llama_61m\.json: no such file.*model\.json"):
        load_model_config(tmp_path / "llama_61m.json")
    with pytest.raises(ModelConfigError, match="folder"):
        load_model_config(tmp_path)


def test_dry_run_and_estimate_refuse_before_any_work_and_pass_notices_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchrun_main
    from peft_pretraining.__main__ import main

    length = ["--max_length", "64", "--batch_size", "2", "--num_training_steps", "5", "--device", "cpu"]
    length += ["--dataset", "demo", "--warmup_steps", "1"]

    def answers(path: Path) -> list[tuple[int, str]]:
        flags = ["--model_config", str(path), "--peft_model", "full", *length]
        found = []
        for run in (lambda: torchrun_main.main([*flags, "--dry_run"]), lambda: main(["estimate", *flags])):
            code = run()
            written = capsys.readouterr()
            found.append((code, written.out + written.err))
        return found

    zero = {"rope_type": "longrope", **KINDS["longrope"], "original_max_position_embeddings": 1}
    for scaling, words in (({"rope_type": "linear", "factr": 2.0}, "did you mean factor?"), (zero, "ZeroDivisionError")):
        for code, text in answers(with_scaling(tmp_path, scaling)):
            assert (code, text.count("error:")) == (2, 1)
            assert words in text
    for code, text in answers(write(tmp_path, {"is_llama_config": True})):
        assert code == 0
        assert text.count("notice: ") == 1
        assert "is_llama_config = true" in text
