"""Small corpora, a tokenizer whose ids are bytes, and workers without processes, for the tests of this folder."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


class ByteTokenizer:
    """Id = byte + 2; pad 0, eos 1. Has what the data layer needs of a Tokenizer."""

    name, fingerprint = "bytes", "one id per byte"
    pad_id, eos_id = 0, 1
    text_vocab_size = vocab_size = 258

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + 2 for byte in text.encode()] for text in texts]

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir()
        (Path(folder) / "bytes.txt").write_text("nothing to keep\n")

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) - 2 for i in ids if i > 1).decode()


def texts(count: int, start: int = 0) -> list[str]:
    """Different documents of different lengths."""
    return [f"document {i} " + "word " * (i * 7 % 13) for i in range(start, start + count)]


def json_lines(documents: Iterable[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "url": "u"}).encode() + b"\n" for text in documents)


class InlineWorkers:
    """Stands in for worker processes: runs the same work of each worker in this process, in the same turns."""

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
