"""Documents to ids in bounded memory: long texts in parts that meet where the tokenizer's pieces meet.

A fast tokenizer holds about 80 bytes per character of what it encodes at once, so a document of 50 MB would take 4 GB. A long
text is therefore cut at single spaces or line breaks inside it. At each cut the text around it is encoded whole and in two
parts; only a cut where both give the same ids is used, so the ids are those of the whole text. A stretch without any such
place (no blank in a quarter of a million characters) is cut where the part is full, which can spell one word otherwise.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

PART_CHARACTERS = 2**18
_TOGETHER_CHARACTERS = 2**20  # encoded in one call, which uses several cores
_AROUND_CUT = 200  # characters on either side that tell whether a cut changes the ids
_TRIED_CUTS = 20
_BLANK_INSIDE = re.compile(r"(?<=\S)[ \n](?=\S)")

Ids = Sequence[int] | np.ndarray


class Encoder(Protocol):
    """What is needed of a Tokenizer here."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


def encode_documents(tokenizer: Encoder, documents: Sequence[str | np.ndarray], enough: int | None = None) -> Iterator[Ids]:
    """The ids of each document, without eos; documents that are ids already (prepared data) are handed through.

    enough: ids of a document that are needed; of a long one no more parts are encoded than give so many.
    """
    together: list[str | np.ndarray] = []
    characters = 0
    for document in documents:
        size = len(document) if isinstance(document, str) else 0
        if together and characters + size > _TOGETHER_CHARACTERS:
            yield from _encode_together(tokenizer, together)
            together, characters = [], 0
        if size > PART_CHARACTERS and isinstance(document, str):
            yield from _encode_together(tokenizer, together)
            together, characters = [], 0
            yield _encode_long(tokenizer, document, enough)
        else:
            together.append(document)
            characters += size
    yield from _encode_together(tokenizer, together)


def _encode_together(tokenizer: Encoder, documents: Sequence[str | np.ndarray]) -> Iterator[Ids]:
    texts = [document for document in documents if isinstance(document, str)]
    encoded = iter(tokenizer.encode_batch(texts) if texts else [])
    for document in documents:
        yield next(encoded) if isinstance(document, str) else document


def _encode_long(tokenizer: Encoder, text: str, enough: int | None) -> np.ndarray:
    parts, count = [], 0
    for part in _parts(tokenizer, text):
        parts.append(np.array(tokenizer.encode_batch([part])[0], dtype=np.int32))
        count += len(parts[-1])
        if enough is not None and count >= enough:
            break
    return np.concatenate(parts)


def _parts(tokenizer: Encoder, text: str) -> Iterator[str]:
    first = 0
    while len(text) - first > PART_CHARACTERS:
        end, following = _cut(tokenizer, text, first)
        yield text[first:end]
        first = following
    yield text[first:]


def _cut(tokenizer: Encoder, text: str, first: int) -> tuple[int, int]:
    """(where the part that begins at `first` ends, where the next one begins: the blank between may belong to neither)."""
    full = first + PART_CHARACTERS
    blanks = list(_BLANK_INSIDE.finditer(text, max(first + 1, full - PART_CHARACTERS // 2), full))
    for blank in blanks[: -_TRIED_CUTS - 1 : -1]:
        at = blank.start()
        before, after = text[max(first, at - _AROUND_CUT) : at], text[at + 1 : at + 1 + _AROUND_CUT]
        whole, left, with_blank, without = tokenizer.encode_batch([before + blank[0] + after, before, blank[0] + after, after])
        if left + with_blank == whole:
            return at, at
        if left + without == whole:
            return at, at + 1
    return full, full
