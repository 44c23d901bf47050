"""Fixtures of the data tests."""

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from corpora import ByteTokenizer, InlineWorkers, json_lines

from peft_pretraining.data import loader as loader_module


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., Path]:
    """Returns write(documents, shards) -> folder with that many .json.gz files, among which documents are distributed in turn."""

    def write(documents: Sequence[str], shards: int = 1, name: str = "corpus") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for index in range(shards):
            path = folder / f"c4-train.{index:05d}-of-{shards:05d}.json.gz"
            path.write_bytes(gzip.compress(json_lines(documents[index::shards])))
        return folder

    return write


@pytest.fixture
def inline_workers(monkeypatch) -> None:
    """Replaces worker processes by work in this process, for many combinations in little time; other tests use processes."""
    monkeypatch.setattr(loader_module, "Workers", InlineWorkers)
