"""GLUE's metrics equal values calculated by hand, and have the right limits."""

import math

import pytest
import torch

from peft_pretraining.commands.finetune.metrics import METRICS, accuracy, f1, matthews, pearson, spearman

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
PREDICTED = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
LABELS = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])


def test_metrics_of_two_classes_equal_hand_calculation() -> None:
    """From the counts above: precision 3/4, recall 3/5, and Matthews' formula."""
    assert accuracy(PREDICTED, LABELS) == pytest.approx(7 / 10)
    assert f1(PREDICTED, LABELS) == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    expected = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert matthews(PREDICTED, LABELS) == pytest.approx(expected)


def test_correlations_equal_hand_calculation() -> None:
    """x = 1, 2, 3, 4 and y = 1, 3, 2, 5: deviations -1.5 -.5 .5 1.5 and -1.75 .25 -.75 2.25; ranks 1 3 2 4 differ by 0 1 1 0."""
    x, y = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 3, 2, 5])
    assert pearson(x, y) == pytest.approx((2.625 - 0.125 - 0.375 + 3.375) / math.sqrt(5 * 8.75))
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_equal_numbers_have_the_mean_of_their_ranks() -> None:
    """10, 20, 20, 30 have the ranks 1, 2.5, 2.5, 4: deviations -1.5, 0, 0, 1.5 and -1.5, -.5, .5, 1.5."""
    found = spearman(torch.tensor([10.0, 20, 20, 30]), torch.tensor([1.0, 2, 3, 4]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_a_rank_correlation_depends_only_on_the_order() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x.exp()) == pytest.approx(-1)
    assert pearson(x, x.exp()) < 0.95


@pytest.mark.parametrize("name", METRICS)
def test_metrics_have_the_right_limits(name: str) -> None:
    """Perfect predictions give 1; for constant predictions correlations and F1 are 0, not undefined."""
    assert METRICS[name](LABELS, LABELS) == pytest.approx(1)
    if name != "accuracy":
        assert METRICS[name](torch.zeros(10), LABELS) == 0
