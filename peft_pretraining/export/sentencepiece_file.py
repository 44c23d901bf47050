"""Writes a tokenizer as a SentencePiece file, from which llama.cpp's converter takes pieces and scores.

An export holds tokenizer.json, and the run may have begun from one, so the file is made from that. It is written only if
SentencePiece then gives the ids of training. Without the file, the converter takes a BPE's pieces from tokenizer.json with
equal scores, and llama.cpp splits words in other ways than the training did.
"""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

from peft_pretraining.data.tokenizer import BYTE_PIECE, PROBE, Tokenizer

# The converter treats every tokenizer.model as BPE. A unigram model is no BPE, so its file has T5's name for it, spiece.model,
# which the converter reads for T5 only (docs/after_training.md).
BPE_FILE, UNIGRAM_FILE = "tokenizer.model", "spiece.model"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2
_PROBED_PIECES = 2000


def write_sentencepiece(tokenizer: Tokenizer, folder: Path) -> bool:
    """Writes the file beside tokenizer.json in `folder`, if there is a SentencePiece model with the same ids for text.

    Byte-level BPE tokenizers (GPT-2, Llama 3) have no such model. Returns True if the file was written.
    """
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if (proto := _model(state, tokenizer)) is None:
        return False
    pieces = [piece.piece for piece in proto.pieces if piece.type == _NORMAL]
    text = "".join(pieces[:: 1 + len(pieces) // _PROBED_PIECES]).replace("\u2581", " ")
    texts = [PROBE, f" {PROBE} ", text]
    expected = tokenizer.encode_batch(texts)
    # tokenizer.json says in many ways whether spaces are added or removed; trying is simpler than reading them all.
    for proto.normalizer_spec.add_dummy_prefix, proto.normalizer_spec.remove_extra_whitespaces in itertools.product(
        (True, False), repeat=2
    ):
        if _ids(content := proto.SerializeToString(), texts) == expected:
            (folder / (BPE_FILE if proto.trainer_spec.model_type == _BPE else UNIGRAM_FILE)).write_bytes(content)
            return True
    return False


def _ids(content: bytes, texts: list[str]) -> list[list[int]] | None:
    """What SentencePiece makes of the texts; None if it does not accept the model."""
    from sentencepiece import SentencePieceProcessor

    try:
        ids: list[list[int]] = SentencePieceProcessor(model_proto=content).encode(texts)
    except RuntimeError:
        return None
    return ids


def _model(state: dict[str, Any], tokenizer: Tokenizer) -> Any | None:
    """The SentencePiece model of a tokenizer.json's content, without its rules for spaces; None if its kind has none."""
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece_format

    model, added = state["model"], {token["id"]: token for token in state["added_tokens"]}
    scored = _scored_pieces(model)
    if scored is None:
        return None
    pieces = {index: (token["content"], 0.0) for index, token in added.items()} | scored
    unk = model.get("unk_id")
    if unk is None:
        unk = next((index for index, (name, _) in pieces.items() if name == model.get("unk_token")), None)
    if unk is None or sorted(pieces) != list(range(len(pieces))):
        return None
    proto: Any = sentencepiece_format.ModelProto()  # type: ignore[attr-defined]
    for index, (name, score) in sorted(pieces.items()):
        kind = _BYTE if model.get("byte_fallback") and BYTE_PIECE.fullmatch(name) else _NORMAL
        if index in added:
            kind = _CONTROL if added[index]["special"] else _USER_DEFINED
        proto.pieces.add(piece=name, score=score, type=_UNKNOWN if index == unk else kind)
    trainer = proto.trainer_spec
    trainer.model_type = _UNIGRAM if model["type"] == "Unigram" else _BPE
    trainer.vocab_size, trainer.byte_fallback = len(proto.pieces), bool(model.get("byte_fallback"))
    trainer.unk_id, trainer.bos_id = unk, -1
    trainer.eos_id, trainer.eos_piece = tokenizer.eos_id, proto.pieces[tokenizer.eos_id].piece
    trainer.pad_id, trainer.pad_piece = tokenizer.pad_id, proto.pieces[tokenizer.pad_id].piece
    for step in (state["normalizer"] or {}).get("normalizers", [state["normalizer"] or {}]):
        if step.get("precompiled_charsmap"):
            proto.normalizer_spec.precompiled_charsmap = base64.b64decode(step["precompiled_charsmap"])
    return proto


def _scored_pieces(model: dict[str, Any]) -> dict[int, tuple[str, float]] | None:
    """Each id's piece and score. A piece of a BPE scores by the first merge that makes it, as SentencePiece merges by scores."""
    if model["type"] == "Unigram":
        return {index: (name, score) for index, (name, score) in enumerate(model["vocab"])}
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        return None
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        scores.setdefault("".join(merge), -float(rank))
    return {index: (name, scores.get(name, -float(len(model["merges"])))) for name, index in model["vocab"].items()}
