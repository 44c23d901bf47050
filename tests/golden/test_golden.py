"""Losses and gradient norms of every method equal the recorded ones (golden.py records them)."""

import json
import subprocess
import sys

import pytest
from golden import FILE, METHODS, NUM_UPDATES, OPTIMIZERS, PER_LAYER

GOLDEN = json.loads(FILE.read_text())


def test_every_method_is_recorded_and_some_per_layer_with_the_same_figures():
    assert set(GOLDEN) == {*METHODS, *OPTIMIZERS, *(f"{method}_per_layer" for method in PER_LAYER)}
    for method in PER_LAYER:
        assert GOLDEN[f"{method}_per_layer"] == GOLDEN[method]


def test_losses_and_gradient_norms_equal_the_recorded_ones(tmp_path):
    """In one test, because all runs are made in one process."""
    command = [sys.executable, str(FILE.with_name("golden.py")), "--out", str(tmp_path / "current.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    current = json.loads((tmp_path / "current.json").read_text())
    assert current.keys() == GOLDEN.keys()
    assert all(len(run["loss"]) == len(run["gradnorm"]) == NUM_UPDATES for run in current.values())
    moved = [
        f"{name}: {key}"
        for name, run in GOLDEN.items()
        for key, recorded in run.items()
        if current[name][key] != pytest.approx(recorded, rel=1e-6)
    ]
    assert moved == []


def test_losses_with_weights_stored_in_int8_are_near_those_of_float32():
    """The embedding's and head's initial values are rounded by up to .4 % of the largest of a block."""
    plain, stored = (GOLDEN[f"sltrain{name}"] for name in ("", "_int8"))
    for key in ("loss", "final_eval_loss"):
        assert stored[key] == pytest.approx(plain[key], rel=2e-3)
        assert stored[key] != plain[key]
