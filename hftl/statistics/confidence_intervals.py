"""How far a measured number may lie from the true one, by chance of which rows were drawn into the split."""

from __future__ import annotations

from typing import Any

import numpy as np

from hftl.tasks.metrics import class_scores

PROPORTIONS = ("accuracy", "micro_f1", "micro_precision", "micro_recall", "weighted_recall")
"""Metrics that, with one label a row, are the share of rows that are right."""


def wilson(successes: int, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the score interval of a proportion (Wilson 1927, https://doi.org/10.2307/2276774).

    Unlike the normal approximation it stays inside [0, 1] and does not shrink to a point at 0 or `rows` successes.

    Args:
        successes: Rows that are right, 0..rows.
        rows: All rows; 0 says nothing, so the interval is (0, 1).
        confidence: Coverage, in (0, 1).
    """
    from scipy.stats import binomtest

    if rows == 0:
        return 0.0, 1.0
    found = binomtest(int(successes), int(rows)).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def metric_intervals(
    labels: Any, predictions: Any, num_classes: int, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Returns an interval for each metric of `ClassificationMetrics`, by its name; {} without rows.

    Proportions get the Wilson interval, the others the percentile bootstrap over rows (Efron & Tibshirani 1993,
    chapter 13). Rows enter a metric through the confusion matrix alone, so drawing N rows with replacement is one
    multinomial draw over its cells, and the cost does not grow with N. Where every row is right all resamples are
    equal too, and a bootstrap interval is the point 1: it then says nothing about rows unseen.

    Args:
        labels: True classes [N], integers 0..num_classes-1.
        predictions: Predicted classes [N].
        num_classes: K.
        confidence: Coverage, in (0, 1).
        resamples: Draws of the bootstrap.
        seed: Of the draws; equal seeds give equal intervals.
    """
    confusion = confusion_matrix(labels, predictions, num_classes)
    return confusion_intervals(confusion, confidence, resamples, seed)


def confusion_matrix(labels: Any, predictions: Any, num_classes: int) -> Any:
    """Returns how many rows of each true class were predicted as each class [K, K] int64 (rows: true class)."""
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)), 1)
    return confusion


def confusion_intervals(
    confusion: Any, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """As `metric_intervals`, from the confusion matrix [K, K] (rows: true class)."""
    confusion = np.asarray(confusion, dtype=np.int64)
    rows = int(confusion.sum())
    if not rows:
        return {}
    cells = np.nonzero(confusion)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):  # one at a time: many classes have many cells
        counts = rng.multinomial(rows, confusion[cells] / rows)
        on_diagonal = counts * (cells[0] == cells[1])
        sums = ((cells[0], on_diagonal), (cells[0], counts), (cells[1], counts))
        found.append(class_scores(*(np.bincount(of, weights, len(confusion)) for of, weights in sums)))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    out = {}
    for name in found[0]:
        low, high = np.quantile([metrics[name] for metrics in found], tails)
        out[name] = (float(low), float(high))
    right = wilson(int(confusion.trace()), rows, confidence)
    return {name: right if name in PROPORTIONS else interval for name, interval in out.items()}
