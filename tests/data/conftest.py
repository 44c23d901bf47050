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
    """write(documents, shards) -> folder with that many .json.gz files, documents dealt in turn."""

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
    """Many combinations of workers in little time; tests that use it have siblings with real processes."""
    monkeypatch.setattr(loader_module, "Workers", InlineWorkers)
