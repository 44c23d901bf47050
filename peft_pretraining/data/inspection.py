"""Figures of a data set: counts, lengths, tokens cut at max_length, padding, bad records, and a few documents."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from peft_pretraining.data import DataError
from peft_pretraining.data.lanes import Order, lane_units
from peft_pretraining.data.loader import check_tokenizer
from peft_pretraining.data.mixture import Mixture
from peft_pretraining.data.prepared import TokenRecord, read_manifest, seals, verify
from peft_pretraining.data.records import MAX_EXAMPLES, BadRecord, RawRecord, document_in_split, place_of, read_records
from peft_pretraining.data.source import Source, Split, default_lanes, open_source, prepared_folder
from peft_pretraining.data.tokenizer import Tokenizer, encode_documents

_SHOWN_DOCUMENTS, _SHOWN_CHARACTERS = 3, 200
_TOGETHER = 64


@dataclass
class _Seen:
    """What was read of a split. whole: the split was read to its end."""

    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)  # of each document: its file's and its record's number
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
    data_lanes: int | None = None,
) -> dict[str, Any]:
    """Figures of both splits, JSON-able; a split that cannot be opened has an "error" instead.

    Args:
        tokenizer: None: only characters are counted (of prepared data also tokens).
        documents: read only the first `documents` of each split; None for all.
        max_length: ids per sequence, eos included, for the shares that would be cut and padded.
        data_lanes: virtual readers of the training split; None for a run's default.

    Raises:
        DataError: neither split can be opened. TokenizerError: prepared data is another tokenizer's.
    """
    splits: dict[str, Any] = {}
    errors = []
    for split in ("train", "validation"):
        try:
            lanes = (data_lanes or default_lanes(dataset)) if split == "train" else None
            splits[split] = _inspect_split(dataset, split, tokenizer, documents, max_length, text_field, lanes)
        except DataError as error:
            splits[split] = {"error": str(error)}
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]
    return {"dataset": dataset, "tokenizer": tokenizer.name if tokenizer else None, "max_length": max_length} | splits


def inspect_mixture(
    mixture: Mixture, tokenizer: Tokenizer | None, *, text_field: str = "text", max_length: int = 256, **options: Any
) -> dict[str, Any]:
    """Figures of each data set of a mixture, and their shares of the training data, JSON-able; arguments as of `inspect_dataset`.

    Shares: of the tokens, as the weights ask for, and of the documents that these are, packed (whole) and padded (cut at
    max_length), by the mean lengths of the documents that were read; of characters without a tokenizer.
    """
    assert mixture.weights is not None
    options |= {"text_field": text_field, "max_length": max_length}
    sources = [inspect_dataset(source.dataset, tokenizer, **options) for source in mixture.sources]
    tokens, documents = list(mixture.weights), dict[str, list[float]]()
    for layout in ("packed", "padded"):
        lengths = [_mean_length(figures["train"], max_length if layout == "padded" else None) for figures in sources]
        if all(lengths):
            amounts = [weight / length for weight, length in zip(tokens, lengths, strict=True)]
            documents[layout] = [amount / sum(amounts) for amount in amounts]
    return {
        "dataset": mixture.dataset,
        "weighed": mixture.weighed_by,
        "shares_of_tokens": tokens,
        "shares_of_documents": documents,
        "max_length": max_length,
        "fingerprint": mixture.fingerprint,
        "sources": sources,
    }


def _mean_length(figures: dict[str, Any], max_length: int | None) -> float:
    """Mean number of tokens (characters if these are not known) of a split's documents, eos included, cut at max_length."""
    lengths = figures.get("tokens") or figures.get("characters")
    if not lengths:
        return 0.0
    kept = 1.0 if max_length is None or figures.get("tokens") is None else 1 - figures["cut_tokens_share"]
    return float((lengths["mean"] + 1) * kept)


