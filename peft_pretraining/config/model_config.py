"""Reads a LLaMA model's JSON file into a validated, frozen `ModelConfig`. Imports neither torch nor transformers.

Accepts the published files (`max_sequence_length`, `pad_token_id: -1`) and those of the hub (`max_position_embeddings`,
`rope_parameters`, ...). One error lists all entries that would be ignored, misread or fail inside a library.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN_ACTS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "swish")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
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


def load_model_config(path: str | Path) -> ModelConfig:
    """Reads and checks a model's JSON file.

    Keys: those of the published files and of the hub's LLaMA `config.json`. If `max_position_embeddings` is absent,
    `max_sequence_length` replaces it. From a list of end-of-sequence ids the first is used.

    Raises:
        ModelConfigError: with all problems: file missing or not JSON, unknown or repeated keys (the nearest known one
            is suggested), wrong types, values out of range, sizes that do not divide, settings without effect here.
    """
    path = Path(path)
    raw = _read(path)
    problems: list[str] = []
    for key in sorted(set(raw) - KNOWN_KEYS):
        near = difflib.get_close_matches(key, sorted(KNOWN_KEYS), n=1, cutoff=0.6)
        problems.append(
            f"{key}: unknown key (value {_show(raw[key])}); "
            + (f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(KNOWN_KEYS))}")
        )
    values = _values(raw, problems)
    rope_theta, rope_scaling = _rope(raw, problems)
    _check_relations(raw, values, problems)
    if problems:
        lines = "".join(f"\n  {p}" for p in problems)
        raise ModelConfigError(f"model config {path}: {len(problems)} problem(s){lines}")
    return ModelConfig(**values, rope_theta=rope_theta, rope_scaling=rope_scaling, name=path.stem, path=str(path))


def _read(path: Path) -> dict[str, Any]:
    """Reads the JSON object in `path`. Raises ModelConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        available = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = f"; that folder has {', '.join(available)}" if available else ""
        raise ModelConfigError(f"model config {path}: no such file{hint}") from None
    except IsADirectoryError:
        raise ModelConfigError(f"model config {path}: is a folder; name the JSON file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelConfigError(f"model config {path}: cannot be read as UTF-8 text ({error})") from None
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        repeated.extend(k for k in dict.fromkeys(keys) if keys.count(k) > 1)
        return dict(pairs)

    try:
        raw = json.loads(text, object_pairs_hook=collect)
    except json.JSONDecodeError as error:
        raise ModelConfigError(
            f"model config {path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from None
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
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return None if ok else "a number above 0"


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
    "initializer_range": (_positive_number, 0.02),
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
    "head_dim": _positive_int,
    "attention_dropout": _only(0),
    "hidden_dropout": _only(0),
    "pretraining_tp": _only(1),
    "rope_theta": _positive_number,
    "rope_scaling": _anything,  # checked in _rope
    "rope_parameters": _anything,  # checked in _rope
    # Carried by published and hub files; they say nothing about the shape of the model.
    "architectures": _anything,
    "use_cache": _anything,
    "torch_dtype": _anything,
    "dtype": _anything,
    "transformers_version": _anything,
    "_name_or_path": _anything,
}
# null in these means the same as absent.
_NULLABLE = {
    "num_key_value_heads",
    "head_dim",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_scaling",
    "rope_parameters",
}
KNOWN_KEYS = frozenset(_MODEL_KEYS) | frozenset(_OTHER_KEYS)


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
        if key in raw and not (raw[key] is None and key in _NULLABLE) and (allowed := check(raw[key])) is not None:
            problems.append(f"{key} = {_show(raw[key])}; allowed: {allowed}")
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


def _rope(raw: Mapping[str, Any], problems: list[str]) -> tuple[float, Mapping[str, Any] | None]:
    """Returns the base of the rotary frequencies, and their scaling parameters or None; appends to `problems`.

    Reads rope_theta and rope_scaling (transformers 4) or rope_parameters (transformers 5).
    """
    theta = raw.get("rope_theta", DEFAULT_ROPE_THETA)
    scaling = None
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            problems.append(f"{key} = {_show(value)}; allowed: null or an object with rope_type")
            continue
        kind = value.get("rope_type", value.get("type", "default"))
        if kind not in ROPE_TYPES:
            problems.append(f"{key}.rope_type = {_show(kind)}; allowed: one of {', '.join(ROPE_TYPES)}")
            continue
        inner_theta = value.get("rope_theta", theta)
        if (allowed := _positive_number(inner_theta)) is not None:
            problems.append(f"{key}.rope_theta = {_show(inner_theta)}; allowed: {allowed}")
            continue
        if "rope_theta" in raw and inner_theta != raw["rope_theta"]:
            problems.append(f"{key}.rope_theta = {_show(inner_theta)} contradicts rope_theta = {_show(raw['rope_theta'])}")
        theta = inner_theta
        if kind != "default":
            scaling = {k: v for k, v in value.items() if k not in ("type", "rope_theta")} | {"rope_type": kind}
    return (float(theta) if _positive_number(theta) is None else DEFAULT_ROPE_THETA), scaling


def _check_relations(raw: Mapping[str, Any], values: Mapping[str, Any], problems: list[str]) -> None:
    """Checks sizes that depend on each other, except those that already have a problem; appends to `problems`."""
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
