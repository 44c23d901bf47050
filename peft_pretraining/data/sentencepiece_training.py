"""Trains a SentencePiece model on texts: the same texts and settings give the same bytes."""

import io
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from peft_pretraining.data import DataError, first_line

ModelType = Literal["bpe", "unigram"]
# SentencePiece passes over longer lines in silence.
_LINE_BYTES = 4192


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
