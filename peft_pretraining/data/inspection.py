"""Figures of a data set: counts, lengths, tokens cut at max_length, padding, bad records, and a few documents."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from peft_pretraining.data import DataError
from peft_pretraining.data.loader import check_tokenizer
from peft_pretraining.data.prepared import TokenRecord, read_manifest, seals, verify
from peft_pretraining.data.records import MAX_EXAMPLES, BadRecord, RawRecord, document_in_split, place_of, read_records
from peft_pretraining.data.source import Source, Split, open_source, prepared_folder
from peft_pretraining.data.tokenizer import Tokenizer, encode_documents

_SHOWN_DOCUMENTS, _SHOWN_CHARACTERS = 3, 200
_TOGETHER = 64


@dataclass
class _Seen:
    """What was read of a split. whole: the split was read to its end."""

    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    bad_records: Counter[str] = field(default_factory=Counter)
    bad_examples: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    whole: bool = False


def inspect_dataset(
    dataset: str,
    tokenizer: Tokenizer | None,
    *,
    documents: int | None = 1000,
    max_length: int = 256,
    text_field: str = "text",
) -> dict[str, Any]:
    """Figures of both splits, JSON-able; a split that cannot be opened has an "error" instead.

    Args:
        tokenizer: None: only characters are counted (of prepared data also tokens).
        documents: read only the first `documents` of each split; None for all.
        max_length: ids per sequence, eos included, for the shares that would be cut and padded.

    Raises:
        DataError: neither split can be opened. TokenizerError: prepared data is another tokenizer's.
    """
    splits: dict[str, Any] = {}
    errors = []
    for split in ("train", "validation"):
        try:
            splits[split] = _inspect_split(dataset, split, tokenizer, documents, max_length, text_field)
        except DataError as error:
            splits[split] = {"error": str(error)}
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]
    return {"dataset": dataset, "tokenizer": tokenizer.name if tokenizer else None, "max_length": max_length} | splits


def _inspect_split(
    dataset: str, split: Split, tokenizer: Tokenizer | None, documents: int | None, max_length: int, text_field: str
) -> dict[str, Any]:
    source = open_source(dataset, split, text_field=text_field)
    if tokenizer is not None:
        check_tokenizer(source, tokenizer)
    seen = _read(source, tokenizer, documents)
    sizes = [shard.size_bytes for shard in source.shards]
    return {
        "description": source.describe(),
        "fingerprint": source.fingerprint,
        "files": len(source.shards),
        "files_found": source.found,
        "files_left_out": source.left_out.removeprefix("; "),
        "size_bytes": None if None in sizes else sum(size for size in sizes if size is not None),
        "documents": len(seen.characters),
        "whole_split": seen.whole,
        "characters": _lengths(seen.characters),
        "tokens": _lengths(seen.tokens),
        **_shares(seen.tokens, max_length),
        "bad_records": dict(sorted(seen.bad_records.items())),
        "bad_examples": seen.bad_examples,
        "examples": seen.documents,
    }


def _read(source: Source, tokenizer: Tokenizer | None, documents: int | None) -> _Seen:
    seen = _Seen()
    for shard in source.shards:
        records = read_records(shard, source)
        while together := list(islice(records, _TOGETHER)):
            contents: list[tuple[RawRecord, str | np.ndarray]] = []
            for record in together:
                if documents is not None and len(seen.characters) + len(contents) >= documents:
                    break
                content = document_in_split(record, shard, source)
                if isinstance(content, BadRecord):
                    seen.bad_records[content.kind] += 1
                    if len(seen.bad_examples) < MAX_EXAMPLES:
                        seen.bad_examples.append(shown(f"{place_of(record, shard)}: {content.in_words()}", 400))
                elif content is not None:
                    contents.append((record, content))
            _note(seen, contents, tokenizer)
            if documents is not None and len(seen.characters) >= documents:
                records.close()
                return seen
    seen.whole = True
    return seen


def _note(seen: _Seen, contents: list[tuple[RawRecord, str | np.ndarray]], tokenizer: Tokenizer | None) -> None:
    for record, content in contents:
        prepared = isinstance(record.content, TokenRecord)
        seen.characters.append(record.content.characters if prepared else len(content))
        if len(seen.documents) < _SHOWN_DOCUMENTS:
            if isinstance(content, str):
                seen.documents.append(shown(content, _SHOWN_CHARACTERS))
            elif tokenizer is not None:
                seen.documents.append(shown(tokenizer.decode(content[:_SHOWN_CHARACTERS].tolist()), _SHOWN_CHARACTERS))
    if tokenizer is not None:
        seen.tokens += [len(ids) for ids in encode_documents(tokenizer, [content for _, content in contents])]
    else:
        seen.tokens += [len(content) for _, content in contents if isinstance(content, np.ndarray)]


def _lengths(lengths: list[int]) -> dict[str, float] | None:
    if not lengths:
        return None
    median, p95 = np.percentile(lengths, [50, 95])
    return {
        "total": sum(lengths),
        "mean": sum(lengths) / len(lengths),
        "median": float(median),
        "p95": float(p95),
        "max": max(lengths),
    }


def _shares(tokens: list[int], max_length: int) -> dict[str, float | None]:
    """Returns the shares of cut documents, of tokens cut off, and of padding, in the padded layout; eos counts as a token."""
    lengths = np.array([count for count in tokens if count], dtype=np.int64) + 1
    if not len(lengths):
        return {"cut_documents_share": None, "cut_tokens_share": None, "padding_share": None}
    kept = np.minimum(lengths, max_length)
    return {
        "cut_documents_share": float((lengths > max_length).mean()),
        "cut_tokens_share": float(1 - kept.sum() / lengths.sum()),
        "padding_share": float(1 - kept.sum() / (max_length * len(lengths))),
    }


def shown(text: str, characters: int) -> str:
    """Returns the start of a text on one line, with control characters escaped."""
    short = text[:characters]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
    return escaped + ("…" if len(text) > characters else "")


def verify_prepared(dataset: str) -> int:
    """Verifies every checksum of a prepared data set; returns the number of files. Raises DataError naming the first bad file."""
    folder = prepared_folder(dataset)
    if folder is None:
        raise DataError(f"--verify: {dataset} is not prepared data, the only kind with checksums to verify")
    manifest = read_manifest(folder)
    for seal in seals(manifest):
        verify(folder, seal)
    return len(seals(manifest))


def format_inspection(figures: dict[str, Any]) -> str:
    """Returns the figures as text for the terminal."""
    lines = []
    for split in ("train", "validation"):
        lines += _split_lines(split, figures[split], figures["max_length"])
    if figures["train"].get("tokens") is None and figures["validation"].get("tokens") is None:
        lines.append("tokens are counted with --tokenizer NAME")
    return "\n".join(lines)


def _split_lines(split: str, figures: dict[str, Any], max_length: int) -> list[str]:
    if "error" in figures:
        return [f"{split}: {figures['error']}"]
    part = "all" if figures["whole_split"] else "the first"
    lines = [
        figures["description"],
        f"  {part} {figures['documents']:,} documents, fingerprint {figures['fingerprint']}",
    ]
    for unit in ("characters", "tokens"):
        if (lengths := figures[unit]) is not None:
            lines.append(
                f"  {unit:<11}{lengths['total']:,} in all; per document mean {lengths['mean']:,.1f}, median "
                f"{lengths['median']:,.0f}, 95 % up to {lengths['p95']:,.0f}, most {lengths['max']:,}"
            )
    if figures["padding_share"] is not None:
        lines.append(
            f"  max_length {max_length}: cuts {figures['cut_documents_share']:.1%} of the documents and "
            f"{figures['cut_tokens_share']:.1%} of the tokens; padding is {figures['padding_share']:.1%} of the positions"
        )
    kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in figures["bad_records"].items())
    lines.append(f"  bad records: {kinds or 'none'}")
    lines += [f"    {example}" for example in figures["bad_examples"]]
    return lines + [f"  | {document}" for document in figures["examples"]]
