"""Small corpora, a tokenizer whose ids are bytes, and a replacement for worker processes, for the tests in this folder."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


class ByteTokenizer:
    """A tokenizer with id = byte + 2, pad 0, eos 1, and the part of Tokenizer's interface that the data layer uses."""

    name, fingerprint = "bytes", "one id per byte"
    pad_id, eos_id = 0, 1
    text_vocab_size = vocab_size = 258

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + 2 for byte in text.encode()] for text in texts]

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir()
        (Path(folder) / "bytes.txt").write_text("no state\n")

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) - 2 for i in ids if i > 1).decode()


def texts(count: int, start: int = 0) -> list[str]:
    """Returns documents with different contents and lengths."""
    return [f"document {i} " + "word " * (i * 7 % 13) for i in range(start, start + count)]


def json_lines(documents: Iterable[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "url": "u"}).encode() + b"\n" for text in documents)


class InlineWorkers:
    """Replaces worker processes: does each worker's work in this process, in the same order."""

    def __init__(self, work, workers: int):
        self.parts = [work.items(worker, max(1, workers)) for worker in range(max(1, workers))]
        self.turns = self._run()

    def _run(self) -> Iterator:
        parts = list(self.parts)
        while parts:
            for part in list(parts):
                try:
                    yield next(part)
                except StopIteration:
                    parts.remove(part)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.turns)

    def close(self) -> None:
        pass