def format_mixture(figures: dict[str, Any]) -> str:
    """Returns the figures of a mixture as text for the terminal: its shares, then each data set."""
    documents, names = figures["shares_of_documents"], [source["dataset"] for source in figures["sources"]]
    lines = [f"mixture of {len(names)} data sets, shares of the training tokens {figures['weighed']}"]
    lines.append(f"  {'tokens':>7}  {'documents packed':>16}  {'padded at ' + str(figures['max_length']):>14}")
    for number, name in enumerate(names):
        packed, padded = (f"{documents[key][number]:.1%}" if key in documents else "?" for key in ("packed", "padded"))
        lines.append(f"  {figures['shares_of_tokens'][number]:>7.1%}  {packed:>16}  {padded:>14}  {name}")
    return "\n\n".join(["\n".join(lines), *(format_inspection(source) for source in figures["sources"])])


def _inspect_split(
    dataset: str,
    split: Split,
    tokenizer: Tokenizer | None,
    documents: int | None,
    max_length: int,
    text_field: str,
    lanes: int | None,
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
        "files_found": source.num_listed,
        "files_left_out": source.left_out.removeprefix("; "),
        "size_bytes": None if None in sizes else sum(size for size in sizes if size is not None),
        "documents": len(seen.characters),
        "whole_split": seen.whole,
        "characters": _lengths(seen.characters),
        "tokens": _lengths(seen.tokens),
        **_shares(seen.tokens, max_length),
        **({} if lanes is None else {"lanes": _lanes(source, seen, lanes)}),
        "bad_records": dict(sorted(seen.bad_records.items())),
        "bad_examples": seen.bad_examples,
        "examples": seen.documents,
    }


def _read(source: Source, tokenizer: Tokenizer | None, documents: int | None) -> _Seen:
    seen = _Seen()
    for index, shard in enumerate(source.shards):
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
            seen.places += [(index, record.number) for record, _ in contents]
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


def _lanes(source: Source, seen: _Seen, num_lanes: int) -> dict[str, Any]:
    """Returns what each lane reads in its first pass, of the documents that were read, and the order of a packed run.

    documents, tokens: by lane, of the order "lanes"; tokens count eos, and are characters where no tokenizer is given.
    """
    lane_of = {
        (unit.shard, unit.residue): (lane, unit.parts)
        for lane in range(num_lanes)
        for unit in lane_units(source.shards, lane, Order(num_lanes, 0, 2, True), 0)
    }
    whole = {shard for (shard, _), (_, parts) in lane_of.items() if parts == 1}
    documents, amounts = [0] * num_lanes, [0] * num_lanes
    sizes = [count and count + 1 for count in seen.tokens] if seen.tokens else seen.characters
    for (shard, record), size in zip(seen.places, sizes, strict=True):
        lane, _ = lane_of[shard, 0 if shard in whole else record % num_lanes]
        documents[lane] += size > 0
        amounts[lane] += size
    return {
        "number": num_lanes,
        "documents": documents,
        "tokens" if seen.tokens else "characters": amounts,
        "packed_order": source.data_order(packing=True),
    }


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


def _lane_lines(lanes: dict[str, Any], whole_split: bool) -> list[str]:
    unit = "tokens" if "tokens" in lanes else "characters"
    share = sum(lanes[unit]) / lanes["number"]
    lines = []
    for name in ("documents", unit):
        amounts = lanes[name]
        least, most = (pick(range(len(amounts)), key=amounts.__getitem__) for pick in (min, max))
        lines.append(f"{name} per lane and pass: {amounts[least]:,} (lane {least}) to {amounts[most]:,} (lane {most})")
    if lanes["packed_order"] == "global":
        lines.append(f"with --packing, {unit} per lane and pass: {share:,.0f} in every lane (global order)")
    part = "" if whole_split else ", of the documents read"
    return [f"  {lanes['number']} lanes{part}", *(f"    {line}" for line in lines)]


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
    if "lanes" in figures:
        lines += _lane_lines(figures["lanes"], figures["whole_split"])
    kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in figures["bad_records"].items())
    lines.append(f"  bad records: {kinds or 'none'}")
    lines += [f"    {example}" for example in figures["bad_examples"]]
    return lines + [f"  | {document}" for document in figures["examples"]]
