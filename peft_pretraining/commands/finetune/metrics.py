"""The metrics of GLUE's tasks (arXiv 1804.07461, table 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of predictions that are correct."""
    return (predicted == labels).double().mean().item()


def f1(predicted: Tensor, labels: Tensor) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if class 1 is neither predicted nor a label."""
    predicted_ones, labelled_ones, both = (
        mask.sum().item() for mask in (predicted == 1, labels == 1, (predicted == 1) & (labels == 1))
    )
    total = predicted_ones + labelled_ones
    return 2 * both / total if total else 0.0


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of two classes, which is Pearson's of 0 and 1; 0 if predictions or labels have one class only."""
    return pearson(predicted == 1, labels == 1)


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Pearson's correlation; 0 if either argument is constant."""
    a, b = (values.double() - values.double().mean() for values in (predicted, labels))
    norms = a.norm() * b.norm()
    return (a @ b / norms).clamp(-1, 1).item() if norms > 0 else 0.0


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Spearman's correlation: Pearson's of the ranks, with the mean rank for equal values."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 for the smallest value, with the mean rank for equal values; (n,) -> (n,) float64."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    middle: Tensor = sizes.cumsum(0).double() - (sizes + 1) / 2
    return middle[group]


# name -> function of predictions and labels, both (n,): class numbers, or the values of a regression for the two correlations
METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
