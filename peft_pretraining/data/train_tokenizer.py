"""Trains a tokenizer on a data set: the same data and settings give the same bytes.

The text is a sample of the training split, so that held-out documents stay unseen.
"""

import contextlib
import json
import math
import random
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

from peft_pretraining.data import DataError
from peft_pretraining.data.mixture import open_dataset
from peft_pretraining.data.records import UNREADABLE_FILE, BadRecord, Health, document_in_split, read_records
from peft_pretraining.data.sentencepiece_training import ModelType, train_sentencepiece
from peft_pretraining.data.source import Source

MODEL_FILE = "tokenizer.model"
_PARTS = 32


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
