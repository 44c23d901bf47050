"""Reads a LLaMA model's JSON file into a validated, frozen `ModelConfig`. Imports neither torch nor transformers.

Accepts the published files (`max_sequence_length`, `pad_token_id: -1`) and those of the hub (`max_position_embeddings`,
`rope_parameters`, ...). One error lists all entries that would be ignored, misread or fail inside a library.
"""

import difflib
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.config.files import decoded

HIDDEN_ACTS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "swish")
# Defaults of transformers' LlamaConfig for absent keys, except where the published files differ.
DEFAULT_MAX_POSITIONS = 2048
DEFAULT_ROPE_THETA = 10000.0


class ModelConfigError(ValueError):
    """Raised for a model file that cannot be used; the message lists each problem with file, key, value and allowed values."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a LLaMA. A token id is None if the model has no such token (-1 or null in the file)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_act: str
    rms_norm_eps: float
    initializer_range: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    attention_bias: bool
    mlp_bias: bool
    name: str
    path: str
    rope_scaling: Mapping[str, Any] | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


def load_model_config(path: str | Path, notices: list[str] | None = None) -> ModelConfig:
    """Reads and checks a model's JSON file.

    Keys: those of the published files and of the hub's LLaMA `config.json`. If `max_position_embeddings` is absent,
    `max_sequence_length` replaces it. From a list of end-of-sequence ids the first is used.

    Args:
        notices: a list to which a line is added about keys that are passed over.

    Raises:
        ModelConfigError: with all problems: file missing or not JSON, unknown or repeated keys (the nearest known one
            is suggested), wrong types, values out of range, sizes that do not divide, settings without effect here.
    """
    path = Path(path)
    raw = _read(path)
    problems: list[str] = []
    passed_over = [key for key in sorted(set(raw) - KNOWN_KEYS) if _is_harmless(key, raw[key])]
    for key in sorted(set(raw) - KNOWN_KEYS - set(passed_over)):
        near = difflib.get_close_matches(key, sorted(KNOWN_KEYS), n=1, cutoff=0.6)
        problems.append(
            f"{key}: unknown key (value {_show(raw[key])}); "
            + (f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(KNOWN_KEYS))}")
        )
    values = _values(raw, problems)
    rope_theta, rope_scaling = _rope(raw, values, problems)
    _check_relations(raw, values, problems)
    if problems:
        lines = "".join(f"\n  {p}" for p in problems)
        raise ModelConfigError(f"model config {path}: {len(problems)} problem(s){lines}")
    if notices is not None and passed_over:
        listed = ", ".join(f"{key} = {_show(raw[key])}" for key in passed_over)
        notices.append(f"model config {path}: passed over, because the model does not depend on it: {listed}")
    return ModelConfig(**values, rope_theta=rope_theta, rope_scaling=rope_scaling, name=path.stem, path=str(path))


def _read(path: Path) -> dict[str, Any]:
    """Reads the JSON object in `path`. Raises ModelConfigError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        available = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = f"; that folder has {', '.join(available)}" if available else ""
        raise ModelConfigError(f"model config {path}: no such file{hint}") from None
    except IsADirectoryError:
        raise ModelConfigError(f"model config {path}: is a folder; name the JSON file") from None
    except OSError as error:
        raise ModelConfigError(f"model config {path}: cannot be read ({error})") from None
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        repeated.extend(k for k in dict.fromkeys(keys) if keys.count(k) > 1)
        return dict(pairs)

    try:
        raw = json.loads(decoded(data), object_pairs_hook=collect)
    except json.JSONDecodeError as error:
        raise ModelConfigError(
            f"model config {path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"model config {path}: {error}") from None
    if not isinstance(raw, dict):
        raise ModelConfigError(f"model config {path}: must hold one JSON object {{...}}, found {_show(raw)}")
    if repeated:
        raise ModelConfigError(f"model config {path}: key(s) given more than once: {', '.join(repeated)}")
    return raw


def _show(value: Any) -> str:
    """Returns a value as JSON, shortened for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Checkers, one for each kind of value. They return None for a valid value, otherwise a description of valid ones.


def _positive_int(value: Any) -> str | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return None if ok else "a whole number above 0"


def _positive_number(value: Any) -> str | None:
    return None if _is_number(value) and value > 0 else "a number above 0"


def _is_number(value: Any) -> bool:
    """Whether the value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _share(value: Any) -> str | None:
    return None if _is_number(value) and 0 < value <= 1 else "a number above 0 and at most 1"


def _at_least_one(value: Any) -> str | None:
    return None if _is_number(value) and value >= 1 else "a number of at least 1"


def _number_or_null(value: Any) -> str | None:
    return None if value is None or (_is_number(value) and value >= 0) else "a number of at least 0, or null"


def _positive_or_null(value: Any) -> str | None:
    return None if value is None or _positive_number(value) is None else "a number above 0, or null"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _token_id(value: Any) -> str | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= -1):
        return None
    return "an id of 0 or more, or -1 or null for none"


