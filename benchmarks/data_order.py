"""How often each document of a small, uneven corpus is read, packed, in the two orders of the data.

`python benchmarks/data_order.py` prints, for corpora of several kinds, the least and the most reads per document after 1, 3 and
10 corpora's worth of tokens (sequences of 64 tokens, 24 lanes). Seconds on one core; the figures depend on no hardware.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.data.loader import TrainLoader
from peft_pretraining.data.source import DataOrder, Source, open_source

MAX_LENGTH, LANES = 64, 24


class NumberTokenizer:
    """Gives every word of the document "i i i ..." the id i + 2, so that an id tells its document; eos is 1."""

    name = fingerprint = "numbers"
    pad_id, eos_id = 0, 1
    text_vocab_size = vocab_size = 60_000

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [[int(text.split()[0]) + 2] * len(text.split()) for text in texts]


def corpora() -> dict[str, tuple[list[int], int]]:
    """By name: the lengths of the documents, in words, and the number of files."""
    rng = random.Random(0)
    return {
        "59 documents of 40 to 69 tokens and one of 100,000": ([40 + i % 30 for i in range(59)] + [100_000], 1),
        "30 documents of 100 tokens": ([100] * 30, 1),
        "500 documents, Pareto (exponent 1.1), 3 files": ([int(20 * rng.paretovariate(1.1)) for _ in range(500)], 3),
        "2,000 documents, log-normal (sigma 1.5), 5 files": ([max(1, int(rng.lognormvariate(5, 1.5))) for _ in range(2000)], 5),
    }


def write_corpus(folder: Path, lengths: list[int], files: int) -> Source:
    """Writes documents of these lengths, dealt to the files in turn."""
    lines = [json.dumps({"text": " ".join([str(number)] * length)}) + "\n" for number, length in enumerate(lengths)]
    for file in range(files):
        (folder / f"{file}.jsonl").write_text("".join(lines[file::files]))
    return open_source(str(folder), "train", hold_out=False)


def reads(source: Source, lengths: list[int], order: DataOrder) -> dict[int, np.ndarray]:
    """By corpora's worth of tokens: the reads of each document, its ids that came divided by its length."""
    options = {"max_length": MAX_LENGTH, "packing": True, "lanes": LANES, "seed": 1, "data_order": order}
    batches = iter(TrainLoader(source, NumberTokenizer(), **options))  # type: ignore[arg-type]
    tokens, done = sum(lengths) + len(lengths), 0
    counts, shares = np.zeros(len(lengths)), {}
    for number in (1, 3, 10):
        wanted = -(-number * tokens // MAX_LENGTH)
        for batch in itertools.islice(batches, wanted - done):
            ids = batch.input_ids.numpy().ravel()
            counts += np.bincount(ids[ids > 1] - 2, minlength=len(lengths))
        done, shares[number] = wanted, counts / lengths
    return shares


def main() -> None:
    orders: tuple[DataOrder, ...] = ("lanes", "global")
    for name, (lengths, files) in corpora().items():
        with tempfile.TemporaryDirectory() as folder:
            source = write_corpus(Path(folder), lengths, files)
            for order in orders:
                cells = [f"{each.min():.1f} to {each.max():.1f}" for each in reads(source, lengths, order).values()]
                print(f"{name:<52}{order:<8}{', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
