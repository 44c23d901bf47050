"""Tokens, sequences and micro-batches per second of training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class Counted(NamedTuple):
    """Work between two readings of the throughput."""

    tokens: int
    updates: int


class Throughput:
    """Tokens, sequences and micro-batches per second of training; evaluation and saving do not count."""

    def __init__(self, sequences_per_update: int, micro_batches_per_update: int):
        """Counts are per update, over all processes."""
        self._per_update = {"examples": sequences_per_update, "batches": micro_batches_per_update}
        self._start = time.perf_counter()
        self._tokens = self._updates = 0

    def add_update(self, num_tokens: int) -> None:
        """One more update with `num_tokens` tokens of text is done."""
        self._tokens += num_tokens
        self._updates += 1

    def take(self) -> Counted:
        """What was added since the last taking."""
        counted = Counted(self._tokens, self._updates)
        self._tokens = self._updates = 0
        return counted

    def rates(self, counted: Counted, done_at: float) -> dict[str, float]:
        """The published throughput keys of what was taken and done at `done_at` (time.perf_counter), per second.

        It is taken to have begun where the one before it was done.
        """
        seconds = max(done_at - self._start, 1e-9)
        rates = {f"throughput_{name}": counted.updates * count / seconds for name, count in self._per_update.items()}
        rates["throughput_tokens"] = counted.tokens / seconds
        self._start = done_at
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block is not training; all updates before it must be done."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before
