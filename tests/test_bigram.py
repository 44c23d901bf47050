"""The bigram baseline of the quickstart is a correct probability model."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "bigram.py"


@pytest.fixture
def bigram():
    spec = importlib.util.spec_from_file_location("bigram", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_probabilities_sum_to_one_after_every_context(bigram):
    """Also for a context that the training text does not contain; otherwise its perplexity would be meaningless."""
    generator = np.random.default_rng(0)
    ids = generator.zipf(1.5, 4000).clip(max=18)
    model = bigram.KneserNeyBigram(ids[:-1], ids[1:], vocab_size=20)
    for context in range(20):
        total = model.probabilities(np.full(20, context), np.arange(20)).sum()
        assert total == pytest.approx(1.0, abs=1e-12)


def test_a_pair_that_always_occurs_together_is_learned(bigram):
    """Token 0 is always followed by token 1, so p(1 | 0) must be near 1."""
    ids = np.array([0, 1] * 500 + [2, 3, 3, 4, 2, 4])
    model = bigram.KneserNeyBigram(ids[:-1], ids[1:], vocab_size=8)
    assert model.probabilities(np.array([0]), np.array([1]))[0] > 0.99
