"""Trains a SentencePiece tokenizer on a data set: the same text and settings give the same bytes.

The text is a sample of the training split, so that held-out documents stay unseen.
"""

import contextlib
import io
import json
import math
import random
import re
import shutil
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from peft_pretraining.data import DataError, first_line
from peft_pretraining.data.mixture import open_dataset
from peft_pretraining.data.records import UNREADABLE_FILE, BadRecord, Health, document_in_split, read_records
from peft_pretraining.data.source import Source

ModelType = Literal["bpe", "unigram"]
MODEL_FILE = "tokenizer.model"
# SentencePiece passes over longer lines in silence.
_LINE_BYTES = 4192
_PARTS = 32


def train_sentencepiece(texts: Iterable[str], model: ModelType, vocab_size: int) -> bytes:
    """Trains a model on texts and returns the content of its file: pad 0, eos 1, unk 2, no bos; any text can be encoded.

    Raises DataError: the vocabulary is too large or too small for the text, or there is no text.
    """
    import sentencepiece

    # A line break is a piece of its own and other pieces contain none, so that encoding loses no text.
    lines = (part for text in texts for line in text.split("\n") if line for part in _short_parts(line))
    content = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=content,
            model_type=model,
            vocab_size=vocab_size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            # One thread and a fixed order, so that the result depends only on the text.
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"--vocab_size {vocab_size}: {_reason(str(error))}") from None
    return content.getvalue()


def _short_parts(line: str) -> Iterator[str]:
    """A line in parts that are not too long for SentencePiece, cut before a space where there is one."""
    while len(line) > _LINE_BYTES // 4 and len(line.encode()) > _LINE_BYTES:
        head = line.encode()[:_LINE_BYTES].decode(errors="ignore")
        end = head.rfind(" ")
        end = end if end > len(head) // 2 else len(head)
        yield line[:end]
        line = line[end:]
    yield line


def _reason(message: str) -> str:
    """What a SentencePiece error means, with the way out."""
    if (most := re.search(r"set it to a value <= (\d+)", message)) is not None:
        return f"the text has no more than {int(most[1]):,} different pieces; lower it to that, or give more text (--max_bytes)"
    if (least := re.search(r"required_chars\. \d+ vs (\d+)", message)) is not None:
        return f"256 bytes, 4 special pieces and the frequent characters of the text need {int(least[1]):,}; raise it to that"
    if "!sentences_.empty()" in message:
        return "the documents hold no text to train on"
    return first_line(RuntimeError(message.split("] ")[-1] or message))


def train_tokenizer(
    dataset: str,
    out: Path,
    *,
    vocab_size: int,
    model: ModelType = "bpe",
    text_field: str = "text",
    max_documents: int | None = None,
    max_bytes: int = 50_000_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains a tokenizer on a sample of a data set, or of each of a list by their weights, into the new folder `out`.

    Args:
        max_documents, max_bytes: bounds of the sample; None for no bound by documents. Bytes are of UTF-8 text.
        seed: draws the order of the files from which the sample is taken.

    Returns:
        The settings and what the sample held, as in training.json beside the model.

    Raises DataError: the data cannot be read or holds no text, the vocabulary does not fit the text, or `out` cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out {out} exists already; name a new folder")
    data = open_dataset(dataset, "train", text_field=text_field)
    if prepared := [source for source in data.sources if source.prepared is not None]:
        raise DataError(
            f"dataset {prepared[0].dataset!r} is prepared: it holds tokens and no text; name the text it was made from"
        )
    weights = getattr(data, "weights", None) or (1.0,)
    texts: list[str] = []
    for source, weight in zip(data.sources, weights, strict=True):
        documents = None if max_documents is None else max(1, round(weight * max_documents))
        texts += _sample(source, documents, max(1, round(weight * max_bytes)), seed)
    num_bytes = sum(len(text.encode()) for text in texts)
    content = train_sentencepiece(texts, model, vocab_size)
    record = {
        "dataset": dataset,
        "fingerprint": data.fingerprint,
        "text_field": text_field,
        "model": model,
        "vocab_size": vocab_size,
        "max_documents": max_documents,
        "max_bytes": max_bytes,
        "seed": seed,
        "documents": len(texts),
        "bytes": num_bytes,
    }
    _write(out, content, record)
    return record


def _sample(source: Source, max_documents: int | None, max_bytes: int, seed: int) -> list[str]:
    """Documents of a source until a bound is reached, from its files in an order drawn from the seed.

    With each file the sample may grow by one part of the bounds, of as many parts as there are files (at most 32), so that a
    large file does not stand for all of them and few files of a large data set are opened.
    """
    draw = random.Random(seed).random
    files = sorted(range(len(source.shards)), key=lambda _: draw())
    parts = min(len(files), _PARTS)
    health = Health(source, "skip")
    taken: list[str] = []
    size = 0
    for turn, index in enumerate(files, start=1):
        reached = min(1, turn / parts)
        most = math.inf if max_documents is None else math.ceil(reached * max_documents)
        with contextlib.closing(_documents(source, index, health)) as documents:
            while size < reached * max_bytes and len(taken) < most and (text := next(documents, None)) is not None:
                taken.append(text[: max_bytes - size])
                size += len(taken[-1].encode())
        if size >= max_bytes or len(taken) == max_documents:
            break
    return taken


def _documents(source: Source, index: int, health: Health) -> Generator[str]:
    """The documents of a file that belong to the split. Raises DataError: it cannot be read, or too many records are bad."""
    shard = source.shards[index]
    health.tried.add(index)
    for record in read_records(shard, source):
        health.records += 1
        content = document_in_split(record, shard, source)
        if isinstance(content, BadRecord):
            if content.kind == UNREADABLE_FILE:
                health.file_unreadable(index, content.detail)
            health.bad_record(content, index, record)
        elif isinstance(content, str) and content:
            yield content


def _write(out: Path, content: bytes, record: dict[str, Any]) -> None:
    """Writes the folder whole or not at all. Raises DataError."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / MODEL_FILE).write_bytes(content)
        (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(f"cannot write the tokenizer to --out {out}: {error.strerror or error}") from error
