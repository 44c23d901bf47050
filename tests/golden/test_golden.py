"""Losses and gradient norms of every method equal the recorded ones (golden.py records them)."""

import json
import subprocess
import sys

import pytest
from golden import FILE, METHODS, NUM_UPDATES

GOLDEN = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def current(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("golden") / "current.json"
    command = [sys.executable, str(FILE.with_name("golden.py")), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def test_every_method_is_recorded_whole_and_per_layer():
    assert set(GOLDEN) == {f"{method}{end}" for method in METHODS for end in ("", "_per_layer")}


@pytest.mark.parametrize("run", sorted(GOLDEN))
def test_losses_and_gradient_norms_equal_the_recorded_ones(current, run):
    assert len(GOLDEN[run]["loss"]) == len(GOLDEN[run]["gradnorm"]) == NUM_UPDATES
    for key, recorded in GOLDEN[run].items():
        assert current[run][key] == pytest.approx(recorded, rel=1e-6), f"{run}: {key} moved"
