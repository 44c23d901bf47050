"""From tokenised documents to sequences of at most `max_length` ids: pure functions over a stream of documents.

Padded (the published protocol): one document per sequence, cut to max_length, its last id eos. Packed: documents with eos
after each, one after the other, cut every max_length ids; nothing is thrown away.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

IGNORE_INDEX = -100

Position = TypeVar("Position")


class Document(NamedTuple):
    """ids: without eos, at least one. start_token: ids (eos counts as the last) that earlier sequences already hold."""

    ids: Sequence[int] | np.ndarray
    start_token: int = 0


def padded_sequences(
    documents: Iterable[tuple[Document, Position, Position]], *, eos_id: int, max_length: int
) -> Iterator[tuple[np.ndarray, Position]]:
    """One sequence per document: its first max_length - 1 ids and eos, as transformers' truncation gives it.

    documents: (document, position at it, position after it). Yields (int32 ids, 2 to max_length of them; position after).
    """
    for document, _, after in documents:
        yield _with_eos(document.ids[: max_length - 1], eos_id), after


def packed_sequences(
    documents: Iterable[tuple[Document, Position, Position]],
    *,
    eos_id: int,
    max_length: int,
    inside: Callable[[Position, int], Position],
) -> Iterator[tuple[np.ndarray, Position]]:
    """Sequences of exactly max_length ids; the rest of a finite stream (less than max_length ids) comes last.

    inside(position of a document, ids used): the position from which a restarted stream goes on in mid-document. Yields
    (int32 ids, position after them).
    """
    sequence = np.empty(max_length, dtype=np.int32)
    filled = 0
    last_position: Position  # bound before the first id is
    for document, here, after in documents:
        ids = _with_eos(document.ids, eos_id)
        used = document.start_token
        while used < len(ids):
            count = min(max_length - filled, len(ids) - used)
            sequence[filled : filled + count] = ids[used : used + count]
            filled, used = filled + count, used + count
            last_position = inside(here, used) if used < len(ids) else after
            if filled == max_length:
                yield sequence.copy(), last_position
                filled = 0
    if filled:
        yield sequence[:filled].copy(), last_position


def _with_eos(ids: Sequence[int] | np.ndarray, eos_id: int) -> np.ndarray:
    ended = np.empty(len(ids) + 1, dtype=np.int32)
    ended[:-1], ended[-1] = ids, eos_id
    return ended


def pad_and_label(sequences: list[np.ndarray], *, max_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences -> (input_ids, labels), both (B, max_length) int64; labels equal the ids, -100 where padded.

    Padding goes by length, never by value: pad_id may be an id of text.
    """
    input_ids = np.full((len(sequences), max_length), pad_id, dtype=np.int64)
    labels = np.full((len(sequences), max_length), IGNORE_INDEX, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        labels[row, : len(sequence)] = sequence
    return input_ids, labels