def _token_id_or_list(value: Any) -> str | None:
    if isinstance(value, list) and value and all(_token_id(v) is None and v is not None and v >= 0 for v in value):
        return None
    return _token_id(value)


def _activation(value: Any) -> str | None:
    return None if value in HIDDEN_ACTS else f"one of {', '.join(HIDDEN_ACTS)}"


def _full_attention(value: Any) -> str | None:
    ok = value is None or (isinstance(value, list) and all(kind == "full_attention" for kind in value))
    return None if ok else 'null or a list of "full_attention"'


def _names(value: Any) -> str | None:
    if value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return None
    return "a list of names, or leave it out"


def _anything(_: Any) -> str | None:
    return None


def _only(*allowed: Any) -> Callable[[Any], str | None]:
    """Returns a checker that accepts only the given values, the ones this program implements."""

    def check(value: Any) -> str | None:
        ok = any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)
        return None if ok else " or ".join(_show(a) for a in allowed)

    return check


# key -> (checker, default); a key without a default must be in the file.
_REQUIRED = object()
_MODEL_KEYS: dict[str, tuple[Callable[[Any], str | None], Any]] = {
    "vocab_size": (_positive_int, _REQUIRED),
    "hidden_size": (_positive_int, _REQUIRED),
    "intermediate_size": (_positive_int, _REQUIRED),
    "num_hidden_layers": (_positive_int, _REQUIRED),
    "num_attention_heads": (_positive_int, _REQUIRED),
    "num_key_value_heads": (_positive_int, None),  # absent: as many as attention heads
    "hidden_act": (_activation, "silu"),
    "rms_norm_eps": (_positive_number, 1e-6),
    "initializer_range": (_share, 0.02),  # what transformers allows
    "tie_word_embeddings": (_flag, False),
    "max_position_embeddings": (_positive_int, None),  # absent: max_sequence_length
    "bos_token_id": (_token_id, None),
    "eos_token_id": (_token_id_or_list, None),
    "pad_token_id": (_token_id, None),
    "attention_bias": (_flag, False),
    "mlp_bias": (_flag, False),
}
# Keys that are checked but have no field of their own.
_OTHER_KEYS: dict[str, Callable[[Any], str | None]] = {
    "model_type": _only("llama"),
    "max_sequence_length": _positive_int,
    "original_max_position_embeddings": _positive_int,  # of rope_scaling, where transformers 4 has it for longrope
    "head_dim": _positive_int,
    "attention_dropout": _only(0),
    "hidden_dropout": _only(0),
    "pretraining_tp": _only(1),
    "sliding_window": _only(None),
    "use_sliding_window": _only(False),
    "layer_types": _full_attention,
    "quantization_config": _only(None),
    "rope_interleaved": _only(False),
    "partial_rotary_factor": _only(1),
    "is_encoder_decoder": _only(False),
    "add_cross_attention": _only(False),
    "rope_theta": _positive_number,
    "rope_scaling": _anything,  # checked in _rope
    "rope_parameters": _anything,  # checked in _rope
    # Carried by published and hub files; they say nothing about the shape of the model.
    "architectures": _names,  # without model_type also checked in _check_relations
    "use_cache": _anything,
    "torch_dtype": _anything,
    "dtype": _anything,
    "transformers_version": _anything,
    "_name_or_path": _anything,
}
# What else a refusal of these says: why, or what to do.
_WAYS_OUT = {
    "model_type": '; a model of another name with exactly the layers of a LLaMA can be given "llama"',
    "pretraining_tp": "; the same model without slices has 1",
    "sliding_window": "; attention here has no window: take the key out to train without one",
    "quantization_config": "; weights are trained unquantised: take the key out",
    "attention_dropout": "; pretraining here has no dropout",
    "partial_rotary_factor": "; the whole head is rotated",
    "rope_interleaved": "; the halves of a head are rotated, not neighbours",
}
# null in these means the same as absent.
_NULLABLE = {
    *("num_key_value_heads", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling", "rope_parameters"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "attention_dropout", "pretraining_tp", "partial_rotary_factor"),
    *("original_max_position_embeddings", "rope_interleaved", "use_sliding_window"),
}
KNOWN_KEYS = frozenset(_MODEL_KEYS) | frozenset(_OTHER_KEYS)
# Other keys of the hub's files. They are about generation, classification, tokenizers or the program that wrote the file.
_HARMLESS_NAMES = """
    // attn_implementation auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward classifier_dropout comment
    decoder_start_token_id description diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
    is_decoder is_llama_config label2id length_penalty license max_length max_window_layers min_length model_max_length
    model_name no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores prefix problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k
    top_p torchscript typical_p use_bfloat16 use_flash_attention use_flash_attention_2 use_return_dict
"""
_HARMLESS_KEYS = frozenset(_HARMLESS_NAMES.split())
_HARMLESS_PREFIXES = ("_", "tokenizer_", "transformers.", "unsloth_")
# Parts of a LLaMA that a file of another architecture may switch off.
_PARTS = re.compile(r"rope$|rotary|rms_?norm|pre_?norm|glu|gated|causal|scale_attn")


def _is_harmless(key: str, value: Any) -> bool:
    """Whether a LLaMA does not depend on an unknown key: a known harmless one, a part that is off, or no dropout."""
    if key in _HARMLESS_KEYS or key.startswith(_HARMLESS_PREFIXES) or value is None or value in ("", [], {}):
        return True
    no_dropout = _is_number(value) and value == 0 and re.search("dropout|pdrop", key) is not None
    return no_dropout or (value is False and not _PARTS.search(key))


def _values(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns the fields of ModelConfig that correspond to one key each, without invalid ones; appends to `problems`."""
    values: dict[str, Any] = {}
    for key, (check, default) in _MODEL_KEYS.items():
        if key not in raw and default is _REQUIRED:
            problems.append(f"{key}: missing; allowed: {check(None)}")
        elif key not in raw or (raw[key] is None and key in _NULLABLE):
            values[key] = default
        elif (allowed := check(raw[key])) is not None:
            problems.append(f"{key} = {_show(raw[key])}; allowed: {allowed}")
        else:
            values[key] = raw[key]
    for key, check in _OTHER_KEYS.items():
        if key == "sliding_window" and raw.get("use_sliding_window") is False:
            continue
        if key in raw and not (raw[key] is None and key in _NULLABLE) and (allowed := check(raw[key])) is not None:
            problems.append(f"{key} = {_show(raw[key])}; allowed: {allowed}{_WAYS_OUT.get(key, '')}")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(key)
        value = value[0] if isinstance(value, list) else value
        values[key] = None if value == -1 else value
    if values.get("num_key_value_heads", 0) is None and "num_attention_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values.get("max_position_embeddings", 0) is None:
        values["max_position_embeddings"] = raw.get("max_sequence_length", DEFAULT_MAX_POSITIONS)
    for key in ("rms_norm_eps", "initializer_range"):
        if key in values:
            values[key] = float(values[key])
    return values


# Keys that each kind of rotary embedding needs, and those it may have; transformers ignores others or fails on them.
_LENGTH = "original_max_position_embeddings"
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), (_LENGTH,)),
    "yarn": (("factor",), (_LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor"), (_LENGTH, "factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_LENGTH,)),
}
ROPE_TYPES = tuple(_ROPE_KEYS)
_ROPE_VALUES: dict[str, Callable[[Any], str | None]] = {
    "factor": _at_least_one,
    _LENGTH: _positive_int,
    "low_freq_factor": _positive_number,
    "high_freq_factor": _positive_number,
    "attention_factor": _positive_or_null,
    "beta_fast": _positive_or_null,
    "beta_slow": _positive_or_null,
    "mscale": _number_or_null,
    "mscale_all_dim": _number_or_null,
    "truncate": _flag,
    "rope_theta": _positive_number,
    "partial_rotary_factor": _only(1),
    "finetuned": _anything,  # files of the YaRN models; without effect
}


def _rope(raw: Mapping[str, Any], values: Mapping[str, Any], problems: list[str]) -> tuple[float, Mapping[str, Any] | None]:
    """Returns the base of the rotary frequencies, and their scaling parameters or None; appends to `problems`.

    Reads rope_theta and rope_scaling (transformers 4) or rope_parameters (transformers 5).
    """
    theta = raw.get("rope_theta", DEFAULT_ROPE_THETA)
    scalings: dict[str, Mapping[str, Any] | None] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            problems.append(f"{key} = {_show(value)}; allowed: null or an object with rope_type")
            continue
        kind = _rope_kind(key, value, problems)
        if kind is None:
            continue
        new = [f"{key}.{problem}" for problem in _rope_problems(kind, value, values)]
        problems += new
        inner_theta = value.get("rope_theta", theta)
        if not new and "rope_theta" in raw and inner_theta != raw["rope_theta"]:
            problems.append(f"{key}.rope_theta = {_show(inner_theta)} contradicts rope_theta = {_show(raw['rope_theta'])}")
        theta = inner_theta
        kept = {k: v for k, v in value.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
        scalings[key] = None if kind == "default" else _with_length(kept | {"rope_type": kind}, key, raw, problems)
    if len(scalings) == 2 and scalings["rope_scaling"] != scalings["rope_parameters"]:
        problems.append("rope_scaling contradicts rope_parameters; keep one of the two")
    scaling = next((scaling for scaling in scalings.values() if scaling is not None), None)
    return (float(theta) if _positive_number(theta) is None else DEFAULT_ROPE_THETA), scaling


def _rope_kind(key: str, value: Mapping[str, Any], problems: list[str]) -> str | None:
    """The kind of rotary embedding that an object names; None with a problem appended."""
    named = {name: value[name] for name in ("rope_type", "type") if name in value}
    kinds = list(named.values())
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        problems.append(f"{key}.rope_type = {_show(kinds[0])} contradicts {key}.type = {_show(kinds[1])}; keep one of the two")
        return None
    if not named and value.keys() - {"rope_theta", "partial_rotary_factor"}:
        problems.append(f"{key}.rope_type: missing (value {_show(value)}); allowed: one of {', '.join(ROPE_TYPES)}")
        return None
    kind = kinds[0] if kinds else "default"
    if kind not in ROPE_TYPES:
        hint = " (su is called longrope today)" if kind == "su" else ""
        problems.append(f"{key}.{next(iter(named))} = {_show(kind)}; allowed: one of {', '.join(ROPE_TYPES)}{hint}")
        return None
    return str(kind)


def _rope_problems(kind: str, value: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Problems of the other keys of one kind of rotary embedding; each begins with the key."""
    required, optional = _ROPE_KEYS[kind]
    known = {*required, *optional, "rope_theta", "partial_rotary_factor", "finetuned"}
    problems = []
    for key in sorted(value.keys() - known - {"rope_type", "type"}):
        near = difflib.get_close_matches(key, sorted({*required, *optional}), n=1, cutoff=0.6)
        takes = f"rope_type {kind} takes {', '.join((*required, *optional)) or 'none besides rope_theta'}; leave it out"
        problems.append(f"{key}: unknown key (value {_show(value[key])}); " + (f"did you mean {near[0]}?" if near else takes))
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    pairs = hidden // heads // 2 if hidden and heads else None
    checks = _ROPE_VALUES | {key: _factors(pairs) for key in ("short_factor", "long_factor")}
    if kind == "longrope":
        checks["factor"] = lambda factor: None if factor is None else _at_least_one(factor)
    problems += [f"{key}: missing; rope_type {kind} needs {checks[key](None)}" for key in required if key not in value]
    for key in sorted(known & value.keys()):
        if (allowed := checks[key](value[key])) is not None:
            problems.append(f"{key} = {_show(value[key])}; allowed: {allowed}")
    return problems or [*_rope_order_problems(kind, value, pairs)]


def _rope_order_problems(kind: str, value: Mapping[str, Any], pairs: int | None) -> Iterator[str]:
    """Problems of values that are valid singly but not together."""
    if kind == "llama3" and value["high_freq_factor"] <= value["low_freq_factor"]:
        low = f"low_freq_factor = {_show(value['low_freq_factor'])}"
        yield f"high_freq_factor = {_show(value['high_freq_factor'])}; allowed: a number above {low}"
    fast, slow = value.get("beta_fast") or 32, value.get("beta_slow") or 1
    if kind == "yarn" and fast < slow:
        yield f"beta_fast = {_show(fast)}; allowed: at least beta_slow = {_show(slow)} (without them 32 and 1)"
    if kind == "dynamic" and pairs == 1:
        yield "rope_type = dynamic; allowed: with attention heads wider than 2 (hidden_size / num_attention_heads)"


def _factors(count: int | None) -> Callable[[Any], str | None]:
    """A checker for a list of `count` numbers above 0, of any count if that is None."""

    def check(value: Any) -> str | None:
        ok = isinstance(value, list) and all(_positive_number(factor) is None for factor in value)
        half = "" if count is None else f"{count} "
        return None if ok and count in (None, len(value)) else f"a list of {half}numbers above 0 (half the width of a head)"

    return check


def _with_length(scaling: dict[str, Any], key: str, raw: Mapping[str, Any], problems: list[str]) -> Mapping[str, Any]:
    """The scaling with the length that the file has outside it, which transformers prefers."""
    outside = raw.get(_LENGTH)
    if outside is None or _LENGTH not in _ROPE_KEYS[scaling["rope_type"]][1]:
        return scaling
    if scaling.get(_LENGTH, outside) != outside:
        problems.append(
            f"{key}.{_LENGTH} = {_show(scaling[_LENGTH])} contradicts {_LENGTH} = {_show(outside)}; keep one of the two"
        )
    return scaling | {_LENGTH: outside}


def rope_warnings(cfg: ModelConfig) -> list[str]:
    """Returns the warnings of transformers' own validation of a scaled rotary embedding; imports transformers.

    Raises:
        ModelConfigError: transformers refuses the values, or they give frequencies that are not positive numbers.
    """
    if cfg.rope_scaling is None:
        return []
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    lines: list[str] = []
    logger, listener = logging.getLogger("transformers.modeling_rope_utils"), logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(listener)
    propagate, level = logger.propagate, logger.level
    logger.propagate = False
    # The library's verbosity may be lower.
    logger.setLevel(logging.WARNING)
    try:
        config = LlamaConfig(
            hidden_size=cfg.hidden_size,
            num_attention_heads=cfg.num_attention_heads,
            max_position_embeddings=cfg.max_position_embeddings,
            rope_parameters={**cfg.rope_scaling, "rope_theta": cfg.rope_theta},
        )
        init = ROPE_INIT_FUNCTIONS[cfg.rope_scaling["rope_type"]]
        for length in (None, cfg.max_position_embeddings):
            frequencies = init(config, None, seq_len=length)[0].tolist()
            if not all(0 < frequency < math.inf for frequency in frequencies):
                raise ValueError(f"its frequencies would be {frequencies[:4]}, ...")
    except Exception as error:
        # The type of error depends on the kind of rotary embedding.
        text = f"rope_scaling = {_show(dict(cfg.rope_scaling))}: {type(error).__name__}: {error}"
        raise ModelConfigError(f"model config {cfg.path}: transformers cannot use {text}; correct its values") from None
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate
        logger.setLevel(level)
    return [f"model config {cfg.path}: transformers says: {line}" for line in lines]


def _check_relations(raw: Mapping[str, Any], values: Mapping[str, Any], problems: list[str]) -> None:
    """Checks sizes that depend on each other, except those that already have a problem; appends to `problems`."""
    architectures = raw.get("architectures") or []
    # Anything but a list of names has its own problem.
    named = architectures if _names(architectures) is None else []
    if "model_type" not in raw and not all(name.casefold().startswith("llama") for name in named):
        problems.append(f'architectures = {_show(architectures)}; allowed: ["LlamaForCausalLM"], or leave it out')
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    kv_heads, vocab = values.get("num_key_value_heads"), values.get("vocab_size")
    if hidden and heads:
        if hidden % heads:
            problems.append(f"hidden_size = {hidden}, num_attention_heads = {heads}; allowed: a multiple of num_attention_heads")
        elif (hidden // heads) % 2:
            problems.append(
                f"hidden_size = {hidden}, num_attention_heads = {heads}: heads are {hidden // heads} wide; "
                "allowed: an even width (rotary embeddings turn pairs)"
            )
        head_dim = raw.get("head_dim")
        if _positive_int(head_dim) is None and head_dim * heads != hidden:
            problems.append(f"head_dim = {head_dim}; allowed: hidden_size / num_attention_heads = {hidden}/{heads}")
    if heads and kv_heads and heads % kv_heads:
        problems.append(f"num_key_value_heads = {kv_heads}; allowed: a divisor of num_attention_heads = {heads}")
    if vocab:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = values.get(key)
            if value is not None and value >= vocab:
                problems.append(f"{key} = {value}; allowed: below vocab_size = {vocab}, or -1 or null for none")


def linear_shapes(cfg: ModelConfig) -> list[tuple[int, int]]:
    """Returns (out, in) of the seven linears of one decoder layer: q, k, v, o, gate, up, down."""
    h, i = cfg.hidden_size, cfg.intermediate_size
    kv = cfg.num_key_value_heads * cfg.head_dim
    return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]
