"""Packing and padding neither lose nor add tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from peft_pretraining.data.lanes import Document, packed_sequences, pad_and_label, padded_sequences

EOS = 1
documents_strategy = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=30), max_size=20)


def stream(documents, start=(0, 0)):
    """Yields (document, position before it, position after it); a position is (document number, number of its ids used)."""
    first, used = start
    for number in range(first, len(documents)):
        tokens_done = used if number == first else 0
        yield Document(documents[number], tokens_done), (number, tokens_done), (number + 1, 0)


def pack(documents, max_length, start=(0, 0)):
    return list(
        packed_sequences(stream(documents, start), eos_id=EOS, max_length=max_length, inside=lambda here, used: (here[0], used))
    )


@given(documents_strategy, st.integers(2, 12))
def test_packing_keeps_every_id_in_order(documents, max_length):
    """The sequences joined are the documents, each followed by eos; all sequences except the last are full."""
    sequences = [ids for ids, _ in pack(documents, max_length)]
    expected = [i for document in documents for i in [*document, EOS]]
    assert [int(i) for ids in sequences for i in ids] == expected
    assert all(len(ids) == max_length for ids in sequences[:-1])
    assert all(0 < len(ids) <= max_length for ids in sequences[-1:])


@given(documents_strategy, st.integers(2, 12), st.data())
def test_packing_resumes_at_any_position(documents, max_length, data):
    """Started at the position after sequence k, packing gives sequences k + 1, k + 2, ... and the same positions."""
    whole = pack(documents, max_length)
    if not whole:
        return
    k = data.draw(st.integers(0, len(whole) - 1))
    rest = pack(documents, max_length, start=whole[k][1])
    assert [(ids.tolist(), position) for ids, position in rest] == [(i.tolist(), p) for i, p in whole[k + 1 :]]


@given(documents_strategy, st.integers(2, 12))
def test_padding_cuts_each_document_and_ends_it_with_eos(documents, max_length):
    """One sequence per document: its first max_length - 1 ids, then eos."""
    sequences = list(padded_sequences(stream(documents), eos_id=EOS, max_length=max_length))
    assert [ids.tolist() for ids, _ in sequences] == [[*d[: max_length - 1], EOS] for d in documents]
    assert [position for _, position in sequences] == [(n + 1, 0) for n in range(len(documents))]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1), st.integers(0, 9))
def test_labels_depend_on_the_length_not_on_the_padding_id(sequences, pad_id):
    """A label is -100 exactly after the end of a sequence, even if the text contains the padding id."""
    arrays = [np.array(s, dtype=np.int32) for s in sequences]
    input_ids, labels = pad_and_label(arrays, max_length=8, pad_id=pad_id)
    for row, sequence in enumerate(sequences):
        padding = 8 - len(sequence)
        assert input_ids[row].tolist() == sequence + [pad_id] * padding
        assert labels[row].tolist() == sequence + [-100] * padding
