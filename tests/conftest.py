"""Fixtures shared by all tests: few threads, and the real C4 sample where a checkout has one beside it."""

import os
from pathlib import Path

import pytest

# Two test processes share two cores; more threads only make timings worse. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

ROOT = Path(__file__).resolve().parent.parent


def _real_data(name: str) -> Path:
    """A path below the real-data folder: $SLTRAIN_REAL_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("SLTRAIN_REAL_DATA", ROOT.parent / "shared" / "data"))
    path = folder / name
    if not path.exists():
        pytest.skip(
            f"real data not at hand: {name} (set SLTRAIN_REAL_DATA to a folder with c4_sample/ and t5_spiece.model)"
        )
    return path


@pytest.fixture
def c4_sample() -> Path:
    """Folder with four C4 training shards and one validation shard in C4's own file format."""
    return _real_data("c4_sample")


@pytest.fixture
def t5_model() -> Path:
    """The T5 SentencePiece model, 32,000 pieces."""
    return _real_data("t5_spiece.model")
