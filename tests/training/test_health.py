"""Skipped updates are counted, and a loss spike is distinguished from noise and from a falling loss."""

import random

import pytest

from peft_pretraining.record.recorder import LossSpikes
from peft_pretraining.training.update import MAX_SKIPPED_IN_A_ROW, SkippedUpdates, TrainingError


def counted(pattern: list[int], so_far: int = 0) -> SkippedUpdates:
    skipped = SkippedUpdates(so_far)
    for update_step, num_tensors in enumerate(pattern, start=1):
        skipped.add(update_step, float(num_tensors))
    return skipped


def test_skipped_updates_are_counted_once_however_many_tensors_they_skip():
    skipped = counted([0, 3, 0, 14, 1], so_far=2)
    assert skipped.total == 5
    assert skipped.last_one
    assert not counted([1, 0]).last_one


def test_too_many_skipped_updates_in_a_row_end_the_run():
    row = [1] * (MAX_SKIPPED_IN_A_ROW - 1)
    assert counted([*row, 0, *row]).total == 2 * len(row)
    with pytest.raises(TrainingError, match=f"up to update {len(row) + 2},"):
        counted([0, *row, 1])


def test_a_loss_spike_is_distinguished_from_noise_and_from_a_falling_loss():
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    falling = [10.0 - 0.05 * step + draw.uniform(-0.02, 0.02) for step in range(100)]
    spikes = LossSpikes()
    assert [spikes.usual(loss) for loss in falling] == [None] * 100
    noisy = LossSpikes(5.0 + draw.uniform(-0.1, 0.1) for _ in range(100))
    assert noisy.usual(5.15) is None
    assert noisy.usual(7.0) == pytest.approx(5.0, abs=0.1)
    assert LossSpikes([5.0] * 19).usual(9.0) is None  # fewer than 20 losses
    assert LossSpikes([5.0, None] * 20).usual(9.0) == 5.0  # skipped updates have no loss
