"""The metrics by which GLUE's tasks are judged (arXiv 1804.07461, table 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of predictions that are right."""
    return (predicted == labels).double().mean().item()


def f1(predicted: Tensor, labels: Tensor) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where it is neither predicted nor there."""
    found, there, both = (mask.sum().item() for mask in (predicted == 1, labels == 1, (predicted == 1) & (labels == 1)))
    return 2 * both / (found + there) if found + there else 0.0


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of two classes: Pearson's of 0 and 1; 0 where only one class is predicted, or is there."""
    return pearson(predicted == 1, labels == 1)


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Pearson's correlation; 0 where either is constant."""
    a, b = (values.double() - values.double().mean() for values in (predicted, labels))
    norms = a.norm() * b.norm()
    return (a @ b / norms).clamp(-1, 1).item() if norms > 0 else 0.0


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values having the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Tensor) -> Tensor:
    """0 for the smallest, 1 for the next, ...; (n,) -> (n,) float64."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    middle: Tensor = sizes.cumsum(0).double() - (sizes + 1) / 2
    return middle[group]


# name -> function of predictions and labels, both (n,): classes, or numbers for the two correlations of a regression
METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
