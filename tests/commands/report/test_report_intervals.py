"""Intervals of means and of paired ratios follow Student's t distribution."""

import math
import random

import pytest

from peft_pretraining.record.intervals import mean_interval, ratio_interval, t_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # Printed tables of Student's distribution, two-sided 95 %.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_equal_those_of_printed_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=6e-4)


def test_a_mean_interval_equals_hand_calculation():
    """1, 2, 3: mean 2, standard deviation 1, half width 4.303 / sqrt(3)."""
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_one_value_has_no_interval():
    found = mean_interval([5.0])
    assert (found.mean, found.low, found.high, found.half, found.n) == (5.0, None, None, None, 1)


def test_intervals_cover_the_mean_in_95_percent():
    """Of 2,000 intervals of three normal draws about 95 % contain the mean; four standard deviations of this count are 39."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    held = 0
    for _ in range(2_000):
        found = mean_interval([draw.gauss(7.0, 2.0) for _ in range(3)])
        held += found.low < 7.0 < found.high
    assert abs(held - 1_900) < 50


def test_the_ratio_interval_is_paired():
    """Ten percent more in every pair gives no scatter, for any levels of the pairs."""
    found = ratio_interval([(110.0, 100.0), (22.0, 20.0), (33.0, 30.0)])
    assert (found.mean, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1))
